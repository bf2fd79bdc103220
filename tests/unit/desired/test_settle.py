"""The settle rule itself."""

from __future__ import annotations

from splitlearn_manager.desired.settle import Settling


def test_two_agreeing_looks_far_enough_apart_settle() -> None:
    settling: Settling[str] = Settling()
    settling.look("a", 10.0)
    assert not settling.settled(10.0, 0.25)
    assert settling.remaining_s(10.0, 0.25) == 0.25
    settling.look("a", 10.2)
    assert not settling.settled(10.2, 0.25)
    settling.look("a", 10.25)
    assert settling.settled(10.25, 0.25)


def test_one_look_never_settles_however_long_ago() -> None:
    settling: Settling[str] = Settling()
    settling.look("a", 10.0)
    assert not settling.settled(99.0, 0.25)
    assert not settling.settled(10.0, 0.0)


def test_another_value_starts_anew_even_if_the_first_comes_back() -> None:
    settling: Settling[str] = Settling()
    for now, value in ((0.0, "a"), (1.0, "b"), (2.0, "a")):
        settling.look(value, now)
    assert not settling.settled(2.0, 0.25)
    settling.look("a", 2.25)
    assert settling.settled(2.25, 0.25)


def test_none_is_a_value_like_others_and_forgetting_is_not() -> None:
    settling: Settling[str | None] = Settling()
    settling.look(None, 0.0)
    settling.look(None, 1.0)
    assert settling.settled(1.0, 0.25)
    settling.forget()
    assert not settling.known
    settling.look(None, 2.0)
    assert not settling.settled(2.0, 0.25)


def test_waiting_as_long_as_told_is_enough_despite_rounding() -> None:
    for tenths in range(1, 200):
        start, first = tenths * 0.1, tenths * 0.1 + 0.07
        settling: Settling[str] = Settling()
        settling.look("a", start)
        settling.look("a", first)
        now = first + settling.remaining_s(first, 0.25)
        settling.look("a", now)
        assert settling.settled(now, 0.25)
