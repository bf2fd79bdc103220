"""Time and the starting of threads, as things that are passed in.

Whatever decides or waits in this package takes a `Clock` and an `Executor`, so that a test can run
it with a clock of its own and without threads. Nothing that decides calls `time.monotonic` or makes a
`Thread` itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock for decisions, and the wall clock for what people read."""

    def now(self) -> float:
        """Seconds on a clock that never jumps."""
        ...

    def wall(self) -> float:
        """Unix time in seconds."""
        ...


class Executor(Protocol):
    """Starts work beside the caller."""

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work` soon, never inside this call. `work` handles its own errors."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ThreadExecutor:
    """A daemon thread for each piece of work.

    Daemon, because a loader that hangs for ever must not keep the process from ending; one thread
    each, because a hung one must not hold the place of another.
    """

    def start(self, name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()
