"""Each message comes with the descriptors that it was sent with, however many are read at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitlearn_manager.runtime.channel import Channel, Closed, pair
from splitlearn_manager.runtime.workers import WorkerStarter
from support.waiting import eventually


@pytest.fixture
def files(tmp_path) -> Iterator[list[int]]:
    opened = [os.open(tmp_path / str(n), os.O_CREAT | os.O_RDWR) for n in range(4)]
    yield opened
    for descriptor in opened:
        os.close(descriptor)


def inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=12))
def test_descriptors_belong_to_their_messages(files: list[int], sent: list[list[int]]) -> None:
    """Fails if what one look at the socket gives is taken for one message's: a message without descriptors
    is read together with the one behind it, and its descriptors."""
    ours, other = pair()
    theirs = Channel(other)
    for number, chosen in enumerate(sent):
        ours.send({"number": number}, [files[n] for n in chosen])
    for number, chosen in enumerate(sent):
        message, descriptors = theirs.receive(10)
        assert message == {"number": number}
        assert [inode(d) for d in descriptors] == [inode(files[n]) for n in chosen]
        for descriptor in descriptors:
            os.close(descriptor)
    assert not theirs.has_message
    ours.close()
    with pytest.raises(Closed):
        theirs.receive(10)
    theirs.close()


def test_what_has_been_read_is_known_though_no_selector_tells_of_it() -> None:
    ours, other = pair()
    theirs = Channel(other)
    ours.send({"number": 1})
    ours.send({"number": 2})
    assert theirs.receive(10)[0] == {"number": 1}
    assert theirs.has_message
    assert theirs.receive(10)[0] == {"number": 2}
    ours.close()
    theirs.close()


def test_descriptors_of_what_nobody_receives_are_closed(files: list[int]) -> None:
    ours, other = pair()
    theirs = Channel(other)
    ours.send({"number": 1})
    ours.send({"number": 2}, files[:2])
    theirs.receive(10)
    left = list(theirs._descriptors)
    theirs.close()
    ours.close()
    for descriptor in left:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    # Linux gives both messages at once.
    assert len(left) == (2 if sys.platform == "linux" else len(left))


def test_a_message_that_claims_descriptors_and_brings_none_ends_the_channel() -> None:
    mine, other = socket.socketpair()
    channel = Channel(mine)
    other.sendall(b"\x02\x00\x00\x00\x01\x00{}")
    with pytest.raises(Closed):
        channel.receive(10)
    channel.close()
    other.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks workers")
def test_an_end_and_a_start_that_come_together_are_both_done() -> None:
    """The process that forks finds both messages in one read: it once gave the second one's descriptors to
    the first, and the load waited for its time-out."""
    starter = WorkerStarter(forks=True)
    first = starter.start("first")
    server = starter._server
    assert server is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    found = []
    thread = threading.Thread(target=lambda: found.append(starter.start("second")))
    try:
        first.kill("the test has ended it")
        thread.start()
        eventually(server._lock.locked, "the second has been asked for")
    finally:
        os.kill(server._process.pid, signal.SIGCONT)
    thread.join(30)
    (second,) = found
    assert first.why_ended() == "the test has ended it"
    with second.connection() as connection:
        connection.call({"op": "example"})
        assert connection.answer(30)[0].get("error") is None
    second.close()
    first.close()
    server._process.kill()
    eventually(lambda: server.ended, "its end is noticed")
