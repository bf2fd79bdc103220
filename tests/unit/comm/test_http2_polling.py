"""One thread looks at all connections at any moment, whoever had to let go of them."""

from __future__ import annotations

import threading

import pytest

from splitlearn_comm.http2 import polling
from splitlearn_comm.http2.polling import Polling

PATIENCE_S = 60.0


class Busy:
    """Work without an end, each piece about as long as it may be without losing the polling.

    Attributes:
        pollers: the threads that have polled.
        looking, most: how many threads look just now, and did at most.
    """

    def __init__(self, pieces: int) -> None:
        self.left = pieces
        self.done = threading.Event()
        self.pollers: list[int] = []
        self.looking = 0
        self.most = 0
        self.lock = threading.Lock()
        self.never = threading.Event()

    def look(self, wait: bool) -> bool | None:
        with self.lock:
            self.looking += 1
            self.most = max(self.most, self.looking)
        self.never.wait(0.001)
        with self.lock:
            self.looking -= 1
        return None if self.done.is_set() else False

    def polled_here(self) -> None:
        self.pollers.append(threading.get_ident())

    def has_work(self) -> bool:
        return True

    def waits_here(self) -> bool:
        return not self.done.is_set()

    def run_here(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.done.set()
        # What a piece takes: now a little less, now a little more than the polling is lost for.
        self.never.wait(polling.TAKEOVER_S * (0.95 + 0.1 * (self.left % 3)))


def test_two_threads_never_look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the polling is taken from one who has just ended its piece of work, and looks again."""
    monkeypatch.setattr(polling, "TAKEOVER_S", 0.004)
    busy = Busy(400)
    Polling(busy.look, busy).start()
    assert busy.done.wait(PATIENCE_S)
    assert busy.most == 1
    assert len(busy.pollers) > 1
