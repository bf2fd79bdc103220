"""Room is made for one load after the other, as long as loads are short, and whoever waited is answered."""

from __future__ import annotations

from splitlearn_manager.core.events import EventKind
from splitlearn_manager.reconcile.actions import SOON_S
from support.traffic import MB, Traffic


def _two_are_asked_for(*, loads_s: float) -> tuple[Traffic, list[float]]:
    """Two of four resident models make room for two others; when their loads began."""
    traffic = Traffic(budget_mb=4 * MB, loads_s=loads_s)
    traffic.declare("a", "b", "c", "d", "x", "y")
    traffic.pass_time(20.0)
    traffic.ask("x")
    traffic.ask("y")
    traffic.pass_time(10.0)
    return traffic, [e.at_s for e in traffic.of_kind(EventKind.LOADING) if e.model_id in ("x", "y")]


def test_while_one_model_takes_a_place_the_others_go_on_serving() -> None:
    traffic, (first_s, second_s) = _two_are_asked_for(loads_s=0.3)
    assert second_s >= first_s + 0.3
    served_s = next(e.at_s for e in traffic.of_kind(EventKind.LOADED) if e.model_id == "x")
    assert sum(e.at_s < served_s for e in traffic.evictions()) == 1


def test_beside_a_load_that_is_not_over_soon_room_is_made_for_the_next_one() -> None:
    traffic, (first_s, second_s) = _two_are_asked_for(loads_s=5.0)
    assert first_s + SOON_S <= second_s < first_s + SOON_S + 0.1
    assert all(a.began_s is not None for a in traffic.asked)


def test_a_model_is_not_parked_before_those_that_waited_for_it_have_come_to_it() -> None:
    """Seen to fail: it was loaded and parked all the time, and the request never answered."""
    traffic = Traffic(wakes_s=0.1)
    traffic.declare("m", keep_alive_s=0.05)
    traffic.pass_time(5.0)
    traffic.ask("m")
    traffic.pass_time(5.0)
    (asked,) = traffic.asked
    assert asked.waited
    assert asked.began_s is not None
    assert len(traffic.of_kind(EventKind.LOADING)) == 2
    assert traffic.loop.status.phases["m"] == "Evicted"
