"""A pool counts what it has, and nothing else."""

from __future__ import annotations

import threading

import pytest

from splitlearn_comm.server.pool import BoundedPool


def test_what_a_pool_does_not_take_does_not_count() -> None:
    """It counted for ever: a server that had stopped said that a model still ran."""
    pool = BoundedPool("test", 1, 0)
    assert pool.submit(lambda: 1).result() == 1
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(lambda: 1)
    assert pool.wait_idle(0.0)
    assert not pool.full


@pytest.mark.parametrize("queue", ["submit", "start"])
def test_what_finds_no_thread_is_refused_and_never_run(
    queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was run by the next thread there was, after its caller had been told that it is not."""
    pool, ran = BoundedPool("test", 2, 0), list[str]()
    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(RuntimeError, match="can't start"):
            getattr(pool, queue)(lambda: ran.append("refused"))
    pool.submit(ran.append, "taken").result(30)
    pool.shutdown()
    assert ran == ["taken"]


def test_what_a_thread_that_is_there_has_begun_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, begun, end = BoundedPool("test", 2, 0), threading.Event(), threading.Event()
    pool.submit(end.wait, 30)

    def no_thread(thread: threading.Thread) -> None:
        end.set()
        assert begun.wait(30)
        _no_thread(thread)

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", no_thread)
        future = pool.submit(lambda: begun.set() or "answer")
    assert future.result(30) == "answer"
    assert pool.wait_idle(30)
    pool.shutdown()


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
