"""When a failed load is tried again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.snapshot import LoadOutcome
from splitlearn_manager.reconcile.backoff import (
    BASE_S,
    CAP_S,
    JITTER,
    MOST_FAILURES,
    WINDOW_S,
    Attempt,
    FailureRate,
    after_failure,
    delay_s,
)
from support.fakes import model

SPECS = [ModelSpec.of(model("a", priority=n), weights=w) for n in (0, 1) for w in ("w0", "w1")]


def failure(spec: ModelSpec, at_s: float, *, terminal: bool = False) -> LoadOutcome:
    return LoadOutcome("a", 1, spec, "LoadFailed", "it is broken", terminal, at_s)


@given(st.lists(st.tuples(st.sampled_from(SPECS), st.floats(0, 1, exclude_max=True)), min_size=1))
def test_gaps_grow_with_attempts_made_and_with_nothing_else(
    failures: list[tuple[ModelSpec, float]],
) -> None:
    """I14. Seen to fail with `failures` carried over to another version."""
    attempt: Attempt | None = None
    in_a_row, last = 0, None
    for at_s, (spec, draw) in enumerate(failures):
        in_a_row = in_a_row + 1 if spec is last else 1
        last = spec
        attempt = after_failure(attempt, failure(spec, float(at_s)), draw)
        assert attempt.failures == in_a_row
        assert attempt.retry_at_s is not None
        gap = attempt.retry_at_s - at_s
        full = min(CAP_S, BASE_S * 2.0 ** (in_a_row - 1))
        assert (1 - JITTER) * full - 1e-9 <= gap <= full + 1e-9


def test_the_waits_are_one_two_four_and_at_most_sixty_seconds() -> None:
    assert [delay_s(n, 0.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_s(10_000, 0.0) == CAP_S


def test_another_version_is_not_held_back() -> None:
    attempt = after_failure(None, failure(SPECS[0], 10.0), 0.0)
    assert attempt.blocks(SPECS[0], 10.5)
    assert not attempt.blocks(SPECS[0], 11.0)
    assert not attempt.blocks(SPECS[1], 10.5)
    assert not attempt.blocks(SPECS[2], 10.5)


def test_a_terminal_failure_waits_for_a_change() -> None:
    attempt = after_failure(None, failure(SPECS[0], 10.0, terminal=True), 0.0)
    assert attempt.retry_at_s is None
    assert attempt.blocks(SPECS[0], 1e9)
    assert not attempt.blocks(SPECS[1], 10.0)


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60))
def test_no_more_loads_fail_in_any_minute_than_the_limit(gaps: list[float]) -> None:
    """Somebody asks again after each gap. Seen to fail with the limit lifted at the latest failure's
    time, and with the failures forgotten when the limit is reached."""
    rate, now, failed_at = FailureRate(), 0.0, list[float]()
    for gap in gaps:
        now += gap
        rate.forget_before(now)
        if "a" not in rate.limited(now):
            failed_at.append(now)
            rate.add("a", now)
    for first, eleventh in zip(failed_at, failed_at[MOST_FAILURES:], strict=False):
        assert eleventh >= first + WINDOW_S


def test_one_model_that_fails_too_often_limits_no_other() -> None:
    rate = FailureRate()
    for second in range(MOST_FAILURES):
        rate.add("a", float(second))
        rate.add("b", 0.0) if second else None
    assert rate.limited(20.0) == {"a": WINDOW_S}


def test_nothing_is_remembered_of_failures_that_limit_nothing_any_more() -> None:
    rate = FailureRate()
    rate.add("a", 0.0)
    rate.forget_before(WINDOW_S - 1.0)
    assert rate._times
    rate.forget_before(WINDOW_S)
    assert not rate._times
