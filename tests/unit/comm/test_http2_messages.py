"""Messages come out as they went in, in whatever pieces they arrive."""

from __future__ import annotations

import gzip
import struct
import zlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_comm.http2.messages import Assembly, Compressed, MessageFault

LIMIT = 1000


def plain_of(assembly: Assembly, wire: memoryview) -> list[bytes]:
    return [
        bytes(assembly.plain(message) if isinstance(message, Compressed) else message)
        for message in assembly.feed(wire)
    ]


def framed(data: bytes, compressed: int = 0) -> memoryview:
    return memoryview(struct.pack(">BI", compressed, len(data)) + data)


@given(st.lists(st.binary(max_size=60), max_size=8), st.lists(st.integers(1, 40), min_size=1))
def test_pieces_of_any_size_give_the_same_messages(messages: list[bytes], sizes: list[int]) -> None:
    """Fails if the bytes before a message's size is known are not kept from piece to piece."""
    assembly, out, at = Assembly(LIMIT, "identity"), [], 0
    wire = memoryview(b"".join(framed(m) for m in messages))
    for number in range(len(wire)):
        size = sizes[number % len(sizes)]
        out += assembly.feed(wire[at : at + size])
        at += size
        if at >= len(wire):
            break
    assert [bytes(m) for m in out] == messages
    assert not assembly.is_within
    assert assembly.missing == 0


def test_what_is_missing_may_be_written_where_it_belongs() -> None:
    assembly = Assembly(LIMIT, "identity")
    wire = framed(bytes(range(200)))
    assert assembly.feed(wire[:25]) == []
    assert assembly.missing == 180
    room = assembly.room()
    assert room is not None
    room[:100] = wire[25:125]
    assert assembly.filled(100) is None
    (message,) = assembly.feed(wire[125:])
    assert bytes(message) == bytes(range(200))
    assert assembly.room() is None


def test_one_that_is_too_large_is_refused_by_its_size_alone() -> None:
    assembly = Assembly(LIMIT, "identity")
    assert assembly.feed(framed(b"x" * LIMIT)) == [b"x" * LIMIT]
    with pytest.raises(MessageFault, match="1001 bytes; the most that is taken is 1000") as caught:
        assembly.feed(framed(b"x" * (LIMIT + 1))[:5])
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert assembly.missing == 0


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_ones_are_unpacked_within_the_limit(encoding: str, pack) -> None:
    assembly = Assembly(LIMIT, encoding)
    assert plain_of(assembly, framed(pack(b"abc" * 100), 1)) == [b"abc" * 100]
    assert plain_of(assembly, framed(b"as it is")) == [b"as it is"]
    assert plain_of(assembly, framed(pack(bytes(LIMIT)), 1)) == [bytes(LIMIT)]
    with pytest.raises(MessageFault, match="more than 1000") as caught:
        plain_of(assembly, framed(pack(bytes(LIMIT + 1)), 1))
    assert caught.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_one_that_ends_too_early_does_not_pass_for_a_shorter_one(
    encoding: str, pack
) -> None:
    packed = pack(bytes(range(256)))
    for size in (1, len(packed) // 2, len(packed) - 1):
        with pytest.raises(MessageFault, match="ends too early") as caught:
            plain_of(Assembly(LIMIT, encoding), framed(packed[:size], 1))
        assert caught.value.status is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("encoding", "wire", "status"),
    [
        ("gzip", framed(b"no gzip", 1), grpc.StatusCode.INTERNAL),
        ("br", framed(b"x", 1), grpc.StatusCode.UNIMPLEMENTED),
        ("identity", framed(b"x", 1), grpc.StatusCode.UNIMPLEMENTED),
        ("gzip", framed(b"x", 2), grpc.StatusCode.INTERNAL),
    ],
)
def test_what_cannot_be_read_is_refused(encoding: str, wire: memoryview, status) -> None:
    with pytest.raises(MessageFault) as caught:
        plain_of(Assembly(LIMIT, encoding), wire)
    assert caught.value.status is status
