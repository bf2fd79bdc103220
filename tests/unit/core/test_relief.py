"""Who goes for memory that others have taken."""

from __future__ import annotations

import pytest

from splitlearn_manager.core.eviction import Resident
from splitlearn_manager.core.ledger import Ceiling, Ledger
from splitlearn_manager.core.relief import first_to_go


def resident(key: str, mb: float, *, used_s: float = 0, **keys: object) -> Resident:
    values = {
        "device": "cpu",
        "priority": 0,
        "evictable": True,
        "freeing": False,
        **keys,
    }
    return Resident(key=key, model_id=key, mb=mb, last_used_s=used_s, **values)  # type: ignore[arg-type]


def goes(excess_mb: float, *residents: Resident) -> str | None:
    held = sum(r.mb for r in residents if r.device == "cpu")
    ledger = Ledger({"cpu": 10_000}, 10, ceilings={"cpu": Ceiling(held - excess_mb, 0, 0)})
    for r in residents:
        ledger = ledger.promise(r.key, r.device, r.mb)
    assert ledger.excess_mb("cpu") == excess_mb
    gone = first_to_go(ledger, "cpu", residents)
    assert gone == first_to_go(ledger, "cpu", residents[::-1])
    return gone.key if gone else None


def test_least_priority_goes_first_then_the_least_recently_used() -> None:
    low = resident("low", 10, used_s=9, priority=-1)
    old, new = resident("old", 10, used_s=1), resident("new", 10, used_s=2)
    assert goes(5, new, old, low) == "low"
    assert goes(5, new, old) == "old"


def test_nobody_goes_who_can_be_spared() -> None:
    small, large = resident("small", 10, used_s=1), resident("large", 100, used_s=2)
    assert goes(50, small, large) == "large"
    assert goes(10, small, large) == "small"
    assert goes(105, small, large) == "small"
    # Where middle is needed as well, small can be spared.
    middle = resident("middle", 60, used_s=3)
    assert goes(105, small, large, middle) == "small"
    assert goes(120, small, large, middle) == "large"


@pytest.mark.parametrize(
    "staying",
    [
        {"evictable": False},
        {"device": "cuda:0"},
        {"evictable": False, "freeing": True},
    ],
)
def test_who_may_not_go_or_is_elsewhere_stays(staying: dict[str, object]) -> None:
    assert goes(0, resident("a", 10, **staying)) is None


def test_all_go_one_after_the_other_where_all_are_not_enough() -> None:
    a, b = resident("a", 10, used_s=1), resident("b", 20, used_s=2)
    stays = resident("c", 500, evictable=False)
    assert goes(400, a, b, stays) == "a"
    assert goes(400, b, stays) == "b"
    assert goes(400, stays) is None


def test_without_a_figure_one_goes() -> None:
    """Processes stand still for want of memory: nothing says how much is missing."""
    assert goes(0, resident("a", 10, used_s=2), resident("b", 500, used_s=1)) == "b"


def test_a_model_that_holds_nothing_would_help_nobody() -> None:
    assert goes(0, resident("empty", 0)) is None
