"""A readers/writer lock: many forward passes, or one change of the weights.

A waiting writer goes before readers that come later, so that a steady stream of forwards cannot keep a
step out for ever. Not re-entrant: a thread that holds either side must not ask for the lock again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Held by any number of readers or by one writer."""

    def __init__(self) -> None:
        # Readers who need not wait take the lock alone, which is a fifth of what a condition costs.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False

    def read(self) -> _Reading:
        """Hold the lock, for the block of a `with`, as one of many readers."""
        return _Reading(self)

    def _begin_reading(self) -> None:
        with self._lock:
            while self._writing or self._writers_waiting:
                self._changed.wait()
            self._readers += 1

    def _end_reading(self) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers and self._writers_waiting:
                self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone."""
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class _Reading:
    """One reader. A class, because every forward is one, and a generator costs it more."""

    __slots__ = ("_lock",)

    def __init__(self, lock: ReadWriteLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._begin_reading()

    def __exit__(self, *error: object) -> None:
        self._lock._end_reading()
