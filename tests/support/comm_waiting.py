"""Waiting for something that tells nobody when it happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

DEADLINE_S = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition` holds; fail the test if it does not within a minute.

    For conditions of other people's objects only: where there is an event, wait for the event.
    """
    deadline_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        pause.wait(0.002)
