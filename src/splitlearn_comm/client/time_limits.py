"""Finds the requests of a stream whose time is over: a server that hangs, or a dead network, never says so.

One thread does, while there are any. Most requests of a client have the same time limit, and then it wakes up
about once in that time, not once for each of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_NEVER_S = float("inf")


class Limited(Protocol):
    """Something that waits until `until_s`, on `time.monotonic`."""

    @property
    def until_s(self) -> float: ...


T = TypeVar("T", bound=Limited)


class TimeLimits(Generic[T]):
    """See the module's text. Safe to use from several threads.

    Args:
        waiting: gives all that wait.
        over: is called once or more for each whose time is over, until it waits no more.
    """

    def __init__(self, waiting: Callable[[], list[T]], over: Callable[[T], None]) -> None:
        self._waiting = waiting
        self._over = over
        self._changed = threading.Condition()
        self._runs = False
        self._looks_s = _NEVER_S

    def watch(self, until_s: float) -> None:
        """One more waits, until then. Raises RuntimeError if there can be no thread."""
        if not until_s < self._looks_s:
            # So it is for nearly all, and without the lock: see `_late`.
            return
        with self._changed:
            if not until_s < self._looks_s:
                return
            if self._runs:
                self._changed.notify()
            else:
                threading.Thread(target=self._run, name="compute-limits", daemon=True).start()
                self._runs = True
            # Last, for the system may have no more threads.
            self._looks_s = until_s

    def look(self) -> None:
        """Many have ended: without any the thread ends."""
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                late = self._late()
                if not late:
                    if self._looks_s == _NEVER_S:
                        self._runs = False
                        return
                    left_s = self._looks_s - time.monotonic()
                    self._changed.wait(min(max(left_s, 0.0), threading.TIMEOUT_MAX))
            while late:
                self._over(late.pop())

    def _late(self) -> list[T]:
        # By itself, so that the thread keeps nothing of what it has seen while it waits.
        # Said first: whoever begins to wait while it asks who waits takes the lock, and is seen afterwards.
        self._looks_s = _NEVER_S
        waiting, now_s = self._waiting(), time.monotonic()
        limits = [one.until_s for one in waiting if one.until_s < _NEVER_S]
        self._looks_s = min(limits, default=_NEVER_S)
        return [one for one in waiting if one.until_s <= now_s]
