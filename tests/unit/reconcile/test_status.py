"""Phase, sync, health and conditions of a model, from the facts of one moment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.status import (
    EVENTS_KEPT,
    Facts,
    Health,
    Phase,
    StatusBook,
    Sync,
    conditions_of,
    health_of,
    phase_of,
    sync_of,
)
from support.fakes import model

OLD = ModelSpec.of(model("m"), weights="w0", generation=1)
NEW = ModelSpec.of(model("m", trusted=True), weights="w0", generation=2)


def wanted(spec: ModelSpec = NEW) -> Wanted:
    return Wanted(spec, 10.0, ("cpu",), 5.0, source="m.yaml")


def view(
    state: State, spec: ModelSpec = NEW, owner: Owner = Owner.DIRECTORY, *, warmed: bool = True
) -> InstanceView:
    return InstanceView(
        key=f"m#{spec.generation}",
        model_id="m",
        owner=owner,
        state=state,
        spec=spec,
        device="cpu",
        reserved_mb=10.0,
        measured_mb=10.0,
        leases=0,
        last_used_s=1.0,
        loading_since_s=0.0,
        ready_since_s=1.0,
        drain_overdue=False,
        notes=("a note",),
        warmed=warmed,
        requests=3,
        errors=1,
    )


NOTHING = Facts(
    model_id="m",
    wanted=wanted(),
    views=(),
    attempt=None,
    parked=False,
    waiting=None,
    held="",
    source_available=True,
)
ATTEMPT = Attempt(NEW, 1, 9.0, "LoadFailed", "it is broken")
RETRY = Waiting("m", "LoadFailed", "it is broken", 9.0, failed=True)
TOO_LARGE = Waiting("m", "OverMemoryLimit", "model 'm' takes 10 MB", failed=True)
NO_ROOM = Waiting("m", "InsufficientMemory", "needs 10 MB on cpu")

SITUATIONS = {
    "waits for room": (
        replace(NOTHING, waiting=NO_ROOM),
        (Phase.PENDING, Sync.OUT_OF_SYNC, Health.MISSING),
    ),
    "loads": (
        replace(NOTHING, views=(view(State.LOADING),)),
        (Phase.LOADING, Sync.OUT_OF_SYNC, Health.PROGRESSING),
    ),
    "serves": (
        replace(NOTHING, views=(view(State.READY),)),
        (Phase.READY, Sync.SYNCED, Health.HEALTHY),
    ),
    "is updated by surge": (
        replace(NOTHING, views=(view(State.READY, OLD), view(State.LOADING))),
        (Phase.UPDATING, Sync.OUT_OF_SYNC, Health.PROGRESSING),
    ),
    "is updated by recreate": (
        replace(NOTHING, views=(view(State.UNLOADING, OLD),)),
        (Phase.UPDATING, Sync.OUT_OF_SYNC, Health.PROGRESSING),
    ),
    "old one drains after a surge": (
        replace(NOTHING, views=(view(State.UNLOADING, OLD), view(State.READY))),
        (Phase.READY, Sync.SYNCED, Health.HEALTHY),
    ),
    "is being evicted": (
        replace(NOTHING, views=(view(State.UNLOADING),), parked=True),
        (Phase.EVICTED, Sync.OUT_OF_SYNC, Health.SUSPENDED),
    ),
    "was evicted": (
        replace(NOTHING, parked=True),
        (Phase.EVICTED, Sync.OUT_OF_SYNC, Health.SUSPENDED),
    ),
    "failed and waits for its retry": (
        replace(NOTHING, attempt=ATTEMPT, waiting=RETRY),
        (Phase.FAILED, Sync.OUT_OF_SYNC, Health.DEGRADED),
    ),
    "is sure to fail": (
        replace(NOTHING, waiting=TOO_LARGE),
        (Phase.FAILED, Sync.OUT_OF_SYNC, Health.DEGRADED),
    ),
    "failed in another version": (
        replace(NOTHING, attempt=replace(ATTEMPT, spec=OLD)),
        (Phase.PENDING, Sync.OUT_OF_SYNC, Health.MISSING),
    ),
    "serves the old version after a failed update": (
        replace(NOTHING, views=(view(State.READY, OLD),), attempt=ATTEMPT, waiting=RETRY),
        (Phase.READY, Sync.OUT_OF_SYNC, Health.DEGRADED),
    ),
    "serves, and its new limit does not hold": (
        replace(NOTHING, views=(view(State.READY, OLD),), waiting=TOO_LARGE),
        (Phase.READY, Sync.OUT_OF_SYNC, Health.DEGRADED),
    ),
    "serves while its file is invalid": (
        replace(NOTHING, views=(view(State.READY),), held="m.yaml is invalid"),
        (Phase.READY, Sync.UNKNOWN, Health.HEALTHY),
    ),
    "serves while the directory is away": (
        replace(NOTHING, views=(view(State.READY),), source_available=False),
        (Phase.READY, Sync.UNKNOWN, Health.HEALTHY),
    ),
    "is declared no more": (
        replace(NOTHING, wanted=None, views=(view(State.UNLOADING),)),
        (Phase.TERMINATING, Sync.OUT_OF_SYNC, Health.PROGRESSING),
    ),
    "was loaded through the Python API": (
        replace(NOTHING, wanted=None, views=(view(State.READY, owner=Owner.API),)),
        (Phase.READY, Sync.SYNCED, Health.HEALTHY),
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_situation_has_its_phase_sync_and_health(situation: str) -> None:
    facts, expected = SITUATIONS[situation]
    assert (phase_of(facts), sync_of(facts), health_of(facts)) == expected


CONDITIONS = {
    "waits for room": [
        ("Accepted", "True", "SpecAccepted", "generation 2"),
        ("Synced", "False", "InsufficientMemory", "needs 10 MB on cpu"),
        ("Ready", "False", "InsufficientMemory", "needs 10 MB on cpu"),
    ],
    "serves": [
        ("Accepted", "True", "SpecAccepted", "generation 2"),
        ("Synced", "True", "UpToDate", ""),
        ("Ready", "True", "Serving", "generation 2 on cpu"),
        ("Warmed", "True", "WarmedUp", "a note"),
    ],
    "serves the old version after a failed update": [
        ("Accepted", "True", "SpecAccepted", "generation 2"),
        ("Synced", "False", "UpdateFailed", "LoadFailed: it is broken"),
        ("Ready", "False", "OlderGenerationServes", "generation 1 serves"),
        ("Warmed", "True", "WarmedUp", "a note"),
    ],
    "serves while its file is invalid": [
        ("Accepted", "False", "KeptLastGood", "m.yaml is invalid; generation 2 stays"),
        ("Synced", "Unknown", "Ready", ""),
        ("Ready", "True", "Serving", "generation 2 on cpu"),
        ("Warmed", "True", "WarmedUp", "a note"),
    ],
    "serves while the directory is away": [
        ("Accepted", "Unknown", "SourceUnavailable", "generation 2 stays in force"),
        ("Synced", "Unknown", "Ready", ""),
        ("Ready", "True", "Serving", "generation 2 on cpu"),
        ("Warmed", "True", "WarmedUp", "a note"),
    ],
    "is sure to fail": [
        ("Accepted", "True", "SpecAccepted", "generation 2"),
        ("Synced", "False", "OverMemoryLimit", "model 'm' takes 10 MB"),
        ("Ready", "False", "OverMemoryLimit", "model 'm' takes 10 MB"),
    ],
    "is declared no more": [
        ("Accepted", "False", "NotDeclared", "no file declares it"),
        ("Synced", "False", "Terminating", ""),
        ("Ready", "False", "Terminating", ""),
    ],
    "was loaded through the Python API": [
        ("Accepted", "True", "LoadedThroughApi", ""),
        ("Synced", "True", "UpToDate", ""),
        ("Ready", "True", "Serving", "generation 2 on cpu"),
        ("Warmed", "True", "WarmedUp", "a note"),
    ],
}


@pytest.mark.parametrize("situation", CONDITIONS)
def test_each_situation_has_its_conditions(situation: str) -> None:
    assert list(conditions_of(SITUATIONS[situation][0])) == CONDITIONS[situation]


def test_a_model_that_was_not_warmed_up_says_why() -> None:
    facts = replace(NOTHING, views=(view(State.READY, warmed=False),))
    assert conditions_of(facts)[-1] == ("Warmed", "False", "NotWarmedUp", "a note")
    silent = replace(facts, views=(replace(facts.views[0], notes=()),))
    assert conditions_of(silent)[-1] == ("Warmed", "False", "NotWarmedUp", "warmup is off")


class Wall:
    """Unix time, as the test says."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def since(book: StatusBook, kind: str) -> float:
    conditions = book.published["m"]["conditions"]
    assert isinstance(conditions, list)
    return next(float(c["since"]) for c in conditions if c["type"] == kind)


def test_since_is_when_the_status_last_changed_and_not_when_it_was_last_looked_at() -> None:
    wall = Wall()
    book = StatusBook(wall)
    book.publish([SITUATIONS["loads"][0]], 0.0)
    wall.seconds = 200.0
    book.publish([SITUATIONS["waits for room"][0]], 0.0)
    assert since(book, "Ready") == 100.0, "another reason, the same status"
    wall.seconds = 300.0
    book.publish([SITUATIONS["serves"][0]], 0.0)
    wall.seconds = 400.0
    book.publish([SITUATIONS["serves"][0]], 0.0)
    assert since(book, "Ready") == 300.0
    assert since(book, "Accepted") == 100.0


def test_equal_events_in_a_row_are_counted_and_only_the_latest_are_kept() -> None:
    wall = Wall()
    book = StatusBook(wall)
    for wall.seconds in (1.0, 2.0, 3.0):
        book.record("m", "LoadFailed", "it is broken")
    book.record("m", "Loaded", "10 MB")
    book.record("m", "LoadFailed", "it is broken")
    book.publish([NOTHING], 0.0)
    assert book.published["m"]["events"] == [
        {"at": 3.0, "reason": "LoadFailed", "message": "it is broken", "count": 3},
        {"at": 3.0, "reason": "Loaded", "message": "10 MB", "count": 1},
        {"at": 3.0, "reason": "LoadFailed", "message": "it is broken", "count": 1},
    ]
    for number in range(EVENTS_KEPT + 5):
        book.record("m", "Adjusted", str(number))
    book.publish([NOTHING], 0.0)
    events = book.published["m"]["events"]
    assert isinstance(events, list)
    assert [event["message"] for event in events] == [str(n) for n in range(5, EVENTS_KEPT + 5)]


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    wall = Wall()
    book = StatusBook(wall)
    book.record("m", "Loaded", "10 MB")
    book.publish([SITUATIONS["serves"][0]], 0.0)
    book.publish([], 0.0)
    assert not book.published
    assert not book.phases
    wall.seconds = 500.0
    book.publish([SITUATIONS["serves"][0]], 0.0)
    assert book.published["m"]["events"] == []
    assert since(book, "Ready") == 500.0


def test_what_is_published_names_generations_reason_and_next_retry() -> None:
    book = StatusBook(Wall())
    facts, _ = SITUATIONS["serves the old version after a failed update"]
    book.publish([facts], now_s=7.5)
    shown = book.published["m"]
    assert (shown["generation"], shown["observed_generation"]) == (2, 1)
    assert (shown["reason"], shown["message"]) == ("LoadFailed", "it is broken")
    assert shown["next_retry_s"] == 1.5
    assert (shown["source"], shown["device"], shown["memory_mb"]) == ("m.yaml", "cpu", 10.0)
    assert (shown["requests"], shown["errors"], shown["in_flight"]) == (3, 1, 0)
    book.publish([facts], now_s=60.0)
    assert book.published["m"]["next_retry_s"] == 0.0


def test_a_failed_model_whose_retry_awaits_its_turn_still_says_why_it_failed() -> None:
    turn = Waiting("m", "AwaitingTurn", "2 models may be loaded at a time")
    book = StatusBook(Wall())
    book.publish([replace(NOTHING, attempt=ATTEMPT, waiting=turn)], 0.0)
    assert book.published["m"]["phase"] == "Failed"
    assert book.published["m"]["reason"] == "LoadFailed"
