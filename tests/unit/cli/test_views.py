"""What people see: tables, explanations, the prune guard; from what a node says, without a node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.text import Text
from ruamel.yaml import YAML

from splitlearn_manager.cli.guard_view import guard_lines
from splitlearn_manager.cli.render import (
    Output,
    clock_time,
    columns,
    duration,
    print_data,
    wrapped,
)
from splitlearn_manager.cli.status_view import (
    event_lines,
    model_lines,
    models_lines,
    node_lines,
    summary_lines,
)
from splitlearn_manager.cli.story_view import explain_lines, history_lines
from support.fake_node import NOW, condition, model, node

WIDE = 10_000
DIRECTORY = Path("desired")
LOAD_FAILED = "nets:bert raised ValueError: no; it is tried again at 12:00:08"
FAILED = {
    "phase": "Failed",
    "sync": "OutOfSync",
    "health": "Degraded",
    "observed_generation": None,
    "memory_mb": None,
    "reserved_mb": 0.0,
    "device": None,
    "phase_since": NOW - 12,
    "conditions": [
        condition("Synced", "False", "LoadFailed", LOAD_FAILED),
        condition("Ready", "False", "LoadFailed", LOAD_FAILED),
    ],
}


def shown(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


# The table of models.


def test_the_table_has_a_line_a_model_and_why_below_those_that_are_not_well() -> None:
    lines = models_lines(
        [model("bert", **FAILED), model("minilm", generation=4, line=12)], NOW, WIDE
    )
    assert shown(lines) == [
        "  model    phase    sync        health     gen     memory      since   from",
        "  bert     Failed   OutOfSync   Degraded   1       –           12s     bert.yaml:1",
        f"      LoadFailed: {LOAD_FAILED}",
        "  minilm   Ready    Synced      Healthy    1 → 4   87 MB cpu   2h      minilm.yaml:12",
    ]


def test_a_held_and_failing_model_says_both_and_the_same_thing_once() -> None:
    held = "gpt2.yaml:7:16  priority: expected an integer; correct the file"
    conditions = [
        condition("Accepted", "False", "KeptLastGood", held),
        condition("Synced", "False", "KeptLastGood", held),
        condition("Ready", "False", "OutOfMemory", "too large"),
    ]
    lines = models_lines([model("gpt2", **{**FAILED, "conditions": conditions})], NOW, WIDE)
    assert shown(lines)[2:] == ["      OutOfMemory: too large", f"      KeptLastGood: {held}"]


def test_what_the_prune_guard_holds_is_told_once_for_all_models_of_the_table() -> None:
    long = "no file declares it, but 3 of 4 models would be unloaded at once"
    conditions = [condition("Accepted", "False", "PruneGuard", long)]
    held = model("bert", sync="OutOfSync", conditions=conditions)
    assert shown(models_lines([held], NOW, WIDE))[2:] == [
        "      PruneGuard: no file declares it, and the prune guard holds it (see below)"
    ]
    assert f"  PruneGuard: {long}" in shown(model_lines(held, NOW, WIDE))


def test_a_narrow_terminal_leaves_out_columns_and_breaks_reasons_but_never_a_row() -> None:
    models = [model("a-model-with-a-name", **FAILED), model("minilm")]
    for width in (100, 80, 70, 60, 50):
        lines = shown(models_lines(models, NOW, width))
        assert all(len(line) <= width for line in lines), (width, lines)
        assert lines[0].split()[:2] == ["model", "phase"]
    full = " ".join(shown(models_lines(models, NOW, 110))[0].split())
    assert full == "model phase sync health gen memory since from"


def test_a_load_shows_what_is_reserved_for_it() -> None:
    loading = model("bert", phase="Loading", memory_mb=None, reserved_mb=412.0)
    assert "≤ 412 MB cpu" in shown(models_lines([loading], NOW, WIDE))[1]


def test_a_node_without_models_says_so() -> None:
    assert shown(models_lines([], NOW, WIDE)) == ["  no models"]


def test_a_model_of_the_python_api_has_no_file() -> None:
    mine = model("mine", owner="api", source="", line=None)
    assert shown(models_lines([mine], NOW, WIDE))[1].endswith("Python API")


# One model.


def test_a_model_is_told_with_its_conditions_and_latest_events() -> None:
    events = [
        {"at": NOW - n, "reason": "Loaded", "message": f"{n}", "count": 1} for n in range(20, 0, -1)
    ]
    lines = shown(
        model_lines(
            model(
                "minilm",
                priority=3,
                pinned=True,
                attempts=2,
                conditions=[condition("Ready", "True", "Serving", "generation 1 on cpu")],
                events=events,
            ),
            NOW,
            WIDE,
        )
    )
    assert lines[:9] == [
        "minilm   Ready · Synced · Healthy",
        "  generation     1",
        "  declared in    minilm.yaml:1",
        "  memory         87 MB cpu",
        "  endpoint       minilm, priority 3, pinned",
        "  requests       12, 0 failed, 0 running",
        "  failed loads   2 of this version",
        "  conditions",
        "    Ready   True   60s   Serving   generation 1 on cpu",
    ]
    assert lines[9] == "  latest events"
    assert len(lines) == 20
    assert lines[-1].endswith("Loaded   1")


def test_a_model_says_what_it_measured_and_what_was_estimated_side_by_side() -> None:
    def sizes(**keys: object) -> list[str]:
        lines = shown(model_lines(model("minilm", **keys), NOW, WIDE))
        return [" ".join(line.split()) for line in lines if line.split()[0] in _SIZES]

    assert sizes(memory_mb=112.4, weights_mb=87.0, activations_mb=25.4, estimated_mb=86.6) == [
        "memory 112 MB cpu",
        "measured 87 MB of weights, 25 MB of activations for its largest batch",
        "estimated 87 MB, before it was loaded",
    ]
    assert sizes(memory_mb=87.0, weights_mb=87.0, activations_mb=None, estimated_mb=None) == [
        "memory 87 MB cpu",
        "measured 87 MB of weights; what a forward takes was not measured",
    ]
    assert sizes(memory_mb=None, reserved_mb=0.0, estimated_mb=90.0) == [
        "memory –",
        "estimated 90 MB, before it was loaded",
    ]


_SIZES = ("memory", "measured", "estimated")


def test_an_event_that_was_repeated_says_how_often() -> None:
    event = {"at": NOW, "model_id": "bert", "reason": "LoadFailed", "message": "no", "count": 3}
    (line,) = shown(event_lines([event], NOW))
    assert line.split("   ")[1:] == ["bert", "LoadFailed", "no", "(3 times)"]


# The node.


def test_the_node_says_what_it_serves_and_where() -> None:
    answer = {"node": node(), "loop_alive": True}
    assert shown(node_lines(answer, DIRECTORY, NOW, WIDE)) == [
        f"  node      /srv/models, process {node()['process_id']} for 3d, version 0.1.0",
        "  serves    gRPC 127.0.0.1:50051, HTTP 127.0.0.1:8000",
        "  models    1 Ready; at most 5 in memory",
        "  memory    cpu 87 of 18,432 MB",
        "  changes   seen by inotify",
        "  state     kept in /var/lib/splitlearn",
    ]


def test_all_that_is_wrong_with_the_node_is_said() -> None:
    about = node(
        conditions=[
            condition("SourceAvailable", "False", "SourceUnavailable", "/srv/models is away"),
            condition("Watching", "False", "Polling", "no inotify watches are left"),
            condition("StateKept", "False", "StateNotKept", "the disk is full"),
            condition("PruneGuard", "True", "AwaitsConfirmation", "not repeated here"),
            condition("RestartRequired", "True", "SettingsChanged", "server.yaml has a new port"),
            condition("Settled", "False", "InProgress", "not a fault"),
        ],
        problems=[
            {"file": "a.yaml", "line": 3, "column": None, "key": None, "message": "is empty"}
        ],
        prune_guard={"digest": "3f1c0a9be2d4", "model_ids": ["bert", "gpt2"], "managed": 3},
        settled=False,
    )
    lines = shown(node_lines({"node": about, "loop_alive": False}, DIRECTORY, NOW, WIDE))
    assert "  changes   seen by inotify; not settled at the moment" in lines
    assert [line for line in lines if line.startswith("✗")] == [
        "✗ the loop has not ended a turn for long: what is above may be outdated; see its log",
        "✗ SourceUnavailable: /srv/models is away",
        "✗ Polling: no inotify watches are left",
        "✗ StateNotKept: the disk is full",
        "✗ SettingsChanged: server.yaml has a new port",
        "✗ a.yaml:3  is empty   (left out until it is corrected)",
        "✗ prune guard: no file declares 2 of 3 models any more. All of them stay until you confirm "
        "that they are to go:",
    ]


def test_each_problem_says_what_happens_meanwhile() -> None:
    problems = [
        {"file": file, "line": 3, "column": None, "key": None, "message": "is empty"}
        for file in ("bert.yaml", "new.yaml", "server.yaml")
    ]
    held = model("bert", held="bert.yaml is invalid", generation=4)
    lines = shown(
        node_lines({"node": node(problems=problems), "models": [held]}, DIRECTORY, NOW, WIDE)
    )
    assert [line for line in lines if line.startswith("✗")] == [
        "✗ bert.yaml:3  is empty   (bert: generation 4 stays)",
        "✗ new.yaml:3  is empty   (left out until it is corrected)",
        "✗ server.yaml:3  is empty   (the settings in force stay)",
    ]


def test_an_answer_of_another_version_is_shown_as_far_as_it_goes() -> None:
    assert node_lines({"node": {"directory": "/srv"}}, DIRECTORY, NOW, WIDE)
    assert models_lines([{"model_id": "bert"}], NOW, WIDE)
    assert model_lines({"model_id": "bert"}, NOW, WIDE)
    assert explain_lines({"model_id": "bert"}, WIDE)
    assert history_lines([{}], NOW)


# The prune guard.


def test_the_prune_guard_shows_what_would_go_and_the_exact_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/splitlearn-manager"])
    lines = shown(guard_lines("3f1c0a9be2d4", ["bert", "gpt2"], 3, Path("my models")))
    assert lines[1] == "    bert, gpt2"
    assert lines[2] == (
        "  if they are to go:   splitlearn-manager reconcile apply 'my models' "
        "--confirm-prune 3f1c0a9be2d4"
    )


def test_of_very_many_that_would_go_some_are_named() -> None:
    lines = shown(guard_lines("d", [f"m{n}" for n in range(1000)], 1001, DIRECTORY))
    assert lines[1].endswith("m19 and 980 more")


# Explanations and history.


def test_an_explanation_is_a_headline_and_labelled_sentences_that_align() -> None:
    explanation = {
        "model_id": "bert",
        "phase": "Pending",
        "headline": "bert waits for memory",
        "because": ["it needs 400 MB", "300 MB are free"],
        "waits_for": "room on cpu",
        "would_help": ["raise memory_quota_mb"],
    }
    assert shown(explain_lines(explanation, WIDE)) == [
        "bert   Pending",
        "  bert waits for memory",
        "  because      it needs 400 MB",
        "               300 MB are free",
        "  waits for    room on cpu",
        "  would help   raise memory_quota_mb",
    ]
    narrow = shown(explain_lines({**explanation, "waits_for": "room " * 20}, 60))
    assert all(len(line) <= 60 for line in narrow)
    assert narrow[4].startswith("  waits for    room room")
    assert narrow[5].startswith("               room room")


def test_an_explanation_leaves_out_what_there_is_not() -> None:
    well = {
        "model_id": "a",
        "phase": "Ready",
        "headline": "a is well",
        "because": [],
        "waits_for": None,
    }
    assert shown(explain_lines(well, WIDE)) == ["a   Ready", "  a is well"]


def test_history_has_a_line_a_version() -> None:
    entry = {
        "generation": 2,
        "at": NOW,
        "what": "priority 0 → 1",
        "source": "a.yaml:1",
        "outcome": "",
    }
    lines = shown(history_lines([entry], NOW))
    assert [line.split() for line in lines] == [
        ["gen", "accepted", "what", "from", "outcome"],
        ["2", clock_time(NOW, NOW), "priority", "0", "→", "1", "a.yaml:1", "–"],
    ]
    assert shown(history_lines([], NOW)) == ["  no version has been accepted yet"]


def test_run_sums_up_in_one_line_a_model() -> None:
    failed = {**FAILED, "reason": "LoadFailed", "message": "no"}
    assert shown(summary_lines([model("bert", **failed), model("minilm")])) == [
        "  bert     Failed                  from bert.yaml     LoadFailed: no",
        "  minilm   Ready    87 MB on cpu   from minilm.yaml",
    ]


# What all share.


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0.4, "0s"),
        (119, "119s"),
        (120, "2m"),
        (3599, "60m"),
        (3600, "1h"),
        (7200, "2h"),
        (90_000, "1d"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_time_of_another_day_has_its_date() -> None:
    assert len(clock_time(NOW, NOW)) == len("12:00:00")
    assert len(clock_time(NOW - 86_400, NOW)) == len("2023-11-13 12:00:00")


def test_columns_align_whatever_is_in_them() -> None:
    rows = columns([("日本", "x"), ("a", Text("y"))])
    assert len({line.cell_len for line in rows}) == 1


def test_lines_are_broken_between_words() -> None:
    lines = shown(wrapped("one two three four five six seven", "  ", 24))
    assert lines == ["  one two three four", "  five six seven"]


def test_json_and_yaml_keep_order_and_letters(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"z": "größe", "a": [{"n": None}]}
    print_data(data, Output.JSON)
    out = capsys.readouterr().out
    assert json.loads(out) == data
    assert out.index('"z"') < out.index('"a"')
    print_data(data, Output.YAML)
    out = capsys.readouterr().out
    assert YAML(typ="safe", pure=True).load(out) == data
    assert out.startswith("z: größe\n")
