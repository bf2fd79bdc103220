"""The commands that ask a running node, against a real one: status, wait, events, explain, apply, …

Most tests share one node; each has models of its own, so they do not depend on each other.
"""

from __future__ import annotations

import json
import shlex
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlearn_manager.server.state_dir import socket_of, state_dir_for
from support.command_line import (
    COMMAND,
    Terminal,
    lines_of,
    on_a_terminal,
    plain,
    reconcile,
)
from support.gated import Gate
from support.node import Node
from support.served import answer_of, constant, declare, replace_file, write_factory
from support.waiting import eventually


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with a model that serves, one without weights, one whose code raises, and an invalid file."""
    directory = tmp_path_factory.mktemp("node-commands") / "desired"
    directory.mkdir()
    write_factory(directory)
    replace_file(directory / "raising.py", "def model():\n    raise ValueError('as it is told')\n")
    declare(directory, "mlp", config=constant(1.0))
    declare(directory, "away", model_path="away.safetensors")
    declare(directory, "raising", model_path="raising:model")
    replace_file(
        directory / "crooked.yaml", "model_id: crooked\nmodel_path: nets:constant\npriority: x\n"
    )
    with Node(directory, {"max_models": 40, "settle_s": 0.1}) as node:
        node.wait_phase("mlp", "Ready")
        node.wait_phase("away", "Failed")
        node.wait_phase("raising", "Failed")
        yield node


def asked(node: Node, *arguments: object) -> dict[str, object]:
    """The answer of a command as JSON."""
    done = reconcile(*arguments, node.directory, "-o", "json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# status


def test_status_shows_each_model_and_why_it_is_not_ready(node: Node) -> None:
    done = reconcile("status", node.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = lines_of(done.stdout)
    at = {line.split()[0]: n for n, line in enumerate(lines) if line.strip()}
    assert lines[at["mlp"]].startswith("  mlp  Ready  Synced  Healthy  1  0 MB cpu  ")
    assert lines[at["mlp"]].endswith("  mlp.yaml:1")
    assert lines[at["away"]].startswith("  away  Failed  OutOfSync  Degraded  1  –  ")
    assert lines[at["away"] + 1].startswith("  WeightsNotFound: nothing is at ")
    assert lines[at["raising"] + 1].startswith(
        "  LoadFailed: raising:model raised ValueError: as it is told"
    )
    assert lines[at["node"]].startswith(
        f"  node  {node.directory}, process {node.process.pid} for "
    )
    assert lines[at["serves"]] == f"  serves  gRPC {node.address}, HTTP {node.http}"
    assert any(
        line.startswith("✗ crooked.yaml:3:11  priority: expected an integer") for line in lines
    )


def test_status_as_json_is_what_the_node_tells_over_http(node: Node) -> None:
    told = asked(node, "status")
    (mlp,) = (m for m in told["models"] if m["model_id"] == "mlp")  # type: ignore[attr-defined]
    of_http = node.status("mlp")
    for key in ("phase", "sync", "health", "generation", "source", "line", "conditions"):
        assert mlp[key] == of_http[key]
    assert told["node"]["process_id"] == node.process.pid  # type: ignore[index]


def test_status_on_a_terminal_is_coloured_and_fits(node: Node) -> None:
    written = on_a_terminal("status", node.directory, columns=80)
    assert "\x1b[32mReady\x1b[0m" in written
    assert "\x1b[31mFailed\x1b[0m" in written
    table = plain(written).split("\n\n")[0]
    assert all(len(line) <= 80 for line in table.splitlines())
    colourless = on_a_terminal("status", node.directory, environment={"NO_COLOR": "1"})
    assert "\x1b[3" not in colourless


def test_the_socket_is_its_users_alone(node: Node) -> None:
    mode = socket_of(state_dir_for(node.directory)).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


# explain, history, events


def test_explain_says_what_was_tried_and_what_would_help(node: Node) -> None:
    done = reconcile("explain", "raising", node.directory)
    assert done.returncode == 0
    lines = lines_of(done.stdout)
    assert lines[0] == "raising  Failed"
    labels = [line.split("  ")[1] for line in lines[2:] if line.startswith("  ")]
    assert "because" in labels
    assert "would help" in labels
    assert any("as it is told" in line for line in lines)
    assert asked(node, "explain", "mlp")["phase"] == "Ready"


def test_http_tells_what_the_commands_tell(node: Node) -> None:
    for command in ("explain", "history"):
        code, body = node.get(f"/api/v1/models/raising/{command}")
        told = json.loads(body)
        assert (code, told["model_id"]) == (200, "raising")
        assert told.keys() == asked(node, command, "raising").keys()
    told = json.loads(node.get("/api/v1/node")[1])
    assert told["directory"] == str(node.directory)
    assert [problem["file"] for problem in told["problems"]] == ["crooked.yaml"]
    told = json.loads(node.get("/api/v1/events?model_id=mlp")[1])
    assert "Loaded" in [event["reason"] for event in told["events"]]
    assert json.loads(node.get(f"/api/v1/events?after={told['next']}")[1])["next"] >= told["next"]


def test_history_lists_the_versions_that_were_accepted(node: Node) -> None:
    declare(node.directory, "edited", config=constant(1.0))
    node.wait_phase("edited", "Ready")
    declare(node.directory, "edited", config=constant(1.0), priority=4)
    node.wait_generation("edited", 2)
    entries = asked(node, "history", "edited")["history"]
    assert [(e["generation"], e["source"]) for e in entries] == [  # type: ignore[attr-defined]
        (1, "edited.yaml:1"),
        (2, "edited.yaml:1"),
    ]
    assert "priority 0 → 4" in reconcile("history", "edited", node.directory).stdout


def test_events_tell_what_happened_and_go_on_with_what_happens(node: Node) -> None:
    found = asked(node, "events", "mlp")["events"]
    assert "Loaded" in [e["reason"] for e in found]  # type: ignore[attr-defined]
    assert {e["model_id"] for e in found} == {"mlp"}  # type: ignore[attr-defined]
    command = [*COMMAND, "events", "-f", "-o", "json", "followed", "mlp", str(node.directory)]
    declare(node.directory, "followed", config=constant(1.0))
    node.wait_phase("followed", "Ready")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follow:
        assert follow.stdout is not None
        events = (json.loads(line) for line in follow.stdout)
        assert next(e for e in events if e["reason"] == "Loaded" and e["model_id"] == "followed")
        declare(node.directory, "followed", config=constant(1.0), priority=7)
        assert next(e for e in events if e["reason"] == "Adjusted")["message"].startswith(
            "priority 0 → 7"
        )
        follow.send_signal(signal.SIGINT)
        assert follow.wait(20) == 130
        assert follow.stderr is not None
        assert follow.stderr.read() == ""


# suspend, resume, retry


def test_a_suspended_model_stays_as_it_is_until_it_is_resumed(node: Node) -> None:
    declare(node.directory, "paused", config=constant(1.0))
    node.wait_phase("paused", "Ready")
    done = reconcile("suspend", "paused", node.directory)
    assert done.returncode == 0
    assert done.stdout.startswith("paused is suspended: it stays at generation 1")
    declare(node.directory, "paused", config=constant(1.0), priority=3)
    wait = reconcile("wait", "--for", "synced", "paused", node.directory, "--timeout", "60")
    assert wait.returncode == 2
    assert "paused: suspended" in wait.stderr
    assert node.status("paused")["generation"] == 1
    assert "resume paused" in reconcile("explain", "paused", node.directory).stdout
    assert reconcile("resume", "paused", node.directory).returncode == 0
    wait = reconcile("wait", "--for", "synced", "paused", node.directory)
    assert (wait.returncode, wait.stdout) == (0, "paused: synced\n")
    assert node.status("paused")["generation"] == 2


def test_retry_has_a_failed_load_tried_at_once(node: Node) -> None:
    flaky = node.directory / "flaky.py"
    replace_file(flaky, "def model():\n    raise ValueError('not yet')\n")
    declare(node.directory, "flaky", model_path="flaky:model")
    eventually(lambda: node.status("flaky").get("attempts"), "it has failed")
    done = reconcile("retry", "flaky", node.directory)
    assert done.returncode == 0
    assert "flaky is tried again" in done.stdout
    assert (
        reconcile("retry", "mlp", node.directory).stdout
        == "mlp has no failed load to try again; `explain mlp` says how it stands\n"
    )


# wait


def test_wait_counts_what_was_written_before_it_was_typed(node: Node) -> None:
    for value in (1.0, 2.0, 3.0):
        declare(node.directory, "waited", config=constant(value))
        done = reconcile("wait", "--for", "ready", "waited", node.directory)
        assert (done.returncode, done.stdout, done.stderr) == (0, "waited: ready\n", "")
        assert answer_of(node, "waited") == value
    (node.directory / "waited.yaml").unlink()
    done = reconcile("wait", "--for", "gone", "waited", node.directory)
    assert (done.returncode, done.stdout) == (0, "waited: gone\n")


def test_wait_exits_1_when_time_is_over_and_2_when_it_cannot_be(node: Node) -> None:
    done = reconcile("wait", "--for", "gone", "mlp", node.directory, "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "not gone within 0.2 s:\n  mlp: it is Ready\n"
    done = reconcile("wait", "--for", "ready", "away", node.directory)
    assert done.returncode == 2
    assert "away: WeightsNotFound: nothing is at " in done.stderr
    done = reconcile("wait", "mpl", node.directory)
    assert done.returncode == 2
    assert (
        "mpl: no file declares it, unless one of those that are not accepted does: crooked.yaml"
        in done.stderr
    )
    assert "did you mean 'mlp'?" in done.stderr


@pytest.mark.parametrize("command", ["explain", "history", "suspend", "resume", "retry", "status"])
def test_an_unknown_id_is_told_which_may_be_meant(node: Node, command: str) -> None:
    done = reconcile(command, "mpl", node.directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "the node has no model 'mpl': did you mean 'mlp'?\n"


# apply, and the prune guard


def test_apply_says_what_it_does_and_ends_when_all_is_as_the_files_say(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    names = ("one", "two", "three", "four")
    for name in names:
        declare(directory, name, config=constant(1.0))
    with Node(directory, {"settle_s": 5}) as node:
        for name in names:
            node.wait_phase(name, "Ready")
        # The node settles long enough for the plan to be made before it acts, and from then on quickly.
        declare(directory, "one", config=constant(2.0))
        quickly = {"port": 0, "metrics_port": 0, "settle_s": 0.1}
        replace_file(directory / "server.yaml", json.dumps(quickly))
        done = reconcile("apply", directory)
        assert (done.returncode, done.stderr) == (0, "")
        lines = lines_of(done.stdout)
        assert lines[0].startswith("  one  update  kwargs ")
        assert lines[-1] == "all is as the files say: 4 models"
        assert node.status("one")["observed_generation"] == 2

        replace_file(directory / "two.yaml", "model_id: two\n")
        done = reconcile("apply", directory)
        assert done.returncode == 2
        assert "two.yaml:1:1  model_path: " in done.stderr
        declare(directory, "two", config=constant(1.0))

        for name in names[:3]:
            (directory / f"{name}.yaml").unlink()
        done = reconcile("apply", directory)
        assert done.returncode == 1
        assert "no file declares 3 of 4 models any more" in done.stdout
        assert "one, three, two" in done.stdout
        assert done.stderr == "not all is as the files say: the prune guard waits for you\n"
        assert reconcile("plan", directory).returncode == 1
        told = json.loads(reconcile("apply", directory, "-o", "json").stdout)
        assert told["outcome"] == "held"
        digest = told["prune_guard"]["digest"]

        (command,) = (line for line in done.stdout.splitlines() if "--confirm-prune" in line)
        typed = shlex.split(command.partition(":")[2])
        assert typed[-4:] == ["apply", str(directory), "--confirm-prune", digest]
        wrong = reconcile("apply", directory, "--confirm-prune", "0" * 12)
        assert wrong.returncode == 2
        assert digest in wrong.stderr
        assert node.status("one")["phase"] == "Ready"
        confirmed = subprocess.run(typed, capture_output=True, text=True, timeout=60)
        assert (confirmed.returncode, confirmed.stderr) == (0, "")
        assert confirmed.stdout.splitlines()[-1] == "all is as the files say: 1 model"
        assert node.status("four")["phase"] == "Ready"
        assert not node.status("one")

        # What is wrong with the node itself is said as well, and then what is left of it.
        node.kill()
        done = reconcile("status", directory)
        assert (done.returncode, done.stdout) == (2, "")
        assert "ended without cleaning up" in done.stderr
        assert "To start one: " in done.stderr
    done = reconcile("plan", directory)
    assert done.stdout.splitlines()[-1] == "1 load"


# The terminal of `run`


def test_run_on_a_terminal_has_a_bar_for_each_load_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    replace_file(directory / "server.yaml", "port: 0\nmetrics_port: 0\n")
    declare(directory, "quick", config=constant(1.0))
    with Gate(tmp_path / "gate") as gate:
        gate.write_factory(directory)
        declare(directory, "slow", model_path="gated:slow_to_build", config=gate.config)
        with Terminal("run", directory, columns=100) as terminal:
            gate.wait_begun(1)
            eventually(lambda: "loading slow" in terminal.written, "the load has a bar")
            eventually(lambda: "model=quick" in plain(terminal.written), "the log is there as well")
            assert "\x1b[?25l" in terminal.written, "the cursor is hidden while bars move"
            assert "━" in terminal.written
            assert "%" not in terminal.written
            gate.release()
            eventually(lambda: "Serving 2 of 2 models" in terminal.written, "both are served")
            assert "\x1b[32mReady\x1b[0m" in terminal.written
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.wait() == 0
            assert terminal.written.rindex("\x1b[?25h") > terminal.written.rindex("\x1b[?25l")


def test_run_without_a_terminal_writes_plain_lines(node: Node) -> None:
    written = "\n".join([*node.lines, *node.printed])
    assert "\x1b" not in written
    assert all(line.startswith("time=") for line in node.lines)
    assert node.find("event=Loaded model=mlp ")
