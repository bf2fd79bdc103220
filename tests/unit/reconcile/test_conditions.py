"""The conditions of a model: what is the matter, what goes on meanwhile, what happens next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.reconcile.actions import Waiting
from splitlearn_manager.reconcile.conditions import (
    conditions_of,
    draining_in_words,
    next_retry_s,
    situation,
)
from support.status_lab import (
    ATTEMPT,
    MISTAKE,
    NO_ROOM,
    NOON,
    NOTHING,
    OLD,
    RETRY,
    SERVES,
    SITUATIONS,
    TERMINAL,
    view,
)

_ACCEPTED = ("Accepted", "True", "SpecAccepted", "generation 2 from m.yaml:3")
_SYNCED = ("Synced", "True", "UpToDate", "generation 2 serves")
_READY = ("Ready", "True", "Serving", "generation 2 on cpu")
_WARMED = ("Warmed", "True", "WarmedUp", "a note")


def _both(reason: str, message: str) -> list[tuple[str, str, str, str]]:
    """Accepted, and neither synced nor ready for this reason."""
    return [_ACCEPTED, ("Synced", "False", reason, message), ("Ready", "False", reason, message)]


CONDITIONS = {
    "comes next": _both("Pending", "it is loaded next"),
    "waits for memory": _both(
        "InsufficientMemory",
        "needs 10 MB on cpu; it is loaded as soon as there is room; `explain m` says what would help",
    ),
    "waits for a place": _both(
        "MaxModels",
        "max_models is 2 and none of the loaded models may be evicted; it is loaded as soon as "
        "there is a place; `explain m` says what would help",
    ),
    "waits for its turn": _both(
        "AwaitingTurn", "2 models may be loaded at a time; it is loaded when its turn comes"
    ),
    "its files are missing": _both(
        "WeightsNotFound",
        "nothing is at /models/m.pt; it is loaded as soon as its files are there and can be read",
    ),
    "loads": _both("Loading", "generation 2 is being loaded on cpu since 11:59:58"),
    "serves": [_ACCEPTED, _SYNCED, _READY, _WARMED],
    "is updated by surge": [
        _ACCEPTED,
        ("Synced", "False", "Updating", "generation 2 is being loaded on cpu since 11:59:58"),
        (
            "Ready",
            "False",
            "OlderGenerationServes",
            "generation 1 serves on cpu until generation 2 has been loaded",
        ),
        _WARMED,
    ],
    "is updated by recreate": _both("Updating", "it is being unloaded; then it is loaded anew"),
    "was evicted": _both("Evicted", "made room"),
    "goes back after a failed update": _both(
        "LoadFailed", "it is broken; generation 1 is being loaded"
    ),
    "failed and is tried again": _both("LoadFailed", "it is broken; it is tried again at 12:00:09"),
    "failed and waits for its turn": _both(
        "LoadFailed", "it is broken; it is tried again when its turn comes"
    ),
    "failed for good": _both(
        "UntrustedCheckpoint",
        "m.pt would run code; it is not tried again before its file or its weights change",
    ),
    "failed too often": _both(
        "RateLimited", "10 loads failed within a minute; it is tried again at 12:00:42"
    ),
    "its load hangs": _both(
        "LoadTimeout",
        "not loaded in 1 s; it is not tried again before that loader returns or the node is "
        "started anew",
    ),
    "serves the old version after a failed update": [
        _ACCEPTED,
        (
            "Synced",
            "False",
            "UpdateFailed",
            "LoadFailed: it is broken; generation 1 goes on serving; it is tried again at 12:00:09",
        ),
        (
            "Ready",
            "False",
            "OlderGenerationServes",
            "generation 1 serves on cpu; generation 2 is not loaded: LoadFailed: it is broken; "
            "it is tried again at 12:00:09",
        ),
        _WARMED,
    ],
    "serves while its file is invalid": [
        (
            "Accepted",
            "False",
            "KeptLastGood",
            'm.yaml:7:16  max_memory_mb: expected an integer, got "4gb"; generation 2 goes on '
            "serving; correct the file",
        ),
        (
            "Synced",
            "Unknown",
            "KeptLastGood",
            "what is declared cannot be told, see Accepted; generation 2 serves",
        ),
        _READY,
        _WARMED,
    ],
    "serves while its file is in doubt": [
        (
            "Accepted",
            "Unknown",
            "InDoubt",
            "m.yaml is still changing; generation 2 goes on serving",
        ),
        (
            "Synced",
            "Unknown",
            "InDoubt",
            "what is declared cannot be told, see Accepted; generation 2 serves",
        ),
        _READY,
        _WARMED,
    ],
    "serves while the directory is away": [
        (
            "Accepted",
            "Unknown",
            "SourceUnavailable",
            "/desired does not exist; generation 2 goes on serving; bring the directory back, "
            "mounted and readable",
        ),
        (
            "Synced",
            "Unknown",
            "SourceUnavailable",
            "what is declared cannot be told, see Accepted; generation 2 serves",
        ),
        _READY,
        _WARMED,
    ],
    "serves while it is in conflict": [
        (
            "Accepted",
            "False",
            "Conflict",
            "declared more than once: a.yaml:1 and m.yaml:3; generation 2 goes on serving; keep "
            "one of them",
        ),
        (
            "Synced",
            "Unknown",
            "Conflict",
            "what is declared cannot be told, see Accepted; generation 2 serves",
        ),
        _READY,
        _WARMED,
    ],
    "serves while the prune guard holds it": [
        (
            "Accepted",
            "False",
            "PruneGuard",
            "no file declares it, but 3 of 4 models would be unloaded at once: to let them go, run "
            "`splitlearn-manager reconcile apply /desired --confirm-prune 3f1c0a9be2d4`; "
            "generation 2 goes on serving; to keep it, put its file back",
        ),
        (
            "Synced",
            "False",
            "PruneGuard",
            "no file declares it, and it is kept; generation 2 serves",
        ),
        _READY,
        _WARMED,
    ],
    "serves while it is suspended": [
        (
            "Accepted",
            "Unknown",
            "Suspended",
            "it is suspended: edits of its file and its removal wait; generation 2 goes on serving; "
            "`resume m` ends that",
        ),
        (
            "Synced",
            "Unknown",
            "Suspended",
            "its file is not followed while it is suspended; generation 2 serves",
        ),
        _READY,
        (
            "Suspended",
            "True",
            "Requested",
            "people asked that it stays as it is; generation 2 goes on serving; `resume m` ends "
            "that",
        ),
        _WARMED,
    ],
    "is declared no more": [
        ("Accepted", "False", "NotDeclared", "no file declares it; it is being unloaded"),
        *(
            (
                kind,
                "False",
                "Terminating",
                "no file declares it; it takes no new requests and is unloaded when 3 running "
                "requests have ended",
            )
            for kind in ("Synced", "Ready")
        ),
    ],
    "was loaded through the Python API": [
        (
            "Accepted",
            "True",
            "LoadedThroughApi",
            "loaded through the Python API; the directory does not touch it",
        ),
        _SYNCED,
        _READY,
        _WARMED,
    ],
    "is taken by the Python API": _both(
        "OwnedByApi",
        "a model of this id was loaded through the Python API; the one from Python goes on "
        "answering; it is loaded from its file once that one is unloaded",
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_situation_has_its_conditions(name: str) -> None:
    assert list(conditions_of(SITUATIONS[name], NOON)) == CONDITIONS[name]


def test_several_mistakes_are_counted_and_the_first_is_shown() -> None:
    facts = replace(SERVES, held="m.yaml is invalid", problems=(MISTAKE, MISTAKE, MISTAKE))
    assert (
        '"4gb" (and 2 more); generation 2 goes on serving' in conditions_of(facts, NOON)[0].message
    )


def test_a_model_that_does_not_serve_says_that_its_last_good_spec_stays() -> None:
    facts = replace(NOTHING, held="m.yaml is invalid", problems=(MISTAKE,))
    assert (
        "; generation 2 stays in force; correct the file" in conditions_of(facts, NOON)[0].message
    )


def test_a_model_that_was_not_warmed_up_says_why() -> None:
    facts = replace(NOTHING, views=(view(State.READY, warmed=False),))
    assert conditions_of(facts, NOON)[-1] == ("Warmed", "False", "NotWarmedUp", "a note")
    silent = replace(facts, views=(replace(facts.views[0], notes=()),))
    assert conditions_of(silent, NOON)[-1] == ("Warmed", "False", "NotWarmedUp", "warmup is off")


def test_ready_is_only_true_of_the_accepted_generation_itself() -> None:
    for facts in SITUATIONS.values():
        ready = next(row for row in conditions_of(facts, NOON) if row.type == "Ready")
        assert (ready.status == "True") == (
            facts.observed_generation is not None and facts.observed_generation == facts.generation
        )


def test_only_a_failed_load_has_a_next_retry() -> None:
    assert next_retry_s(replace(NOTHING, attempt=ATTEMPT, waiting=RETRY)) == 1009.0
    assert next_retry_s(SITUATIONS["failed too often"]) == 1042.0
    assert next_retry_s(SITUATIONS["serves until it is idle"]) is None
    assert next_retry_s(SITUATIONS["failed for good"]) is None
    assert next_retry_s(replace(NOTHING, attempt=ATTEMPT, waiting=RETRY, suspended=True)) is None


def test_a_second_try_that_is_under_way_says_so_beside_what_went_wrong() -> None:
    facts = replace(NOTHING, views=(view(State.LOADING),), attempt=ATTEMPT)
    assert situation(facts, NOON) == "it is broken; generation 2 is being loaded again"


@pytest.mark.parametrize(
    ("leases", "overdue", "words"),
    [
        (0, False, "it is being unloaded"),
        (
            1,
            False,
            "it takes no new requests and is unloaded when 1 running request has ended",
        ),
        (
            2,
            True,
            "it takes no new requests and is unloaded when 2 running requests have ended, which "
            "takes longer than drain_timeout_s already",
        ),
    ],
)
def test_draining_says_what_it_waits_for(leases: int, overdue: bool, words: str) -> None:
    draining = view(State.UNLOADING, OLD, leases=leases, drain_overdue=overdue)
    assert draining_in_words(replace(NOTHING, views=(draining,))) == words


def test_a_time_on_another_day_is_shown_with_its_date() -> None:
    tomorrow = NOON.now_s + 24 * 3600
    assert NOON.clock(tomorrow) == "2026-03-05 12:00:00"
    assert NOON.clock(NOON.now_s + 9) == "12:00:09"
    assert NOON.clock(1e300) == "a time that no calendar has"
    assert "at a time that no calendar has" in situation(
        replace(NOTHING, attempt=ATTEMPT, waiting=replace(RETRY, until_s=1e300)), NOON
    )


def test_a_wait_that_has_nothing_to_add_is_told_as_it_is() -> None:
    facts = replace(NOTHING, waiting=Waiting("m", "SomethingNew", "of which nobody knows"))
    assert situation(facts, NOON) == "of which nobody knows"
    assert situation(NOTHING, NOON) == ""
    assert situation(replace(NOTHING, waiting=NO_ROOM), NOON).startswith(NO_ROOM.message)


def test_what_is_not_tried_again_is_not_said_to_wait_for_its_turn_while_it_drains() -> None:
    """Seen to fail, for as long as a request hangs in a version that was taken back, when it is."""
    draining = view(State.UNLOADING, leases=1)
    facts = replace(
        NOTHING,
        views=(view(State.READY, OLD), draining),
        attempt=TERMINAL,
        waiting=Waiting("m", "Unloading", "an operation on it is under way"),
    )
    assert situation(facts, NOON) == (
        "m.pt would run code; generation 1 goes on serving; it is not tried again before its file or its "
        "weights change"
    )
