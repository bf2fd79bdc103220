"""A pool of threads that knows how much work it has, so that more can be refused at once."""

from __future__ import annotations

import functools
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
        """Queue a piece of work, full or not.

        Raises:
            RuntimeError: if the pool was shut down, or the system allows no thread; it is then never run.
        """
        self.enter()
        try:
            future = self._queue(functools.partial(fn, *args, **kwargs))
        except RuntimeError:
            self.leave()
            raise
        future.add_done_callback(lambda _: self.leave())
        return future

    def start(self, work: Callable[[], None]) -> None:
        """Queue what counts already, since `enter`. Raises as `submit` does."""
        self._queue(work)

    def _queue(self, work: Callable[[], T]) -> Future[T]:
        # Python's pool queues first and starts a thread then: what it raises for the want of one has been
        # queued, and a thread that is there already may even have begun it.
        future: Future[T] = Future()
        try:
            super().submit(_run, future, work)
        except RuntimeError:
            if future.cancel():
                raise
        return future

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


def _run(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
