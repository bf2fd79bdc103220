"""Keeps models that are being built from disturbing one another.

While transformers builds a model it changes torch for the whole process: the default dtype, some functions,
the tying of weights. Two such builds at the same time can leave those changes in place for good, and a user's
factory that runs meanwhile would create its layers under them. So a build by transformers is exclusive; user
factories run side by side, but not while one goes on. Reading weights needs neither, and is not held up.

A factory may run for long, or hang. An exclusive build therefore waits for running factories only for
`patience_s`, then goes ahead: one model's slowness must not hold up the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BuildGate:
    """A lock with a shared and an exclusive side, and patience in the place of certainty."""

    def __init__(self, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._exclusive = threading.Lock()
        self._changed = threading.Condition()
        self._factories = 0
        self._closed = False

    @contextmanager
    def factory(self) -> Iterator[None]:
        """While a user's factory runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._factories += 1
        try:
            yield
        finally:
            with self._changed:
                self._factories -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While transformers builds a model."""
        with self._exclusive:
            with self._changed:
                # Closed first, so that a stream of new factories cannot keep it waiting.
                self._closed = True
                self._changed.wait_for(lambda: not self._factories, self._patience_s)
            try:
                yield
            finally:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()


class Quiet:
    """While anyone is inside, transformers draws no progress bars and writes no advice to stderr."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = _nothing

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore = _hush()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._restore()


def _hush() -> Callable[[], None]:
    """Silences transformers; the function that undoes it."""
    from transformers.utils import logging as settings

    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()

    def restore() -> None:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()  # type: ignore[no-untyped-call]

    settings.set_verbosity(logging.CRITICAL)
    settings.disable_progress_bar()  # type: ignore[no-untyped-call]
    return restore


def _nothing() -> None:
    """Nothing was silenced yet."""


# One of each for the process, because what transformers changes, and what it prints to, is the process's.
BUILD_GATE = BuildGate()
QUIET = Quiet()
