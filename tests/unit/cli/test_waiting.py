"""When what `wait` and `apply` wait for is reached, and when it cannot be."""

from __future__ import annotations

import pytest

from splitlearn_manager.cli.waiting import Goal, Outcome, Report, judge, judge_apply
from support.fake_node import NOW, model, node

PROBLEM = {
    "file": "gpt2.yaml",
    "line": 7,
    "column": 16,
    "key": "max_memory_mb",
    "message": 'expected an integer, got "4gb"',
}
GUARD = {"digest": "3f1c0a9be2d4", "model_ids": ["bert", "gpt2"], "managed": 3}

LOADING = {"phase": "Loading", "sync": "OutOfSync", "observed_generation": None}
RETRYING = {
    "phase": "Failed",
    "sync": "OutOfSync",
    "health": "Degraded",
    "observed_generation": None,
    "reason": "LoadFailed",
    "message": "it raised",
    "next_retry_at": NOW + 8,
}
FAILED = {**RETRYING, "next_retry_at": None, "failed_for_good": True}
UPDATING = {"phase": "Updating", "sync": "OutOfSync", "generation": 2}
UPDATE_FAILED = {
    "sync": "OutOfSync",
    "health": "Degraded",
    "generation": 2,
    "reason": "InvalidModel",
    "message": "no model",
    "failed_for_good": True,
}
EVICTED = {
    "phase": "Evicted",
    "sync": "OutOfSync",
    "health": "Suspended",
    "observed_generation": None,
}
HELD = {"sync": "Unknown", "held": "gpt2.yaml:7:16 is invalid"}
SUSPENDED = {"sync": "Unknown", "health": "Suspended", "suspended": True, "held": "suspended"}
SUSPENDED_AWAY = {**EVICTED, **SUSPENDED}


@pytest.mark.parametrize(
    ("state", "ready", "synced", "applied"),
    [
        ({}, Outcome.REACHED, Outcome.REACHED, Outcome.REACHED),
        (LOADING, Outcome.WAITING, Outcome.WAITING, Outcome.WAITING),
        (RETRYING, Outcome.WAITING, Outcome.WAITING, Outcome.WAITING),
        (FAILED, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE),
        (UPDATING, Outcome.WAITING, Outcome.WAITING, Outcome.WAITING),
        (UPDATE_FAILED, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE),
        # By design, and back when it is asked for: neither ready nor in the way of `apply`.
        (EVICTED, Outcome.WAITING, Outcome.WAITING, Outcome.REACHED),
        (HELD, Outcome.REACHED, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE),
        (SUSPENDED, Outcome.REACHED, Outcome.IMPOSSIBLE, Outcome.REACHED),
        (SUSPENDED_AWAY, Outcome.IMPOSSIBLE, Outcome.IMPOSSIBLE, Outcome.REACHED),
    ],
)
def test_where_a_model_stands_decides(
    state: dict[str, object], ready: Outcome, synced: Outcome, applied: Outcome
) -> None:
    report = Report(node(), [model("minilm"), model("bert", **state)])
    assert judge(Goal.READY, report).outcome is ready
    assert judge(Goal.SYNCED, report).outcome is synced
    assert judge_apply(report).outcome is applied


@pytest.mark.parametrize("state", [{}, LOADING, FAILED, HELD])
def test_while_a_file_has_yet_to_settle_nothing_is_decided(state: dict[str, object]) -> None:
    """Seen to fail when `wait` typed after an edit was satisfied with the version before it."""
    report = Report(node(pending=True), [model("bert", **state)])
    assert judge(Goal.READY, report).outcome is Outcome.WAITING
    assert judge(Goal.SYNCED, report).outcome is Outcome.WAITING
    assert judge_apply(report).outcome is Outcome.WAITING


def test_other_models_do_not_matter_to_those_that_are_named() -> None:
    """The node tells of the named ones alone, and says that it is not settled while others load."""
    report = Report(node(settled=False), [model("bert")], named=("bert",))
    assert judge(Goal.READY, report).outcome is Outcome.REACHED


def test_a_model_that_no_file_declares_cannot_become_ready() -> None:
    missing = Report(node(), [], named=("bert",))
    verdict = judge(Goal.READY, missing)
    assert verdict.outcome is Outcome.IMPOSSIBLE
    assert verdict.because == ("bert: no file declares it",)


def test_a_model_may_be_declared_in_a_file_that_is_not_accepted() -> None:
    broken = Report(node(problems=[PROBLEM]), [], named=("gpt2",))
    assert judge(Goal.READY, broken).because == (
        "gpt2: no file declares it, unless one of those that are not accepted does: gpt2.yaml",
    )
    twice = Report(node(conflicts={"gpt2": ["a.yaml:1", "b.yaml:1"]}), [], named=("gpt2",))
    assert judge(Goal.SYNCED, twice).because == (
        "gpt2: it is declared more than once (a.yaml:1 and b.yaml:1); keep one",
    )


def test_reasons_name_the_model_and_say_what_is_waited_for() -> None:
    states = {"bert": RETRYING, "gpt2": LOADING}
    report = Report(node(), [model(m, **state) for m, state in states.items()])
    assert judge(Goal.READY, report).because == (
        "bert: it is Failed (LoadFailed: it raised)",
        "gpt2: it is Loading",
    )


def test_what_python_loaded_is_waited_for_only_by_name() -> None:
    report = Report(node(), [model("mine", owner="api", **LOADING)])
    assert judge(Goal.READY, report).outcome is Outcome.REACHED
    named = Report(node(), [model("mine", owner="api", **LOADING)], named=("mine",))
    assert judge(Goal.READY, named).outcome is Outcome.WAITING
    assert judge_apply(report).outcome is Outcome.REACHED


def test_gone_is_reached_when_none_of_the_named_is_left() -> None:
    left = Report(node(), [model("bert", phase="Terminating")], named=("bert", "gpt2"))
    assert judge(Goal.GONE, left).because == ("bert: it is Terminating",)
    assert judge(Goal.GONE, Report(node(), [], named=("bert",))).outcome is Outcome.REACHED


def test_what_is_held_back_cannot_go() -> None:
    guarded = Report(node(prune_guard=GUARD), [model("bert")], named=("bert",))
    assert judge(Goal.GONE, guarded).outcome is Outcome.IMPOSSIBLE
    assert "prune guard" in judge(Goal.GONE, guarded).because[0]
    suspended = Report(node(), [model("bert", **SUSPENDED)], named=("bert",))
    assert judge(Goal.GONE, suspended).outcome is Outcome.IMPOSSIBLE


def test_apply_ends_at_the_prune_guard_once_all_else_is_done() -> None:
    held = [model(m, sync="OutOfSync", held="no file declares it") for m in ("bert", "gpt2")]
    done = Report(node(prune_guard=GUARD), [model("minilm"), *held])
    assert judge_apply(done).outcome is Outcome.HELD
    busy = Report(node(prune_guard=GUARD), [model("minilm", **LOADING), *held])
    assert judge_apply(busy).outcome is Outcome.WAITING


def test_apply_is_an_error_while_a_file_is_not_accepted() -> None:
    verdict = judge_apply(Report(node(problems=[PROBLEM]), [model("bert")]))
    assert verdict.outcome is Outcome.IMPOSSIBLE
    assert verdict.because == ('gpt2.yaml:7:16  max_memory_mb: expected an integer, got "4gb"',)


def test_apply_is_an_error_while_the_directory_is_away_and_a_wait_goes_on() -> None:
    away = node(source_available=False, source_message="/srv/models does not exist")
    report = Report(away, [model("bert", sync="Unknown")])
    assert judge_apply(report).because == ("/srv/models does not exist",)
    verdict = judge(Goal.SYNCED, report)
    assert verdict.outcome is Outcome.WAITING
    assert verdict.because == ("bert: /srv/models does not exist",)


def test_what_serves_while_a_newer_generation_is_waited_for_is_told() -> None:
    """Seen: `not ready …: bert: it is Ready`."""
    waits = model("bert", **{**UPDATE_FAILED, "failed_for_good": False})
    verdict = judge(Goal.READY, Report(node(), [waits], ("bert",)))
    assert verdict.outcome is Outcome.WAITING
    assert verdict.because == ("bert: generation 1 serves (InvalidModel: no model)",)


def test_a_suspended_model_is_told_with_the_command_that_lets_it_go_on() -> None:
    verdict = judge(
        Goal.READY, Report(node(), [model("bert", **LOADING, suspended=True)], ("bert",))
    )
    assert verdict.because == ("bert: it is suspended; `resume bert` lets it go on",)
