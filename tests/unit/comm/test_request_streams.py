"""ComputeStream in gRPC's own way: a thread that reads beside a generator that sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.pool import BoundedPool
from splitlearn_comm.server.streams import WINDOW, Streams
from support.waiting import eventually


class Context:
    """What streams use of gRPC's."""

    def add_callback(self, callback: Any) -> bool:
        return True


def test_a_caller_that_goes_in_the_midst_of_an_answer_leaves_no_thread_behind() -> None:
    """The one that reads waited for ever, where the caller had asked for as much as a stream may."""
    calls: list[Any] = []
    gone = threading.Event()
    pool = BoundedPool("test", 1, 2 * WINDOW)

    def asked() -> Iterator[bytes]:
        for number in range(1, WINDOW + 1):
            request = compute_pb2.ComputeRequest(shape=[1])
            yield compute_pb2.StreamedRequest(id=number, request=request).SerializeToString()
        assert gone.is_set()
        raise RuntimeError("gRPC's way of saying so")

    before = {*threading.enumerate()}
    streams = Streams(lambda request, data, call: calls.append(call), pool, 1000)
    answers = streams.handle(asked(), Context())  # type: ignore[arg-type]
    first: list[bytes] = []
    taking = threading.Thread(target=lambda: first.append(next(answers)))
    taking.start()
    eventually(lambda: len(calls) == WINDOW, "it has read as much as it may")
    calls[0].send(b"")
    taking.join()
    assert first
    gone.set()
    answers.close()  # type: ignore[attr-defined]
    eventually(lambda: {*threading.enumerate()} <= before, "all threads have ended")
    pool.shutdown()
