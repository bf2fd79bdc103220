"""The deadline of the request that a thread works on, for those that may have to cut it short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic

_DEADLINE_S: ContextVar[float | None] = ContextVar("deadline_s", default=None)


def deadline_s() -> float | None:
    """When the caller stops waiting, on `time.monotonic`; None if it waits for ever, or there is none."""
    return _DEADLINE_S.get()


@contextmanager
def working_for(remaining_s: float | None) -> Iterator[None]:
    """What is done in the block is for a caller who waits that many seconds more."""
    token = _DEADLINE_S.set(None if remaining_s is None else monotonic() + remaining_s)
    try:
        yield
    finally:
        _DEADLINE_S.reset(token)
