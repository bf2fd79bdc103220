"""The requests that wait for models to be loaded, at this moment.

A request joins before it waits and leaves once it has what it waited for, or has given up; its deadline
ends its claim even if it is late to leave. Any thread may join and leave.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from splitlearn_manager.reconcile.actions import Demand


@dataclass(frozen=True, slots=True, eq=False)
class Waiter:
    """A request that waits. Times are on the manager's clock."""

    model_id: str
    came_s: float
    deadline_s: float

    @property
    def urgent_s(self) -> float:
        """When half of its time is over."""
        return (self.came_s + self.deadline_s) / 2


class Waiters:
    """See the module's text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[Waiter] = set()

    def join(self, model_id: str, came_s: float, deadline_s: float) -> Waiter:
        """A request waits for the model from now on."""
        waiter = Waiter(model_id, came_s, deadline_s)
        with self._lock:
            self._waiting.add(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """It does not wait any more. A second call does nothing."""
        with self._lock:
            self._waiting.discard(waiter)

    def at(self, now_s: float) -> Mapping[str, Demand]:
        """What is waited for, by model id."""
        with self._lock:
            waiting = [w for w in self._waiting if now_s < w.deadline_s]
        by_id: dict[str, list[Waiter]] = {}
        for waiter in waiting:
            by_id.setdefault(waiter.model_id, []).append(waiter)
        return {
            model_id: Demand(
                len(found), min(w.came_s for w in found), min(w.urgent_s for w in found)
            )
            for model_id, found in by_id.items()
        }
