"""One thread looks at all connections at any moment, whoever had to let go of them."""

from __future__ import annotations

import threading
from threading import get_ident
from typing import Any

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


class Once(Busy):
    """One piece of work, which takes until it is let go; nothing to look at but whether it is over."""

    def __init__(self) -> None:
        super().__init__(1)
        self.let_go = threading.Event()
        self.looks_again = threading.Event()

    def look(self, wait: bool) -> bool | None:
        if self.let_go.is_set():
            self.looks_again.set()
        return super().look(wait)

    def waits_here(self) -> bool:
        return self.left > 0

    def run_here(self) -> None:
        self.left = 0
        assert self.let_go.wait(PATIENCE_S)


def test_somebody_polls_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The polling was taken over by a thread that there was not, and nobody polled any more."""
    monkeypatch.setattr(polling, "TAKEOVER_S", 0.004)
    started, refused = polling._thread, threading.Semaphore(0)
    begun_by = get_ident()

    def thread(name: str, target: Any) -> None:
        # Those that it begins with are there.
        if get_ident() != begun_by and once.left == 0 and not once.let_go.is_set():
            refused.release()
            raise RuntimeError("can't start new thread")
        started(name, target)

    once = Once()
    monkeypatch.setattr(polling, "_thread", thread)
    Polling(once.look, once).start()
    for _ in range(3):
        assert refused.acquire(timeout=PATIENCE_S)
    once.let_go.set()
    assert once.looks_again.wait(PATIENCE_S)
    once.done.set()


def test_two_threads_never_look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the polling is taken from one who has just ended its piece of work, and looks again."""
    monkeypatch.setattr(polling, "TAKEOVER_S", 0.004)
    busy = Busy(400)
    Polling(busy.look, busy).start()
    assert busy.done.wait(PATIENCE_S)
    assert busy.most == 1
    assert len(busy.pollers) > 1
