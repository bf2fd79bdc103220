"""Keeps models that are being built from disturbing one another.

While transformers builds a model it changes torch for the whole process: the default dtype, some functions,
the tying of weights. Two such builds at the same time can leave those changes in place for good, and a user's
factory that runs meanwhile would create its layers under them. So a build by transformers is exclusive; user
factories run side by side, but not while one goes on. Reading weights needs neither, and is not held up.

What a factory sets for all of torch, such as the default dtype, would be set for all other models too, and
for good. So it holds while factories run, and is put back when the last of them returns; what is a thread's
own, when its factory does.

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
        self._put_back: Callable[[], None] = _nothing
        self._closed = False
        self._building = False

    @contextmanager
    def factory(self) -> Iterator[None]:
        """While a user's factory runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            if not self._factories:
                self._put_back = _for_all_threads()
            self._factories += 1
        put_back = _for_this_thread()
        try:
            yield
        finally:
            put_back()
            with self._changed:
                self._factories -= 1
                self._put_back_if_last()
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While transformers builds a model."""
        with self._exclusive:
            with self._changed:
                # Closed first, so that a stream of new factories cannot keep it waiting.
                self._closed = True
                self._changed.wait_for(lambda: not self._factories, self._patience_s)
                self._building = True
            try:
                yield
            finally:
                with self._changed:
                    self._closed = self._building = False
                    self._put_back_if_last()
                    self._changed.notify_all()

    def _put_back_if_last(self) -> None:
        # Not in the midst of a build by transformers that went ahead: that needs what it has set itself.
        if not self._factories and not self._building:
            put_back, self._put_back = self._put_back, _nothing
            put_back()


def _for_all_threads() -> Callable[[], None]:
    """The function that puts torch's settings for the process back to what they are now."""
    import torch

    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    before = _determinism()

    def put_back() -> None:
        torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        # Only if it has changed: torch imports half of its compiler for that, which takes a second.
        if _determinism() != before:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    return put_back


def _determinism() -> tuple[bool, bool]:
    import torch

    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _for_this_thread() -> Callable[[], None]:
    """As `_for_all_threads`, for the thread's own."""
    import torch

    device, grad = torch.get_default_device(), torch.is_grad_enabled()

    def put_back() -> None:
        if torch.get_default_device() != device:
            # None, because a default device that is set costs each call of torch something.
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_grad_enabled(grad)

    return put_back


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
    """Nothing was silenced, or could have been set, yet."""


# One of each for the process, because what transformers changes, and what it prints to, is the process's.
BUILD_GATE = BuildGate()
QUIET = Quiet()
