"""The ledger between budgets, which are people's, and ceilings, which are what the devices really have."""

from __future__ import annotations

import pytest

from splitlearn_manager.core.ledger import Ceiling, Ledger, LedgerError


def ceiling(mb: float, *, stalled: bool = False) -> Ceiling:
    """One that leaves `mb` MB for models."""
    return Ceiling(total_mb=10_000, others_mb=10_000 - 500 - mb, floor_mb=500, stalled=stalled)


def ledger(ceiling_mb: float | None = None, budget_mb: float = 100) -> Ledger:
    of_cpu = {} if ceiling_mb is None else {"cpu": ceiling(ceiling_mb)}
    return Ledger({"cpu": budget_mb, "cuda:0": 50}, 10, ceilings=of_cpu)


def test_without_a_reading_the_budget_alone_counts() -> None:
    empty = ledger()
    assert empty.limit_mb("cpu") == empty.free_mb("cpu") == 100
    assert empty.pressed == ()
    assert empty.excess_mb("cpu") == 0


@pytest.mark.parametrize(("ceiling_mb", "limit_mb"), [(30, 30), (100, 100), (900, 100), (-70, 0)])
def test_the_smaller_of_budget_and_ceiling_limits_what_is_reserved(
    ceiling_mb: float, limit_mb: float
) -> None:
    full = ledger(ceiling_mb)
    assert full.limit_mb("cpu") == limit_mb
    assert bool(full.shortfall("cpu", limit_mb + 1))
    assert not full.shortfall("cpu", limit_mb)
    with pytest.raises(LedgerError):
        full.reserve("a", "cpu", limit_mb + 1)


def test_a_device_without_a_budget_has_no_room_whatever_is_free_of_it() -> None:
    assert Ledger({}, 10, ceilings={"cpu": ceiling(900)}).limit_mb("cpu") == 0


def test_above_a_ceiling_is_pressure_and_above_a_lowered_budget_is_not() -> None:
    held = ledger(80).reserve("a", "cpu", 70)
    assert held.pressed == ()
    lowered = held.with_limits({"cpu": 10}, 10)
    assert (lowered.free_mb("cpu"), lowered.pressed) == (-60, ())
    taken = held.with_ceilings({"cpu": ceiling(50)})
    assert (taken.free_mb("cpu"), taken.excess_mb("cpu"), taken.pressed) == (-20, 20, ("cpu",))
    assert taken.with_ceilings({"cpu": ceiling(70)}).pressed == ()


def test_stalled_processes_are_pressure_whatever_the_figures_say() -> None:
    stalled = ledger().with_ceilings({"cpu": ceiling(900, stalled=True)})
    assert (stalled.excess_mb("cpu"), stalled.pressed) == (0, ("cpu",))


def test_what_does_not_grow_stays_though_others_or_people_took_the_room() -> None:
    held = ledger(80).reserve("a", "cpu", 70).with_ceilings({"cpu": ceiling(10)})
    assert held.resize("a", 70) == held
    assert held.resize("a", 40).used_mb("cpu") == 40
    assert held.with_limits({"cpu": 10}, 10).resize("a", 70).used_mb("cpu") == 70


def test_what_turns_out_larger_is_measured_by_the_budget_alone() -> None:
    """It is in memory already, so it counts among others' use until it is booked."""
    held = ledger(80).reserve("a", "cpu", 70).with_ceilings({"cpu": ceiling(60)})
    assert held.resize("a", 100).used_mb("cpu") == 100
    with pytest.raises(LedgerError):
        held.resize("a", 101)


def test_a_ceiling_tells_how_it_is_made() -> None:
    assert str(Ceiling(8000, 5000, 400)) == (
        "5,000 of 8,000 MB are used beside models and 400 MB stay free"
    )
