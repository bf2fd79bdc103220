"""A pool of threads that knows how much work it has, so that more can be refused at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BoundedPool(ThreadPoolExecutor):
    """A thread pool that counts its work, running and waiting.

    Args:
        name: of its threads.
        max_workers: threads.
        max_waiting: pieces of work beyond those that run, after which `full` is true. The pool does not
            refuse anything itself.
    """

    def __init__(self, name: str, max_workers: int, max_waiting: int) -> None:
        super().__init__(max_workers, thread_name_prefix=name)
        self.limit = max_workers + max_waiting
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._outstanding = 0
        self._waits = 0

    @property
    def full(self) -> bool:
        """Whether there is as much work as there may be."""
        return self._outstanding >= self.limit

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a piece of work, full or not."""
        self.enter()
        try:
            future = super().submit(fn, *args, **kwargs)
        except RuntimeError:
            # It has been shut down, or the system allows no further thread.
            self.leave()
            raise
        future.add_done_callback(lambda _: self.leave())
        return future

    def start(self, work: Callable[[], None]) -> None:
        """Queue what counts already, since `enter`."""
        super().submit(work)

    def enter(self) -> None:
        """Count a piece of work that is done elsewhere, until `leave`."""
        with self._lock:
            self._outstanding += 1

    def leave(self) -> None:
        """A piece of work is done."""
        with self._lock:
            self._outstanding -= 1
            if self._waits and not self._outstanding:
                self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False if that takes longer than `timeout_s`."""
        with self._lock:
            self._waits += 1
            try:
                return self._changed.wait_for(lambda: not self._outstanding, timeout_s)
            finally:
                self._waits -= 1
