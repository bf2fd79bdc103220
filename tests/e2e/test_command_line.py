"""The command line as a person types it: each command in a process of its own, its output and exit code."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from support.command_line import SCRIPT, lines_of, on_a_terminal, plain, reconcile
from support.node import Node
from support.served import constant, declare, replace_file, write_factory
from support.waiting import eventually

_COMMANDS = (
    *("run", "once", "plan", "apply", "validate", "status", "wait", "events"),
    *("explain", "history", "suspend", "resume", "retry", "schema"),
)

INVALID = """\
model_id: crooked
model_path: nets:constant
device: cpu
priority: 3
max_memory_mb: "4gb"
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models to load, one of them of a known size, and an invalid file."""
    directory = tmp_path_factory.mktemp("command-line") / "desired"
    directory.mkdir()
    write_factory(directory)
    declare(directory, "coded", config=constant(1.0))
    torch.save(nn.Linear(1024, 1024), directory / "four-mb.pt")
    declare(directory, "weighty", model_path="four-mb.pt", priority=1)
    replace_file(directory / "crooked.yaml", INVALID)
    replace_file(directory / "server.yaml", "memory_quota_mb: {cpu: 18432}\n")
    return directory


def contents(directory: Path) -> Mapping[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }


# plan


def test_plan_of_an_empty_directory_has_nothing_to_do(tmp_path: Path) -> None:
    done = reconcile("plan", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "nothing to do"


def test_plan_with_loads_exits_1(tmp_path: Path) -> None:
    write_factory(tmp_path)
    declare(tmp_path, "coded", config=constant(1.0))
    done = reconcile("plan", tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1] == "1 load"


def test_plan_shows_actions_problems_memory_and_a_summary_and_changes_nothing(
    directory: Path, state_home: Path
) -> None:
    before = contents(directory), contents(state_home)
    done = reconcile("plan", directory)
    assert done.returncode == 2
    assert lines_of(done.stdout) == [
        "  weighty  load  4 MB on cpu  from weighty.yaml",
        "  coded  load  on cpu, its size is known once loaded  from coded.yaml",
        '✗ crooked.yaml:5:16  max_memory_mb: expected an integer, got "4gb"  '
        "(left out until it is corrected)",
        "  cpu  0 → peak 4 → 4 of 18,432 MB",
        "2 load, 1 invalid",
    ]
    # Aligned: what each model gets begins in the same column.
    first, second = done.stdout.splitlines()[:2]
    assert first.index("load") == second.index("load")
    assert (contents(directory), contents(state_home)) == before


def test_plan_as_json_and_as_yaml_says_the_same(directory: Path) -> None:
    as_json, as_yaml = (reconcile("plan", "-o", form, directory) for form in ("json", "yaml"))
    assert as_json.returncode == as_yaml.returncode == 2
    plan = json.loads(as_json.stdout)
    assert YAML(typ="safe", pure=True).load(as_yaml.stdout) == plan
    assert [(a["verb"], a["model_id"], a["source"]) for a in plan["actions"]] == [
        ("load", "weighty", "weighty.yaml"),
        ("load", "coded", "coded.yaml"),
    ]
    assert plan["problems"] == [
        {
            "file": "crooked.yaml",
            "line": 5,
            "column": 16,
            "key": "max_memory_mb",
            "message": 'expected an integer, got "4gb"',
        }
    ]
    (device,) = plan["devices"]
    assert (device["device"], device["budget_mb"]) == ("cpu", 18432.0)
    assert device["after_mb"] == device["peak_mb"] == 4.0


def test_plan_beside_a_running_node_is_about_what_that_node_serves(tmp_path: Path) -> None:
    """And a model whose file is broken is kept by the node, so it is not said to be unloaded."""
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    for model_id in ("kept", "edited", "adjusted", "removed", "broken"):
        declare(directory, model_id, config=constant(1.0))
    # The node looks when it is told to or once a minute: the edits below stay plans meanwhile.
    settings = {"settle_s": 30, "resync_s": 60, "max_models": 9}
    with Node(directory, {**settings, "settle_s": 0.1}) as node:
        for model_id in ("kept", "edited", "adjusted", "removed", "broken"):
            node.wait_phase(model_id, "Ready")
        ports = {"port": 0, "metrics_port": 0}
        replace_file(directory / "server.yaml", json.dumps({**ports, **settings}))
        slower = "event=SettingChanged key=settle_s"
        eventually(lambda: node.find(slower), "the node settles slowly")
        assert reconcile("plan", directory).stdout.splitlines()[-1] == "nothing to do"
        declare(directory, "edited", config=constant(2.0))
        declare(directory, "adjusted", config=constant(1.0), priority=2)
        declare(directory, "new", config=constant(5.0))
        (directory / "removed.yaml").unlink()
        broken = (directory / "broken.yaml").read_text()
        replace_file(directory / "broken.yaml", broken + "priority: high\n")
        done = reconcile("plan", directory)
        assert done.returncode == 2
        *actions, problem, memory, summary = lines_of(done.stdout)
        assert actions == [
            "  adjusted  adjust  priority 0 → 2  in place · no reload",
            '  edited  update  kwargs {"value": 1.0} → {"value": 2.0}  surge · no downtime',
            "  new  load  on cpu, its size is known once loaded  from new.yaml",
            "  removed  unload  no file declares it",
        ]
        assert problem.startswith("✗ broken.yaml:5:11  priority: expected an integer")
        assert problem.endswith("(broken: generation 1 stays)")
        assert memory.startswith("  cpu  ")
        assert summary == "1 load, 1 update, 1 adjust, 1 unload, 1 invalid"
        assert node.status("edited")["generation"] == 1, "a plan is no order"

        second = reconcile(directory)
        assert second.returncode == 2
        assert f"process {node.process.pid}" in second.stderr


# validate, once, schema


def test_validate_exits_0_when_all_is_valid_and_2_otherwise(
    directory: Path, tmp_path: Path
) -> None:
    done = reconcile("validate", directory)
    assert done.returncode == 2
    assert lines_of(done.stdout) == [
        "  coded  valid  coded.yaml:1",
        "  weighty  valid  weighty.yaml:1",
        '✗ crooked.yaml:5:16  max_memory_mb: expected an integer, got "4gb"',
        "2 valid, 1 problem",
    ]
    data = json.loads(reconcile("validate", "-o", "json", directory).stdout)
    assert data["valid"] == ["coded", "weighty"]
    assert [problem["key"] for problem in data["problems"]] == ["max_memory_mb"]
    declare(tmp_path, "fine")
    assert reconcile("validate", tmp_path).returncode == 0


def test_once_exits_0_when_every_model_became_ready(tmp_path: Path) -> None:
    write_factory(tmp_path)
    declare(tmp_path, "coded", config=constant(1.0))
    done = reconcile("once", tmp_path, "--log-format", "json")
    assert done.returncode == 0, done.stderr
    assert lines_of(done.stdout) == ["  coded  Ready  0 MB on cpu  from coded.yaml"]
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"Loading", "Loaded"} <= {event["event"] for event in events}
    assert all({"time", "level", "logger", "event"} <= event.keys() for event in events)


def test_once_exits_1_when_a_model_did_not_and_says_why(tmp_path: Path) -> None:
    write_factory(tmp_path)
    declare(tmp_path, "coded", config=constant(1.0))
    declare(tmp_path, "elsewhere", model_path="nowhere.pt")
    done = reconcile("once", "-o", "yaml", tmp_path)
    assert done.returncode == 1
    data = YAML(typ="safe", pure=True).load(done.stdout)
    phases = {m["model_id"]: (m["phase"], m["reason"]) for m in data["models"]}
    assert phases == {"coded": ("Ready", ""), "elsewhere": ("Failed", "WeightsNotFound")}


@pytest.mark.parametrize(
    ("of", "known", "required"),
    [
        (
            "model",
            {"model_id", "model_path", "max_memory_mb", "config"},
            ["model_id", "model_path"],
        ),
        ("server", {"host", "port", "max_models", "memory_quota_mb"}, []),
    ],
)
def test_schema_is_a_json_schema_that_knows_all_keys(
    of: str, known: set[str], required: list[str]
) -> None:
    done = reconcile("schema", of)
    assert done.returncode == 0
    schema = json.loads(done.stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert known <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert sorted(schema.get("required", [])) == required
    assert all("description" in value for value in schema["properties"].values())


def test_schema_without_an_argument_is_that_of_a_model() -> None:
    assert reconcile("schema").stdout == reconcile("schema", "model").stdout


# mistakes of whoever types


@pytest.mark.parametrize("command", ["plan", "validate", "once", "run"])
def test_a_missing_directory_is_an_error_in_one_sentence(tmp_path: Path, command: str) -> None:
    done = reconcile(command, tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path / 'nowhere'}: there is no such directory\n"


def test_a_file_in_the_place_of_the_directory_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("model_id: a\n")
    done = reconcile("plan", file)
    assert done.returncode == 2
    assert done.stderr == f"{file}: expected a directory of YAML files, got a file\n"


def test_an_invalid_server_file_is_named_with_its_line(tmp_path: Path) -> None:
    replace_file(tmp_path / "server.yaml", "max_models: 4\nport: many\n")
    for command in ("plan", "run"):
        done = reconcile(command, tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"{tmp_path / 'server.yaml'}:2:7  port: expected ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    done = reconcile(*arguments)
    text = done.stdout + done.stderr
    assert "Usage: reconcile" in text
    for command in _COMMANDS:
        assert re.search(rf"^ +{command} ", text, re.MULTILINE)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "arguments", [["plan", "--bogus", "."], ["--bogus", "."], ["plan", "-o", "csv", "."]]
)
def test_what_is_not_understood_exits_2(arguments: list[str]) -> None:
    done = reconcile(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr


# the console script, and terminals


def test_the_console_script_runs_the_same_commands(directory: Path) -> None:

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)

    done = run("reconcile", "plan", str(directory))
    assert (done.returncode, done.stdout) == (2, reconcile("plan", directory).stdout)
    assert run("--version").stdout.startswith("splitlearn-manager ")
    assert run("--help").returncode == 0
    unknown = run("serve")
    assert unknown.returncode == 2
    assert "No such command 'serve'" in unknown.stderr


def test_colour_is_for_terminals_only(directory: Path) -> None:
    piped = reconcile("plan", directory).stdout
    assert "\x1b" not in piped
    coloured = on_a_terminal("plan", directory)
    assert "\x1b[32mload\x1b[0m" in coloured
    assert plain(coloured) == piped
    assert "\x1b" not in on_a_terminal("plan", "-o", "json", directory)
