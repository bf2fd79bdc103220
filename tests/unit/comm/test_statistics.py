"""A client's times: the total is what the caller waited, and the other two add up to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_comm.client.statistics import CallStatistics, timing

ms = st.floats(0, 1e6)


def test_average_total_time_contains_the_compute_time_once() -> None:
    statistics = CallStatistics()
    statistics.record(timing(total_s=0.010, compute_time_ms=6.0))
    statistics.record(timing(total_s=0.030, compute_time_ms=10.0))
    assert statistics.summary() == {
        "total_requests": 2,
        "avg_total_time_ms": pytest.approx(20.0),
        "avg_compute_time_ms": pytest.approx(8.0),
        "avg_network_time_ms": pytest.approx(12.0),
    }


@given(calls=st.lists(st.tuples(ms, ms), min_size=1, max_size=20))
def test_network_and_compute_add_up_to_the_total(calls: list[tuple[float, float]]) -> None:
    statistics = CallStatistics()
    for total_ms, compute_ms in calls:
        spent = timing(total_ms / 1000, compute_ms)
        assert spent["network_time_ms"] >= 0
        assert spent["network_time_ms"] + spent["compute_time_ms"] == pytest.approx(
            spent["total_time_ms"]
        )
        statistics.record(spent)
    summary = statistics.summary()
    assert summary["avg_network_time_ms"] + summary["avg_compute_time_ms"] == pytest.approx(
        summary["avg_total_time_ms"]
    )
    assert summary["avg_total_time_ms"] == pytest.approx(sum(t for t, _ in calls) / len(calls))


def test_nothing_recorded_is_zeros() -> None:
    assert CallStatistics().summary() == {
        "total_requests": 0,
        "avg_total_time_ms": 0.0,
        "avg_compute_time_ms": 0.0,
        "avg_network_time_ms": 0.0,
    }


def test_no_call_is_lost_between_threads() -> None:
    statistics = CallStatistics()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(statistics.record, timing(0.001, 0.5))
    summary = statistics.summary()
    assert summary["total_requests"] == 2000
    assert summary["avg_total_time_ms"] == pytest.approx(1.0)
