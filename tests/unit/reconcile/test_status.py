"""What the status book adds to the facts: since when, events, and data for JSON; and that it is cheap."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.reconcile.status import EVENTS_KEPT, Facts, NodeFacts, StatusBook
from support.status_lab import (
    GUARD,
    INFO,
    MISTAKE,
    NODE,
    NOTHING,
    SERVES,
    SITUATIONS,
    Wall,
    other,
    view,
)


@pytest.fixture
def wall() -> Wall:
    return Wall(100.0)


@pytest.fixture
def book(wall: Wall) -> StatusBook:
    return StatusBook(wall)


def publish(book: StatusBook, *facts: Facts, node: NodeFacts = NODE, now_s: float = 0.0) -> None:
    book.publish(facts, node, now_s)


def shown(book: StatusBook, model_id: str = "m") -> dict[str, object]:
    described = book.describe(model_id)
    assert described is not None
    return described


def since(status: dict[str, object], kind: str) -> float:
    conditions = status["conditions"]
    assert isinstance(conditions, list)
    return next(float(c["since"]) for c in conditions if c["type"] == kind)


def told(book: StatusBook) -> list[tuple[str, str]]:
    events = shown(book)["events"]
    assert isinstance(events, list)
    return [(event["reason"], event["message"]) for event in events]


# Since when.


def test_since_is_when_the_status_last_changed_and_not_when_it_was_last_looked_at(
    book: StatusBook, wall: Wall
) -> None:
    publish(book, SITUATIONS["loads"])
    wall.seconds = 200.0
    publish(book, SITUATIONS["waits for memory"])
    assert since(shown(book), "Ready") == 100.0, "another reason, the same status"
    wall.seconds = 300.0
    publish(book, SERVES)
    wall.seconds = 400.0
    publish(book, SERVES)
    assert since(shown(book), "Ready") == 300.0
    assert since(shown(book), "Accepted") == 100.0


def test_a_phase_has_its_own_since(book: StatusBook, wall: Wall) -> None:
    publish(book, SITUATIONS["loads"])
    wall.seconds = 200.0
    publish(book, replace(SITUATIONS["loads"], held="in doubt"))
    assert shown(book)["phase_since"] == 100.0
    publish(book, SERVES)
    assert shown(book)["phase_since"] == 200.0


def test_a_condition_that_goes_and_comes_back_begins_anew(book: StatusBook, wall: Wall) -> None:
    for wall.seconds, situation in (
        (100.0, "serves while it is suspended"),
        (200.0, "serves"),
        (300.0, "serves while it is suspended"),
    ):
        publish(book, SITUATIONS[situation])
    assert since(shown(book), "Suspended") == 300.0


def test_a_node_condition_has_its_since_too(book: StatusBook, wall: Wall) -> None:
    publish(book)
    wall.seconds = 200.0
    publish(book, node=replace(NODE, state_problem="/state: No space left on device"))
    wall.seconds = 300.0
    publish(book, node=replace(NODE, state_problem="/state: Read-only file system"))
    assert since(book.node(), "StateKept") == 200.0
    assert since(book.node(), "SourceAvailable") == 100.0


# Events.


def test_a_model_that_is_gone_leaves_nothing_behind_but_the_node_s_events(
    book: StatusBook, wall: Wall
) -> None:
    book.record("m", "Loaded", "10 MB")
    publish(book, SERVES)
    book.record("m", "Pruned", "unloaded")
    publish(book)
    assert not book.entries
    assert not book.phases
    assert book.describe("m") is None
    assert book.explain("m") is None
    assert book.models() == []
    events, _ = book.events()
    assert [event["reason"] for event in events] == ["Loaded", "SpecAccepted", "Pruned"]
    wall.seconds = 500.0
    publish(book, SERVES)
    assert told(book) == [("SpecAccepted", "generation 2 from m.yaml:3")]
    assert since(shown(book), "Ready") == 500.0


def test_events_of_a_model_that_never_had_facts_are_not_kept_with_it(book: StatusBook) -> None:
    book.record("stray", "Unloaded", "unloaded")
    publish(book, SERVES)
    publish(book, SERVES, replace(SERVES, model_id="stray"))
    assert [event["reason"] for event in shown(book, "stray")["events"]] == [  # type: ignore[attr-defined]
        "SpecAccepted"
    ]


def test_a_new_generation_and_a_file_that_is_not_followed_are_told_once(book: StatusBook) -> None:
    invalid = SITUATIONS["serves while its file is invalid"]
    for facts in (SERVES, invalid, invalid, SERVES):
        publish(book, facts)
    assert [reason for reason, _ in told(book)] == ["SpecAccepted", "KeptLastGood", "SpecAccepted"]
    assert "correct the file" in told(book)[1][1]


def test_a_doubt_that_passes_by_itself_is_no_event_and_hides_none(book: StatusBook) -> None:
    passing = SITUATIONS["serves while its file is in doubt"]
    invalid = SITUATIONS["serves while its file is invalid"]
    for facts in (SERVES, passing, SERVES):
        publish(book, facts)
    assert [reason for reason, _ in told(book)] == ["SpecAccepted"]
    for facts in (invalid, passing, SERVES):
        publish(book, facts)
    assert [reason for reason, _ in told(book)] == ["SpecAccepted", "KeptLastGood", "SpecAccepted"]


def test_a_wait_that_people_can_end_is_told_when_it_begins(book: StatusBook) -> None:
    waits = SITUATIONS["waits for memory"]
    assert waits.waiting is not None
    still = replace(waits, waiting=replace(waits.waiting, message="needs 10 MB on cpu, 3 are free"))
    for facts in (NOTHING, waits, still, SITUATIONS["waits for a place"]):
        publish(book, facts)
    assert [reason for reason, _ in told(book)] == [
        "SpecAccepted",
        "InsufficientMemory",
        "MaxModels",
    ]


def test_suspending_and_resuming_are_told(book: StatusBook) -> None:
    for facts in (SERVES, SITUATIONS["serves while it is suspended"], SERVES):
        publish(book, facts)
    assert [reason for reason, _ in told(book)] == ["SpecAccepted", "Suspended", "Resumed"]


def test_only_the_latest_events_of_a_model_are_shown_with_it(book: StatusBook) -> None:
    publish(book, SERVES)
    for number in range(EVENTS_KEPT + 5):
        book.record("m", "Adjusted", str(number))
    assert [message for _, message in told(book)] == [str(n) for n in range(5, EVENTS_KEPT + 5)]


# Data.


def test_a_model_is_shown_with_generations_reason_and_next_retry(
    book: StatusBook, wall: Wall
) -> None:
    publish(book, SITUATIONS["serves the old version after a failed update"], now_s=1007.5)
    status = shown(book)
    assert (status["generation"], status["observed_generation"]) == (2, 1)
    assert (status["reason"], status["attempts"]) == ("LoadFailed", 3)
    assert str(status["message"]).startswith("it is broken; generation 1 goes on serving; ")
    assert (status["next_retry_s"], status["next_retry_at"]) == (1.5, 101.5)
    assert (status["source"], status["line"]) == ("m.yaml", 3)
    assert (status["device"], status["memory_mb"], status["reserved_mb"]) == ("cpu", 10.0, 10.0)
    assert (status["requests"], status["errors"], status["in_flight"]) == (3, 1, 0)
    assert (status["endpoint"], status["priority"], status["pinned"]) == ("m", 0, False)
    wall.seconds = 101.0
    assert shown(book)["next_retry_s"] == 0.5, "told at the moment of asking"
    wall.seconds = 160.0
    assert shown(book)["next_retry_s"] == 0.0


def test_a_step_of_the_wall_clock_moves_what_is_shown_of_times_to_come(
    book: StatusBook, wall: Wall
) -> None:
    facts = SITUATIONS["failed and is tried again"]
    publish(book, facts, now_s=1000.0)
    wall.seconds += 3600.0
    publish(book, facts, now_s=1000.0)
    assert shown(book)["next_retry_at"] == 100.0 + 3600.0 + 9.0


def test_a_model_of_the_python_api_shows_the_generation_that_serves(book: StatusBook) -> None:
    publish(book, SITUATIONS["was loaded through the Python API"])
    status = shown(book)
    assert (status["owner"], status["generation"], status["observed_generation"]) == ("api", 2, 2)
    assert (status["source"], status["line"]) == ("", None)


def test_models_are_sorted_by_id(book: StatusBook) -> None:
    publish(book, *(replace(NOTHING, model_id=model_id) for model_id in ("b", "c", "a")))
    assert [status["model_id"] for status in book.models()] == ["a", "b", "c"]


def test_the_node_is_shown_with_its_models_problems_and_guard(book: StatusBook) -> None:
    publish(
        book,
        SERVES,
        replace(NOTHING, model_id="b"),
        node=replace(
            NODE,
            problems=(MISTAKE, Problem("b.yaml", None, None, None, "cannot be read")),
            prune_guard=GUARD,
            conflicts={"x": (SourceRef("a.yaml", 1), SourceRef("b.yaml", 2))},
            suspended=("m",),
            info=replace(INFO, restart_required=("port",)),
        ),
    )
    node = book.node()
    assert node["models"] == {
        "Pending": 1,
        "Loading": 0,
        "Ready": 1,
        "Updating": 0,
        "Evicted": 0,
        "Failed": 0,
        "Terminating": 0,
    }
    assert node["problems"] == [
        {
            "file": "m.yaml",
            "line": 7,
            "column": 16,
            "key": "max_memory_mb",
            "message": 'expected an integer, got "4gb"',
        },
        {"file": "b.yaml", "line": None, "column": None, "key": None, "message": "cannot be read"},
    ]
    assert node["prune_guard"] == {
        "digest": "3f1c0a9be2d4",
        "model_ids": ["a", "b", "m"],
        "managed": 4,
    }
    assert node["conflicts"] == {"x": ["a.yaml:1", "b.yaml:2"]}
    assert (node["suspended"], node["restart_required"]) == (["m"], ["port"])
    devices = {"device": "cpu", "reserved_mb": 900.0, "budget_mb": 1000.0, "limit_mb": 1000.0}
    assert node["devices"] == [devices]
    assert (node["directory"], node["grpc"], node["max_models"]) == ("/desired", INFO.grpc, 2)


def test_before_anything_was_published_there_is_a_node_without_models(book: StatusBook) -> None:
    assert book.models() == []
    assert book.describe("m") is None
    conditions = book.node()["conditions"]
    assert isinstance(conditions, list)
    assert [c["type"] for c in conditions] == [
        "SourceAvailable",
        "Watching",
        "StateKept",
        "PruneGuard",
        "MemoryPressure",
        "RestartRequired",
        "Settled",
    ]


def test_everything_that_is_shown_fits_json(book: StatusBook) -> None:
    publish(
        book,
        *(replace(facts, model_id=f"m{n}") for n, facts in enumerate(SITUATIONS.values())),
        node=replace(NODE, prune_guard=GUARD, problems=(MISTAKE,)),
    )
    json.dumps([book.node(), book.models(), book.events()], allow_nan=False)
    for model_id in book.phases:
        json.dumps(book.explain(model_id), allow_nan=False)


def test_an_explanation_looks_at_the_other_models(book: StatusBook) -> None:
    publish(
        book,
        SITUATIONS["waits for memory"],
        replace(SERVES, model_id="big", views=(other("big", mb=900.0, pinned=True),)),
    )
    explanation = book.explain("m")
    assert explanation is not None
    assert "unpin what is needed less: big (900 MB)" in explanation["would_help"]  # type: ignore[operator]


def test_an_id_in_conflict_that_was_never_accepted_is_explained(book: StatusBook) -> None:
    refs = (SourceRef("a.yaml", 1), SourceRef("b.yaml", 2))
    publish(book, node=replace(NODE, conflicts={"x": refs}))
    explanation = book.explain("x")
    assert explanation is not None
    assert explanation["headline"] == "x is not accepted: it is declared more than once"
    assert book.describe("x") is None


# Cost.


def test_what_has_not_changed_is_not_looked_at_anew(book: StatusBook) -> None:
    first = [replace(NOTHING, model_id=f"m{n}") for n in range(100)]
    publish(book, *first)
    before, phases, revision = dict(book.entries), book.phases, book.revision
    equal = [replace(facts) for facts in first]
    publish(book, *equal)
    assert (book.phases is phases, book.revision) == (True, revision), "nothing is new"
    equal[7] = replace(equal[7], views=(view(State.LOADING),))
    publish(book, *equal)
    assert [m for m, entry in book.entries.items() if entry is not before[m]] == ["m7"]
    assert book.phases is not phases
    assert book.revision == revision + 1


def test_the_revision_follows_the_node_and_models_that_come_and_go(book: StatusBook) -> None:
    seen = [book.revision]
    for facts, node in (
        ((), NODE),
        ((NOTHING,), NODE),
        ((NOTHING,), replace(NODE, settled=False)),
        ((replace(NOTHING, model_id="n"),), replace(NODE, settled=False)),
        ((), NODE),
    ):
        publish(book, *facts, node=node)
        seen.append(book.revision)
    assert seen == sorted(set(seen))
