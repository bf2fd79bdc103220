"""Batches that run in worker processes: begun, and mostly answered, by the thread that polls for calls.

    polls ─► begin ─► [worker] ─► readable ─► come ─► answered by the thread that polls
                          └──── after LATE_S, or no plain answer ─► late ─► a thread that may wait

Nothing is handed from thread to thread that way, and nobody waits while a worker computes. All of it may be
asked by several threads; a batch is given to one of them.
"""

from __future__ import annotations

import select
from collections import deque
from contextlib import suppress

from splitlearn_manager.server.batches import Sent

LATE_S = 0.1
"""A batch that has run for so long is waited for by a thread of its own, which may end its worker."""
_NEVER_S = float("inf")


class Elsewhere:
    """See the module's text."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._sent: dict[int, Sent] = {}
        self._odd: deque[Sent] = deque()

    def fileno(self) -> int | None:
        """Readable when something has come; None where the system has no such thing."""
        return None if self._epoll is None else self._epoll.fileno()

    def watch(self, sent: Sent) -> bool:
        """See to a batch that has been begun; False if that cannot be done here."""
        descriptor = sent.begun.fileno() if sent.begun is not None else None
        if descriptor is None or self._epoll is None:
            return False
        self._sent[descriptor] = sent
        # Once: whoever takes the answer may be another thread, and is not to be disturbed.
        wanted = select.EPOLLIN | select.EPOLLONESHOT
        try:
            try:
                self._epoll.modify(descriptor, wanted)
            except FileNotFoundError:
                self._epoll.register(descriptor, wanted)
        except OSError:
            # It may have been found late meanwhile.
            return self._sent.pop(descriptor, None) is None
        return True

    def come(self) -> list[Sent]:
        """Those of which something has come; they are the caller's."""
        if self._epoll is None:
            return []
        found = [self._sent.pop(descriptor, None) for descriptor, _ in self._epoll.poll(0)]
        return [sent for sent in found if sent is not None]

    def set_aside(self, sent: Sent) -> None:
        """For a thread that may wait."""
        self._odd.append(sent)

    def late(self, now: float) -> Sent | None:
        """One that a thread should wait for by then; it is the caller's."""
        with suppress(IndexError):
            return self._odd.popleft()
        for descriptor, sent in list(self._sent.items()):
            if sent.taken_s + LATE_S <= now and self._sent.pop(descriptor, None) is sent:
                return sent
        return None

    def due_s(self) -> float:
        """When there is one for `late`, unless it is answered before."""
        if self._odd:
            return float("-inf")
        return min((sent.taken_s for sent in list(self._sent.values())), default=_NEVER_S) + LATE_S
