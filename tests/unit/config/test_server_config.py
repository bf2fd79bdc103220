"""What ServerConfig accepts and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitlearn_manager.config.server_config import LIVE_KEYS, RESTART_KEYS, ServerConfig
from splitlearn_manager.errors import ConfigError


def refusal(**keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        ServerConfig.model_validate(keys)
    return caught.value.message


def test_defaults_are_those_of_the_contract() -> None:
    assert ServerConfig().model_dump() == {
        "host": "127.0.0.1",
        "port": 50051,
        "unix_socket": None,
        "max_workers": 10,
        "max_models": 5,
        "metrics_port": 8000,
        "health_check_interval": 30.0,
        "enable_monitoring": True,
        "log_level": "INFO",
        "max_memory_percent": 80.0,
        "memory_quota_mb": {},
        "routing": "round_robin",
        "settle_s": 0.25,
        "resync_s": 1.0,
        "prune_guard_percent": 50.0,
        "max_parallel_loads": 2,
        "parallel_forwards": None,
        "intra_op_threads": None,
        "state_dir": None,
    }


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("host", "", "host: expected a host name or address"),
        ("host", "a b", "host: expected a host name or address"),
        ("port", -1, "port: expected an integer ≥ 0, got -1"),
        ("port", 65536, "port: expected an integer ≤ 65535, got 65536"),
        ("port", "50051", 'port: expected an integer, got "50051"'),
        ("max_workers", 0, "max_workers: expected an integer ≥ 1, got 0"),
        ("max_models", 1.5, "max_models: expected an integer, got 1.5"),
        ("max_memory_percent", 0, "max_memory_percent: expected a number > 0, got 0"),
        ("max_memory_percent", 100.1, "max_memory_percent: expected a number ≤ 100, got 100.1"),
        ("memory_quota_mb", {"gpu": 1}, "memory_quota_mb.gpu: expected cpu, cuda, cuda:N or mps"),
        ("memory_quota_mb", {"auto": 1}, "memory_quota_mb.auto: expected cpu, cuda, cuda:N or"),
        ("memory_quota_mb", {"cpu": 0}, "memory_quota_mb.cpu: expected a number > 0, got 0"),
        ("memory_quota_mb", {"cpu": "4gb"}, 'memory_quota_mb.cpu: expected a number, got "4gb"'),
        ("memory_quota_mb", 5, "memory_quota_mb: expected a map, got 5"),
        ("routing", "robin", "routing: expected round_robin, least_loaded, random or package"),
        ("routing", "round-robin", 'did you mean "round_robin"?'),
        ("log_level", "warn", 'got "warn"; did you mean "WARNING"?'),
        ("log_level", 10, "log_level: expected DEBUG, INFO, WARNING, ERROR or CRITICAL, got 10"),
        ("settle_s", 0, "settle_s: expected a number > 0, got 0"),
        ("resync_s", float("nan"), "resync_s: expected a finite number, got .nan"),
        ("enable_monitoring", "on", 'enable_monitoring: expected true or false, got "on"'),
        ("prot", 1, "prot: unknown key: did you mean `port`?"),
        ("model_id", "a", "model_id: expected no such key here: it belongs in a model's own file"),
        ("prune_guard_percent", 0, "prune_guard_percent: expected a number > 0, got 0"),
        ("prune_guard_percent", 101, "prune_guard_percent: expected a number ≤ 100, got 101"),
        ("unix_socket", 5, "unix_socket: expected text, got 5"),
        ("state_dir", 5, "state_dir: expected text, got 5"),
    ],
)
def test_wrong_value_is_refused_in_plain_words(key: str, value: object, expected: str) -> None:
    assert expected in refusal(**{key: value})


def test_log_level_is_read_in_any_case_and_kept_in_upper_case() -> None:
    assert ServerConfig.model_validate({"log_level": "debug"}).log_level == "DEBUG"


def test_own_routing_class_quotas_and_free_ports_are_accepted() -> None:
    config = ServerConfig(
        routing="pkg.mod:Class", memory_quota_mb={"cpu": 10, "cuda:0": 2.5}, port=0
    )
    assert config.routing == "pkg.mod:Class"
    assert config.memory_quota_mb == {"cpu": 10.0, "cuda:0": 2.5}


def test_a_state_directory_is_relative_to_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.yaml").write_text("state_dir: state\n")
    assert ServerConfig.from_yaml(tmp_path / "server.yaml").resolved_state_dir == tmp_path / "state"
    monkeypatch.chdir(tmp_path)
    assert ServerConfig.from_yaml("server.yaml").resolved_state_dir == tmp_path / "state"
    assert ServerConfig(state_dir="state").resolved_state_dir == tmp_path / "state"
    assert ServerConfig(state_dir="/var/lib/x").resolved_state_dir == Path("/var/lib/x")
    monkeypatch.setenv("HOME", "/home/someone")
    assert ServerConfig(state_dir="~/x").resolved_state_dir == Path("/home/someone/x")
    assert ServerConfig().resolved_state_dir is None


def test_settings_are_equal_wherever_they_were_read(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("state_dir: state\n")
    assert ServerConfig.from_yaml(tmp_path / "server.yaml") == ServerConfig(state_dir="state")
    assert ServerConfig(state_dir="state") != ServerConfig()


def test_each_key_is_either_live_or_needs_a_restart() -> None:
    assert set(ServerConfig.model_fields) == LIVE_KEYS | RESTART_KEYS
    assert not LIVE_KEYS & RESTART_KEYS
    assert {"host", "port", "metrics_port", "max_workers"} <= RESTART_KEYS
