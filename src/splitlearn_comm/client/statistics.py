"""Keeps a client's timings. Total is what the caller waited; network is total without the server's compute.

Total covers encoding, every attempt with the waits between them, and decoding. Calls that failed are not
counted.
"""

from __future__ import annotations

import threading
from typing import NotRequired, TypedDict


class Timing(TypedDict):
    """One call, in milliseconds; `network_time_ms + compute_time_ms == total_time_ms`.

    `forward_id` is there after a training forward: what `compute_backward` takes.
    """

    network_time_ms: float
    compute_time_ms: float
    total_time_ms: float
    forward_id: NotRequired[str]


class Statistics(TypedDict):
    """Means over all calls that were answered, in milliseconds; zeros before the first."""

    total_requests: int
    avg_network_time_ms: float
    avg_compute_time_ms: float
    avg_total_time_ms: float


def timing(total_s: float, compute_time_ms: float) -> Timing:
    """Split a call's wall time.

    Args:
        total_s: the caller's wall time.
        compute_time_ms: as the server reports it, in single precision; never more than the total.
    """
    total_ms = total_s * 1000
    compute_ms = min(max(compute_time_ms, 0.0), total_ms)
    return Timing(
        network_time_ms=total_ms - compute_ms,
        compute_time_ms=compute_ms,
        total_time_ms=total_ms,
    )


class CallStatistics:
    """Adds up timings; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._compute_ms = 0.0
        self._total_ms = 0.0

    def record(self, call: Timing) -> None:
        """Count one answered call."""
        with self._lock:
            self._calls += 1
            self._compute_ms += call["compute_time_ms"]
            self._total_ms += call["total_time_ms"]

    def summary(self) -> Statistics:
        """Return the means so far."""
        with self._lock:
            calls, compute_ms, total_ms = self._calls, self._compute_ms, self._total_ms
        divisor = max(calls, 1)
        return Statistics(
            total_requests=calls,
            avg_network_time_ms=(total_ms - compute_ms) / divisor,
            avg_compute_time_ms=compute_ms / divisor,
            avg_total_time_ms=total_ms / divisor,
        )
