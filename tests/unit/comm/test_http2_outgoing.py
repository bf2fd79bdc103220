"""What leaves on a connection, and what becomes of it when the other end does not take it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from splitlearn_comm.http2 import frames
from splitlearn_comm.http2.outgoing import Lane, Outgoing


class Lab:
    """A connection; what is told of it."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.broken = 0
        self.outgoing = Outgoing(self.ours, _nothing, self._broke)

    def _broke(self) -> None:
        self.broken += 1


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    with made.ours, made.theirs:
        yield made


def test_a_connection_that_breaks_while_several_answers_wait_is_just_told_of(lab: Lab) -> None:
    """What waited was forgotten with the first of them, and then looked for."""
    lab.outgoing.agree(first_window=0, frame_size=None)
    for number in (1, 3, 5):
        lane = Lane(number, _nothing, _nothing)
        lab.outgoing.send(lane, (b"waits for the caller's window",))
    lab.outgoing.agree(first_window=frames.FIRST_WINDOW, frame_size=None)
    lab.theirs.close()
    lab.outgoing.flush()
    assert lab.broken == 1
    assert lab.outgoing.is_empty


def _nothing() -> None:
    pass
