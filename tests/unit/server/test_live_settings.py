"""What a changed server.yaml does to a running node, key by key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from splitlearn_manager import ManagedServer, ServerConfig
from splitlearn_manager.config.server_config import LIVE_KEYS, RESTART_KEYS
from splitlearn_manager.server.live_settings import LiveSettings


@pytest.fixture
def started_with() -> ServerConfig:
    return ServerConfig(port=0, metrics_port=0)


@pytest.fixture
def server(started_with: ServerConfig, tmp_path: Path) -> ManagedServer:
    return ManagedServer(started_with, directory=tmp_path)


@pytest.fixture
def settings(
    started_with: ServerConfig, server: ManagedServer, caplog: pytest.LogCaptureFixture
) -> LiveSettings:
    caplog.set_level(logging.INFO, "splitlearn_manager")
    return LiveSettings(started_with, server)


def changed(config: ServerConfig, **keys: object) -> ServerConfig:
    return ServerConfig.model_validate({**config.model_dump(), **keys})


NEW_VALUES: dict[str, object] = {
    "max_models": 2,
    "max_memory_percent": 40.0,
    "memory_quota_mb": {"cpu": 123.0},
    "routing": "least_loaded",
    "log_level": "WARNING",
    "settle_s": 0.75,
    "resync_s": 3.0,
    "prune_guard_percent": 20.0,
    "max_parallel_loads": 7,
    "parallel_forwards": 3,
    "intra_op_threads": 5,
}


def in_force(server: ManagedServer, key: str) -> object:
    """The value that the node works with at this moment, wherever it has it."""
    ledger = server.model_manager.snapshot().ledger
    source = server.desired_source
    assert source is not None
    return {
        "max_models": ledger.max_models,
        "max_memory_percent": server.resource_manager.max_memory_percent,
        "memory_quota_mb": {"cpu": ledger.budgets_mb["cpu"]},
        "routing": server.router.strategy,
        "log_level": logging.getLevelName(logging.getLogger("splitlearn_manager").level),
        "settle_s": source.settle_s,
        "resync_s": server.reconciler.resync_s,
        "prune_guard_percent": source.prune_guard_percent,
        "max_parallel_loads": server.reconciler.max_parallel_loads,
        "parallel_forwards": server.threads.forwards,
        "intra_op_threads": server.threads.intra_op_threads,
    }[key]


def test_every_live_key_is_tried() -> None:
    assert set(NEW_VALUES) == LIVE_KEYS


@pytest.mark.parametrize("key", sorted(NEW_VALUES))
def test_a_live_key_is_in_force_at_once(
    key: str,
    started_with: ServerConfig,
    server: ManagedServer,
    settings: LiveSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    value = NEW_VALUES[key]
    assert in_force(server, key) != value
    settings.apply(changed(started_with, **{key: value}))
    assert in_force(server, key) == value
    assert settings.restart_required == ()
    assert f"event=SettingChanged key={key} " in caplog.text


def test_the_same_settings_change_and_log_nothing(
    started_with: ServerConfig, settings: LiveSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.apply(changed(started_with))
    assert not caplog.records


def test_other_keys_wait_for_the_next_start_and_are_named_once(
    started_with: ServerConfig, settings: LiveSettings, caplog: pytest.LogCaptureFixture
) -> None:
    assert {"host", "port", "max_workers"} <= RESTART_KEYS
    waiting = changed(started_with, port=1234, max_workers=3)
    settings.apply(waiting)
    assert settings.restart_required == ("port", "max_workers")
    settings.apply(changed(waiting, max_models=3))
    assert caplog.text.count("event=RestartRequired") == 1


def test_keys_that_are_put_back_wait_for_nothing(
    started_with: ServerConfig, settings: LiveSettings
) -> None:
    settings.apply(changed(started_with, port=1234))
    settings.apply(started_with)
    assert settings.restart_required == ()


def test_without_its_file_the_defaults_are_in_force_once_there_was_one(
    started_with: ServerConfig, server: ManagedServer, settings: LiveSettings
) -> None:
    settings.follow(None)
    assert settings.restart_required == ()
    settings.follow(started_with)
    settings.follow(changed(started_with, max_models=2, resync_s=3.0))
    assert in_force(server, "max_models") == 2
    settings.follow(None)
    assert in_force(server, "max_models") == ServerConfig().max_models
    assert in_force(server, "resync_s") == ServerConfig().resync_s
    assert settings.restart_required == ("port", "metrics_port"), "it was started with others"
    settings.follow(started_with)
    assert settings.restart_required == ()


def test_without_its_file_what_code_has_given_is_in_force_again(
    started_with: ServerConfig, server: ManagedServer, settings: LiveSettings
) -> None:
    settings.follow(changed(started_with, max_models=2))
    assert in_force(server, "max_models") == 2
    settings.follow(None)
    assert in_force(server, "max_models") == started_with.max_models
    assert settings.restart_required == ()


def test_a_routing_class_that_does_not_exist_leaves_the_old_one_and_applies_the_rest(
    started_with: ServerConfig,
    server: ManagedServer,
    settings: LiveSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings.apply(changed(started_with, routing="no_such_module:Strategy", max_models=2))
    assert server.router.strategy == "round_robin"
    assert in_force(server, "max_models") == 2
    refused = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(refused) == 1
    assert "key=routing" in refused[0]
    assert "round_robin stays in use" in refused[0]
    assert "event=SettingChanged key=routing" not in caplog.text
