"""A forward's message: what is written is read, and what else comes is refused and breaks nothing."""

from __future__ import annotations

import os
from threading import Thread

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from splitlearn_comm.core.errors import ComputeFailed
from splitlearn_comm.core.packed import Packed
from splitlearn_manager.runtime.channel import Channel, pair
from splitlearn_manager.runtime.forward_message import DTYPES, can_be_told, read, written
from splitlearn_manager.runtime.in_worker import InWorker
from splitlearn_manager.runtime.shared_area import Area
from splitlearn_manager.runtime.worker_connection import Connection
from support.inferences import begun


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 2**40), max_size=8).map(tuple),
    brings_area=st.booleans(),
    turn=st.booleans(),
)
def test_what_is_written_is_read(
    dtype: torch.dtype, shape: tuple[int, ...], brings_area: bool, turn: bool
) -> None:
    """Seen to fail with the two flags exchanged on reading."""
    told = read(written(dtype, shape, brings_area=brings_area, turn=turn))
    assert (told.dtype, told.shape) == (dtype, shape)
    assert (told.brings_area, told.turn) == (brings_area, turn)


@given(data=st.binary(max_size=40))
@example(b"")
@example(b"\x01\x00\x63\x00")
@example(b"\x01\x00\x00\x02" + bytes(8))
def test_other_bytes_are_refused(data: bytes) -> None:
    """Seen to fail without a look at how many sizes there are: struct.error came out."""
    try:
        told = read(data)
    except ValueError:
        return
    assert data[0] == 1
    assert (
        read(written(told.dtype, told.shape, brings_area=told.brings_area, turn=told.turn)) == told
    )


def test_what_has_no_message() -> None:
    assert not can_be_told(torch.complex64, (1,))
    assert not can_be_told(torch.float32, (1,) * 256)
    assert can_be_told(torch.bfloat16, ())


@pytest.mark.parametrize(
    "answer",
    [
        b"\x02\x00\x00\x00",
        b"no answer",
        written(torch.float64, (2**20, 2**30), brings_area=False),
        written(torch.float32, (-1,), brings_area=False),
        written(torch.float32, (4,), brings_area=True),
    ],
    ids=[
        "another kind",
        "no message",
        "beyond the area",
        "a negative size",
        "an area that is not there",
    ],
)
def test_an_answer_that_is_none_ends_the_worker(answer: bytes) -> None:
    """A worker runs a stranger's code: what it says is checked before memory is read by it."""
    ours, other = pair()
    killed = []

    class Liar:
        def lend(self) -> Connection:
            return Connection(ours)

        def drop(self, connection: Connection) -> None:
            connection.close()

        def kill(self, why: str) -> None:
            killed.append(True)

    theirs = Channel(other)

    def lie() -> None:
        _, descriptors = theirs.receive_any(10)
        theirs.send(answer)
        for descriptor in descriptors:
            os.close(descriptor)

    liar = Thread(target=lie)
    liar.start()
    function = InWorker(Liar(), "m")  # type: ignore[arg-type]
    with pytest.raises(
        ComputeFailed, match="'m': its worker process has sent what is no answer"
    ) as told:
        begun(function, [Packed(bytes(16), (4,), torch.float32)]).finish()
    assert told.value.reason == "WorkerDied"
    assert killed
    liar.join()
    ours.close()
    theirs.close()


def test_an_area_is_filled_with_all_pieces_in_order() -> None:
    area = Area.of_size(64)
    area.fill([b"abcd", memoryview(b"efgh"), b""])
    assert bytes(area.part(torch.uint8, (8,)).tolist()) == b"abcdefgh"
    area.close()
