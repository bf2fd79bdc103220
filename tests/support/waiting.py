"""Waiting for a condition with a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T], what: str, deadline_s: float = 30.0) -> T:
    """Looks until the answer is true, and gives it; fails the test `deadline_s` seconds later."""
    pause = threading.Event()
    end = monotonic() + deadline_s
    while True:
        answer = look()
        if answer:
            return answer
        if monotonic() >= end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}; last look: {answer!r}")
        pause.wait(0.01)
