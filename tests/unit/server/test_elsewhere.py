"""A batch that runs elsewhere is given to one thread, once."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from torch import nn

from splitlearn_comm.core.packed import Output
from splitlearn_manager.runtime.base import Begun
from splitlearn_manager.server.batches import Sent
from splitlearn_manager.server.elsewhere import LATE_S, Elsewhere
from splitlearn_manager.server.queues import queue_of
from support.inferences import instance_of

PATIENCE_S = 20.0


class OnSocket(Begun):
    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    def fileno(self) -> int | None:
        return self.descriptor

    def take(self) -> Output | None:
        return None

    def finish(self) -> Output:
        raise AssertionError("nobody asked for it")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def sent(descriptor: int | None, taken_s: float = 0.0) -> Sent:
    found = Sent(queue_of(instance_of(nn.Identity())), taken_s=taken_s)
    found.begun = OnSocket(descriptor)
    return found


def tells(elsewhere: Elsewhere) -> bool:
    return bool(select.select([elsewhere.fileno()], [], [], 0)[0])


def test_what_has_come_is_told_once_for_each_batch_of_a_connection(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    elsewhere = Elsewhere()
    for _ in range(2):
        batch = sent(ours.fileno())
        assert elsewhere.watch(batch)
        assert not tells(elsewhere)
        theirs.send(b"x")
        assert tells(elsewhere)
        assert elsewhere.come() == [batch]
        assert not tells(elsewhere), "it is told again, though it was taken"
        assert elsewhere.come() == []
        assert elsewhere.late(1e9) is None
        ours.recv(1)
    assert elsewhere.due_s() == float("inf")


def test_what_takes_long_is_given_to_one_thread_only(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    elsewhere, batch = Elsewhere(), sent(ours.fileno(), taken_s=5.0)
    assert elsewhere.watch(batch)
    assert elsewhere.due_s() == 5.0 + LATE_S
    assert elsewhere.late(5.0) is None
    assert elsewhere.late(5.0 + LATE_S) is batch
    assert elsewhere.late(1e9) is None
    theirs.send(b"x")
    assert elsewhere.come() == []


def test_what_cannot_be_watched_is_for_a_thread(ends: tuple[socket.socket, socket.socket]) -> None:
    elsewhere = Elsewhere()
    nowhere = os.open(os.devnull, os.O_RDONLY)  # a file that cannot be waited for
    for descriptor in (None, nowhere):
        batch = sent(descriptor)
        assert not elsewhere.watch(batch)
        elsewhere.set_aside(batch)
        assert elsewhere.due_s() == float("-inf")
        assert elsewhere.late(0.0) is batch
        assert elsewhere.late(1e9) is None
    os.close(nowhere)
