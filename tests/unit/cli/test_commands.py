"""The commands that ask a node: what they ask, what they print, how they end. The node only answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.server.control import Question
from support.command_line import COMMAND, Run, lines_of
from support.fake_node import FakeNode, condition, model

FAILED = {
    "phase": "Failed",
    "sync": "OutOfSync",
    "health": "Degraded",
    "observed_generation": None,
    "reason": "LoadFailed",
    "message": "it raised",
    "failed_for_good": True,
    "conditions": [condition("Ready", "False", "LoadFailed", "it raised")],
}
GUARD = {"digest": "3f1c0a9be2d4", "model_ids": ["bert", "gpt2"], "managed": 3}
EVENTS = [
    {"serial": n, "at": 1e9, "model_id": m, "reason": "Loaded", "message": "ok", "count": 1}
    for n, m in enumerate(("bert", "minilm", "bert"), start=1)
]


def refuses(question: Question) -> Mapping[str, object]:
    raise ModelNotFound(
        f"the node has no model {question.arguments.get('model_id')!r}: did you mean 'bert'?"
    )


@pytest.fixture
def fake(here: Path) -> Iterator[FakeNode]:
    (here / "desired").mkdir()
    with FakeNode(here / "desired", model("bert", **FAILED), model("minilm")) as fake:
        yield fake


# status


def test_status_shows_models_then_the_node(fake: FakeNode, reconcile: Run) -> None:
    done = reconcile("status")
    assert (done.code, done.err) == (0, "")
    lines = lines_of(done.out)
    assert lines[0].split() == [
        "model",
        "phase",
        "sync",
        "health",
        "gen",
        "memory",
        "since",
        "from",
    ]
    assert lines[1].startswith("  bert  Failed  OutOfSync  Degraded  1  87 MB cpu")
    assert lines[2] == "  LoadFailed: it raised"
    assert lines[3].startswith("  minilm  Ready  Synced  Healthy  1")
    assert lines[4] == ""
    assert lines[5].startswith(f"  node  {fake.about['directory']}, process ")


def test_status_as_json_and_yaml_is_what_the_node_told(fake: FakeNode, reconcile: Run) -> None:
    told = {"models": fake.models, "node": fake.about}
    as_json, as_yaml = reconcile("status", "-o", "json"), reconcile("status", "-o", "yaml")
    assert json.loads(as_json.out) == told
    assert YAML(typ="safe", pure=True).load(as_yaml.out) == told
    one = json.loads(reconcile("status", "minilm", "-o", "json").out)
    assert one["models"] == [model("minilm")]


def test_status_of_an_id_is_all_about_it(fake: FakeNode, reconcile: Run) -> None:
    done = reconcile("status", "minilm", "bert")
    assert done.code == 0
    assert "minilm   Ready · Synced · Healthy" in done.out
    assert "bert   Failed · OutOfSync · Degraded" in done.out


def test_status_of_an_unknown_id_is_an_error(fake: FakeNode, reconcile: Run) -> None:
    fake.answers["explain"] = refuses
    done = reconcile("status", "brt", "minilm")
    assert done.code == 2
    assert "minilm" in done.out
    assert done.err == "the node has no model 'brt': did you mean 'bert'?\n"


# golden


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("bert.yaml", [], "bert.golden.safetensors"),
        ("team/bert.yaml", [], "../bert.golden.safetensors"),
        ("team/bert.yaml", ["-f", "desired/team/g.npz"], "g.npz"),
        ("bert.yaml", ["-f", "elsewhere.npz"], "{here}/elsewhere.npz"),
    ],
)
def test_golden_says_what_to_write_in_the_models_file(
    fake: FakeNode, reconcile: Run, here: Path, source: str, options: list[str], named: str
) -> None:
    fake.models = [model("bert", source=source)]
    fake.answers["golden"] = lambda question: {"message": "recorded"}
    done = reconcile("golden", "bert", *options)
    assert done.code == 0
    assert done.out.splitlines()[-2:] == ["verify:", f"  golden: {named.format(here=here)}"]
    assert ("relative to it" in done.out) == (not named.startswith("{here}"))


# events


@pytest.fixture
def eventful(fake: FakeNode) -> FakeNode:
    def events(question: Question) -> Mapping[str, object]:
        after, only = int(question.number("after", 0)), question.optional_text("model_id")
        if question.number("wait_s", 0):
            raise SplitlearnError("the node is shutting down", reason="NodeStopping")
        found = [e for e in EVENTS[after:] if only in (None, e["model_id"])]
        return {"events": found, "next": len(EVENTS)}

    fake.answers["events"] = events
    return fake


def test_events_are_lines_or_data(eventful: FakeNode, reconcile: Run) -> None:
    lines = lines_of(reconcile("events").out)
    assert [line.split()[-3:] for line in lines] == [
        [e["model_id"], "Loaded", "ok"] for e in EVENTS
    ]
    assert json.loads(reconcile("events", "-o", "json").out) == {"events": EVENTS}
    assert len(reconcile("events", "minilm").out.splitlines()) == 1
    assert len(reconcile("events", "minilm", "bert").out.splitlines()) == 3
    assert reconcile("events", "gpt2").code == 2


def test_events_that_are_followed_end_with_the_node(eventful: FakeNode, reconcile: Run) -> None:
    done = reconcile("events", "-f", "bert")
    assert (done.code, done.err) == (2, "the node is shutting down\n")
    assert len(done.out.splitlines()) == 2
    assert eventful.questions("events")[-1] == {"after": 3, "model_id": "bert", "wait_s": 60.0}


def test_events_that_are_followed_are_one_json_object_a_line(
    eventful: FakeNode, reconcile: Run
) -> None:
    done = reconcile("events", "-f", "-o", "json")
    assert [json.loads(line) for line in done.out.splitlines()] == EVENTS


def test_without_events_that_is_said(fake: FakeNode, reconcile: Run) -> None:
    fake.answers["events"] = lambda question: {"events": [], "next": 0}
    assert reconcile("events").out == "nothing has happened yet\n"


# explain, history, suspend, resume, retry


def test_explain_prints_what_the_node_says(fake: FakeNode, reconcile: Run) -> None:
    told = {
        "model_id": "bert",
        "phase": "Failed",
        "headline": "bert could not be loaded",
        "because": ["LoadFailed: it raised"],
        "waits_for": None,
        "would_help": ["`retry bert` tries it at once"],
    }
    fake.answers["explain"] = lambda question: told
    assert lines_of(reconcile("explain", "bert").out) == [
        "bert  Failed",
        "  bert could not be loaded",
        "  because  LoadFailed: it raised",
        "  would help  `retry bert` tries it at once",
    ]
    assert json.loads(reconcile("explain", "bert", "-o", "json").out) == told


def test_history_prints_what_the_node_says(fake: FakeNode, reconcile: Run) -> None:
    entry = {
        "generation": 1,
        "at": 1e9,
        "what": "declared",
        "source": "a.yaml:1",
        "outcome": "Ready",
    }
    fake.answers["history"] = lambda question: {"model_id": "bert", "history": [entry]}
    assert lines_of(reconcile("history", "bert").out)[1].endswith("declared  a.yaml:1  Ready")
    assert json.loads(reconcile("history", "bert", "-o", "json").out)["history"] == [entry]


@pytest.mark.parametrize("command", ["suspend", "resume", "retry"])
def test_an_order_is_given_and_the_nodes_sentence_printed(
    fake: FakeNode, reconcile: Run, command: str
) -> None:
    fake.answers[command] = lambda question: {"model_id": "bert", "message": "bert: done"}
    done = reconcile(command, "bert", "desired")
    assert (done.code, done.out) == (0, "bert: done\n")
    assert fake.questions(command) == [{"model_id": "bert"}]
    assert json.loads(reconcile(command, "bert", "-o", "json").out)["message"] == "bert: done"


@pytest.mark.parametrize("command", ["explain", "history", "suspend", "resume", "retry"])
def test_an_unknown_id_is_an_error_in_the_nodes_words(
    fake: FakeNode, reconcile: Run, command: str
) -> None:
    fake.answers[command] = refuses
    done = reconcile(command, "brt")
    assert (done.code, done.out) == (2, "")
    assert done.err == "the node has no model 'brt': did you mean 'bert'?\n"


def test_a_node_that_ends_in_the_middle_is_said_to_have(fake: FakeNode, reconcile: Run) -> None:
    fake.answers["explain"] = lambda question: b'{"model_id": "be'
    done = reconcile("explain", "bert")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("the node that serves desired (process ")
    assert "ended before it had answered" in done.err
    assert done.err.endswith("to start it again: splitlearn-manager reconcile run desired\n")


# wait


def test_wait_looks_first_and_ends_when_it_is_reached(fake: FakeNode, reconcile: Run) -> None:
    done = reconcile("wait", "--for", "ready", "minilm")
    assert (done.code, done.out, done.err) == (0, "minilm: ready\n", "")
    assert [q.name for q in fake.asked] == ["status", "look", "status"]
    assert reconcile("wait", "--for", "gone", "gpt2").out == "gpt2: gone\n"
    fake.models = [model("minilm")]
    assert reconcile("wait").out == "1 model: ready\n"
    assert reconcile("wait", "--for", "synced", "-o", "json").code == 0


def test_wait_goes_on_until_something_has_changed(fake: FakeNode, reconcile: Run) -> None:
    fake.models = [model("bert", phase="Loading", observed_generation=None)]

    def changed(question: Question) -> Mapping[str, object]:
        fake.models = [model("bert")]
        return {"turn": 2}

    fake.answers["wait_change"] = changed
    assert reconcile("wait", "bert").code == 0
    assert fake.questions("wait_change") == [{"turn": 1.0, "wait_s": 30.0}]


def test_wait_that_takes_too_long_exits_1_and_says_what_is_left(
    fake: FakeNode, reconcile: Run
) -> None:
    fake.models = [model("bert", phase="Pending", reason="MaxModels", message="5 are loaded")]
    fake.models[0]["observed_generation"] = None
    done = reconcile("wait", "--timeout", "0.05")
    assert (done.code, done.out) == (1, "")
    assert done.err == "not ready within 0.05 s:\n  bert: it is Pending (MaxModels: 5 are loaded)\n"
    data = json.loads(reconcile("wait", "--timeout", "0", "-o", "json").out)
    assert (data["for"], data["outcome"]) == ("ready", "timeout")


def test_wait_for_what_cannot_be_exits_2_and_says_why(fake: FakeNode, reconcile: Run) -> None:
    done = reconcile("wait", "--for", "synced")
    assert (done.code, done.out) == (2, "")
    assert done.err == "cannot become synced as things are:\n  bert: LoadFailed: it raised\n"
    fake.answers["explain"] = refuses
    done = reconcile("wait", "brt")
    assert done.code == 2
    assert lines_of(done.err) == [
        "cannot become ready as things are:",
        "  brt: no file declares it",
        "  the node has no model 'brt': did you mean 'bert'?",
    ]


def test_a_state_that_passes_at_once_does_not_end_a_wait(fake: FakeNode, reconcile: Run) -> None:
    """Seen to fail when a failed load that was about to be tried again was taken for the end."""

    def changed(question: Question) -> Mapping[str, object]:
        fake.models = [model("bert")]
        return {"turn": 2}

    fake.answers["wait_change"] = changed
    assert reconcile("wait", "bert").code == 0


def test_a_node_whose_loop_is_stuck_ends_a_wait(fake: FakeNode, reconcile: Run) -> None:
    def stuck(question: Question) -> Mapping[str, object]:
        raise SplitlearnError("the node has not ended a look", reason="LoopStuck")

    fake.answers["look"] = stuck
    done = reconcile("wait")
    assert (done.code, done.err) == (2, "the node has not ended a look\n")


def test_gone_needs_to_be_told_what(fake: FakeNode, reconcile: Run) -> None:
    done = reconcile("wait", "--for", "gone")
    assert done.code == 2
    assert done.err == "--for gone: expected the ids of the models that are to go\n"


# Mistakes of whoever types.


def test_a_misspelt_command_is_told_which_may_be_meant(here: Path, reconcile: Run) -> None:
    done = reconcile("statsu")
    assert (done.code, done.out) == (2, "")
    assert done.err == ("'statsu' is neither a command nor a directory; did you mean `status`?\n")
    assert "commands: run, once, plan," in reconcile("zzz").err
    (here / "bert.yaml").touch()
    assert reconcile("bert.yaml").err == (
        "bert.yaml: expected a command or a directory of YAML files, got a file\n"
    )


def test_a_file_after_a_directory_of_its_name_is_no_command(here: Path, reconcile: Run) -> None:
    done = reconcile("./absent")
    assert (done.code, done.err) == (2, "absent: there is no such directory\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain"],
        ["wait", "--for", "happy"],
        ["status", "-o", "csv"],
        ["status", "--bogus"],
        ["apply", "--timeout", "-1"],
        ["apply", "--timeout", "soon"],
    ],
)
def test_what_is_not_understood_exits_2_with_the_usage(
    fake: FakeNode, reconcile: Run, arguments: list[str]
) -> None:
    done = reconcile(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: reconcile" in done.err
    assert "Error" in done.err


def test_ctrl_c_exits_130_and_says_nothing(
    fake: FakeNode, reconcile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("splitlearn_manager.cli.node_commands.find_node", interrupted)
    done = reconcile("status")
    assert (done.code, done.out, done.err) == (130, "", "")


# what is printed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_locale_has_no_character_for_ends_no_command(here: Path, encoding: str) -> None:
    (here / "caf\udce9.yaml").write_text("model_id: 5\nmodel_path: \N{SNOWMAN}\n")

    def validated(output: str) -> str:
        done = subprocess.run(
            [*COMMAND, "validate", ".", "-o", output],
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr) == (2, b"")
        return done.stdout.decode(encoding)

    place = "caf\\udce9.yaml:1:11  model_id: expected text, got 5"
    assert place in validated("table")
    for data in (json.loads(validated("json")), YAML(typ="safe").load(validated("yaml"))):
        assert [p["file"] for p in data["problems"]] == ["caf\\udce9.yaml"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("output", "unbuffered"), [("table", ""), ("table", "1"), ("json", "1"), ("yaml", "")]
)
def test_what_cannot_be_written_is_an_error(here: Path, output: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "validate", ".", "-o", output],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert done.stderr == "the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("command", "code"), [("validate", 0), ("wait", 2), ("plan", 0)])
def test_closed_outputs_change_no_exit_code(here: Path, command: str, code: int) -> None:
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    assert subprocess.run([*closed, *COMMAND, command, "."], timeout=60).returncode == code


def test_names_and_messages_move_no_cursor_and_break_no_line(
    fake: FakeNode, reconcile: Run, here: Path
) -> None:
    name = "x\x1b[31m\ny\u202ez.yaml"
    shown = "x␛[31m␊y\N{REPLACEMENT CHARACTER}z.yaml"
    (here / name).write_text("model_id: 5\nmodel_path: a\n")
    done = reconcile("validate", ".")
    assert f"✗ {shown}:1:11  model_id: expected text, got 5\n" in done.out
    fake.models = [model("bert", **{**FAILED, "message": "\x1b]0;title\x07 raised"})]
    done = reconcile("wait", "bert")
    assert done.code == 2
    assert done.err.splitlines()[-1] == "  bert: LoadFailed: ␛]0;title␇ raised"
