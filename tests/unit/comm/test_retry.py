"""When a failed call is made again, and after how long."""

from __future__ import annotations

import grpc
import pytest

from splitlearn_comm import ExponentialBackoff, FixedDelay

FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}


@pytest.mark.parametrize(
    "strategy", [ExponentialBackoff(), FixedDelay()], ids=["exponential", "fixed"]
)
@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_every_status_but_five_is_retried(
    strategy: ExponentialBackoff | FixedDelay, code: grpc.StatusCode
) -> None:
    assert strategy.should_retry(1, code) is (code not in FINAL)


def test_default_is_three_attempts_one_and_two_seconds_apart() -> None:
    strategy = ExponentialBackoff()
    tried = [strategy.should_retry(n, grpc.StatusCode.UNAVAILABLE) for n in (1, 2, 3, 4)]
    assert tried == [True, True, False, False]
    assert [strategy.delay_s(n) for n in (1, 2)] == [1.0, 2.0]


def test_delay_grows_to_its_maximum_and_never_overflows() -> None:
    strategy = ExponentialBackoff(max_attempts=10_000, initial_delay_s=0.5, max_delay_s=5.0)
    assert [strategy.delay_s(n) for n in (1, 2, 3, 4, 5, 9999)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


@pytest.mark.parametrize(("unit", "expected"), [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_jitter_spreads_the_delay_around_its_value(unit: float, expected: float) -> None:
    assert ExponentialBackoff(jitter=0.25, random_unit=lambda: unit).delay_s(1) == expected


def test_fixed_delay_stays_the_same() -> None:
    strategy = FixedDelay(max_attempts=5, delay_s=0.25)
    assert {strategy.delay_s(n) for n in range(1, 5)} == {0.25}
    assert [strategy.should_retry(n, grpc.StatusCode.INTERNAL) for n in (4, 5)] == [True, False]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExponentialBackoff(max_attempts=0),
        lambda: ExponentialBackoff(initial_delay_s=-1),
        lambda: ExponentialBackoff(multiplier=0.5),
        lambda: ExponentialBackoff(max_delay_s=-1),
        lambda: ExponentialBackoff(jitter=1.5),
        lambda: FixedDelay(max_attempts=0),
        lambda: FixedDelay(delay_s=-0.1),
    ],
)
def test_senseless_values_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()
