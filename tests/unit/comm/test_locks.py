"""Many readers or one writer, and a writer that gets its turn."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from splitlearn_comm.core.locks import ReadWriteLock
from support.comm_waiting import DEADLINE_S, until


@pytest.fixture
def eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_readers_hold_it_together() -> None:
    lock = ReadWriteLock()
    together = threading.Barrier(4)

    def read() -> None:
        with lock.read():
            together.wait(DEADLINE_S)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read) for _ in range(4)]:
            done.result(DEADLINE_S)


@pytest.mark.usefixtures("eager_switching")
def test_nobody_sees_half_of_what_a_writer_does() -> None:
    lock = ReadWriteLock()
    pair = [0, 0]

    def write() -> None:
        for _ in range(300):
            with lock.write():
                pair[0] += 1
                pair[1] += 1

    def read() -> list[bool]:
        equal = []
        for _ in range(300):
            with lock.read():
                equal.append(pair[0] == pair[1])
        return equal

    with ThreadPoolExecutor(6) as pool:
        writing = [pool.submit(write) for _ in range(3)]
        reading = [pool.submit(read) for _ in range(3)]
        assert all(all(done.result(DEADLINE_S)) for done in reading)
        for done in writing:
            done.result(DEADLINE_S)
    assert pair == [900, 900]


def test_waiting_writer_goes_before_later_readers() -> None:
    lock = ReadWriteLock()
    order: list[str] = []
    first_in, let_first_go = threading.Event(), threading.Event()

    def first_reader() -> None:
        with lock.read():
            first_in.set()
            assert let_first_go.wait(DEADLINE_S)

    def writer() -> None:
        with lock.write():
            order.append("writer")

    def later_reader() -> None:
        with lock.read():
            order.append("reader")

    with ThreadPoolExecutor(3) as pool:
        held = pool.submit(first_reader)
        assert first_in.wait(DEADLINE_S)
        writing = pool.submit(writer)
        until(lambda: lock._writers_waiting == 1, "the writer waits")
        reading = pool.submit(later_reader)
        let_first_go.set()
        for done in (held, writing, reading):
            done.result(DEADLINE_S)
    assert order == ["writer", "reader"]


def test_error_inside_releases_it() -> None:
    lock = ReadWriteLock()
    for side in (lock.read, lock.write):
        with pytest.raises(KeyError), side():
            raise KeyError
    with lock.write():
        pass
    with lock.read():
        pass
