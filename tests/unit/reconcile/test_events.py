"""Events are kept for each model and for the node, in rings, and can be followed."""

from __future__ import annotations

import pytest

from splitlearn_manager.reconcile.events import EVENTS_KEPT, NODE_EVENTS_KEPT, EventLog
from support.status_lab import Wall


@pytest.fixture
def wall() -> Wall:
    return Wall(1.0)


@pytest.fixture
def log(wall: Wall) -> EventLog:
    return EventLog(wall)


def test_equal_events_in_a_row_are_counted(log: EventLog, wall: Wall) -> None:
    for wall.seconds in (1.0, 2.0, 3.0):
        log.record("m", "LoadFailed", "it is broken")
    log.record("m", "Loaded", "10 MB")
    log.record("m", "LoadFailed", "it is broken")
    assert [(e.at, e.reason, e.count) for e in log.of_model("m")] == [
        (3.0, "LoadFailed", 3),
        (3.0, "Loaded", 1),
        (3.0, "LoadFailed", 1),
    ]


def test_events_of_another_model_in_between_do_not_end_a_row(log: EventLog) -> None:
    for model_id in ("a", "b", "a", "b"):
        log.record(model_id, "LoadFailed", "it is broken")
    found, _ = log.since(0)
    assert [(e.model_id, e.count) for e in found] == [("a", 2), ("b", 2)]


def test_a_follower_sees_every_event_once_and_a_repetition_with_its_count(log: EventLog) -> None:
    log.record("a", "Loading", "loading")
    found, after = log.since(0)
    assert [e.reason for e in found] == ["Loading"]
    assert log.since(after) == ([], after)
    log.record("b", "Loading", "loading")
    log.record("a", "Loading", "loading")
    found, after = log.since(after)
    assert [(e.model_id, e.count) for e in found] == [("b", 1), ("a", 2)]
    assert after == found[-1].serial


def test_one_model_can_be_followed(log: EventLog) -> None:
    log.record("a", "Loading", "loading")
    log.record("b", "Loading", "loading")
    found, after = log.since(0, "a")
    assert [e.model_id for e in found] == ["a"]
    assert log.since(after, "a") == ([], after)


def test_a_serial_of_an_earlier_process_gets_everything(log: EventLog) -> None:
    log.record("a", "Loading", "loading")
    found, after = log.since(4711)
    assert [e.model_id for e in found] == ["a"]
    assert after == 1


def test_the_rings_forget_the_oldest(log: EventLog) -> None:
    for number in range(NODE_EVENTS_KEPT + 5):
        log.record("m", "Adjusted", str(number))
    found, _ = log.since(0)
    last = NODE_EVENTS_KEPT + 4
    assert [found[0].message, found[-1].message, len(found)] == ["5", str(last), NODE_EVENTS_KEPT]
    assert [e.message for e in log.of_model("m")] == [
        str(n) for n in range(last - EVENTS_KEPT + 1, last + 1)
    ]


def test_a_row_that_goes_on_for_ever_takes_the_room_of_one(log: EventLog) -> None:
    log.record("other", "Loaded", "10 MB")
    for _ in range(NODE_EVENTS_KEPT * 2):
        log.record("m", "LoadFailed", "it is broken")
    found, _ = log.since(0)
    assert [(e.model_id, e.count) for e in found] == [("other", 1), ("m", NODE_EVENTS_KEPT * 2)]


def test_what_happened_to_a_forgotten_model_stays_in_the_node_s_ring(log: EventLog) -> None:
    log.record("a", "Pruned", "unloaded")
    log.record("b", "Loaded", "10 MB")
    log.forget_all_but({"b"})
    assert log.of_model("a") == ()
    assert len(log.of_model("b")) == 1
    assert [e.model_id for e in log.since(0)[0]] == ["a", "b"]
