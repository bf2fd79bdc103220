"""The deadline of the request that a thread works on, for those that may have to cut it short."""

from __future__ import annotations

from contextvars import ContextVar
from time import monotonic

_DEADLINE_S: ContextVar[float | None] = ContextVar("deadline_s", default=None)


def deadline_s() -> float | None:
    """When the caller stops waiting, on `time.monotonic`; None if it waits for ever, or there is none."""
    return _DEADLINE_S.get()


class working_for:  # noqa: N801 - used as a function
    """What is done in the block of a `with` is for a caller who waits that many seconds more."""

    __slots__ = ("_remaining_s", "_token")

    def __init__(self, remaining_s: float | None) -> None:
        self._remaining_s = remaining_s

    def __enter__(self) -> None:
        left_s = self._remaining_s
        self._token = _DEADLINE_S.set(None if left_s is None else monotonic() + left_s)

    def __exit__(self, *error: object) -> None:
        _DEADLINE_S.reset(self._token)
