"""Headers are read as they were written, however often they come, and written as others read them."""

from __future__ import annotations

import base64

import grpc
import hpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitlearn_comm.http2 import frames, headers
from splitlearn_comm.http2.headers import HeaderReader

CALL = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a/B"),
    (b"content-type", b"application/grpc"),
]
NAMES = st.sampled_from([b"x-one", b"x-two", b"user-agent"])
VALUES = st.sampled_from([b"", b"1", b"two", b"x" * 200, b"y" * 3000])


def block_of(*more: tuple[bytes, bytes], huffman: bool = True) -> bytes:
    return hpack.Encoder().encode([*CALL, *more], huffman=huffman)


RARELY = st.sampled_from([False] * 7 + [True])
ONE, TWO = [(b"x-one", b"1")], [(b"x-two", b"two")]


@settings(max_examples=300)
@example([(ONE, False, False)] * 2 + [(TWO, False, False)] * 2)
@given(
    st.lists(st.tuples(st.lists(st.tuples(NAMES, VALUES), max_size=2), RARELY, RARELY), max_size=20)
)
def test_blocks_that_come_again_mean_what_they_mean_now(calls) -> None:
    """One encoder with its table at the other end: a block's bytes may mean something else the next time.

    Fails if the reader does not forget what it knows when the table changes.
    """
    encoder, reader = hpack.Encoder(), HeaderReader()
    for fields, sensitive, resize in calls:
        if resize:
            encoder.header_table_size = 100 if encoder.header_table_size == 4096 else 4096
        sent = [hpack.NeverIndexedHeaderTuple(*field) if sensitive else field for field in fields]
        # Those of every call are in no table: else all that refers to one would be another block each time.
        call = [hpack.NeverIndexedHeaderTuple(*field) for field in CALL]
        read = reader.read(encoder.encode([*call, *sent]))
        assert read.method == "/a/B"
        assert read.metadata == tuple((k.decode(), v.decode()) for k, v in fields)


def test_a_block_that_leaves_the_table_as_it_is_is_decoded_once() -> None:
    reader = HeaderReader()
    plain = b"".join(
        b"\x00" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in (*CALL, (b"x-one", b"1"))
    )
    assert reader.read(plain) is reader.read(plain)
    changing = block_of((b"x-one", b"1"))
    assert reader.read(changing) is not reader.read(changing)


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (b"5H", 18000.0),
        (b"2M", 120.0),
        (b"30S", 30.0),
        (b"250m", 0.25),
        (b"7u", 7e-6),
        (b"9n", 9e-9),
    ],
)
def test_timeouts_are_read_in_all_units(timeout: bytes, seconds: float) -> None:
    head = HeaderReader().read(block_of((b"grpc-timeout", timeout)))
    assert head.timeout_s == pytest.approx(seconds)
    assert not head.fault


@pytest.mark.parametrize("timeout", [b"", b"5", b"S", b"-1S", b"123456789S", b"5s", b"1.5S"])
def test_a_timeout_that_is_none_is_named(timeout: bytes) -> None:
    head = HeaderReader().read(block_of((b"grpc-timeout", timeout)))
    assert head.http_status == 400
    assert "grpc-timeout" in head.fault


def test_metadata_is_what_the_caller_adds_and_bytes_are_bytes() -> None:
    value = base64.b64encode(b"\x00\xff").rstrip(b"=")
    head = HeaderReader().read(block_of((b"x-one", b"1"), (b"k-bin", value), (b"te", b"trailers")))
    assert head.metadata == (("x-one", "1"), ("k-bin", b"\x00\xff"))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ((b":method", b"GET"), 405),
        ((b"content-type", b"text/html"), 415),
        ((b"k-bin", b"!"), 400),
    ],
)
def test_what_is_no_call_says_why(change: tuple[bytes, bytes], status: int) -> None:
    fields = dict(CALL) | dict([change])
    head = HeaderReader().read(hpack.Encoder().encode(list(fields.items())))
    assert head.http_status == status
    assert head.fault


@pytest.mark.parametrize(
    "block", [b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x40\x01", b"\xbf"]
)
def test_what_cannot_be_decoded_ends_the_connection(block: bytes) -> None:
    with pytest.raises(frames.ConnectionFault) as caught:
        HeaderReader().read(block)
    assert caught.value.code == frames.COMPRESSION_ERROR


def test_headers_that_grow_without_end_are_refused() -> None:
    encoder = hpack.Encoder()
    encoder.encode([(b"x", b"y" * 4000)])
    with pytest.raises(frames.ConnectionFault) as caught:
        HeaderReader().read(hpack.Encoder().encode([(b"x", b"y" * 4000)] * 10))
    assert caught.value.code == frames.ENHANCE_YOUR_CALM


@given(
    st.sampled_from(list(grpc.StatusCode)),
    st.text(max_size=300),
    st.lists(
        st.one_of(
            st.tuples(st.just("k-bin"), st.binary(max_size=200)),
            st.tuples(st.just("key"), st.text("abc 1~", max_size=400)),
        ),
        max_size=3,
    ),
)
def test_trailers_are_read_by_others_as_they_were_written(status, details, metadata) -> None:
    block = headers.trailers(status, details, tuple(metadata))
    read = [tuple(field) for field in hpack.Decoder().decode(block)]
    assert read[0] == ("grpc-status", str(status.value[0]))
    rest = read[1:]
    if details:
        from urllib.parse import unquote

        key, value = rest.pop(0)
        assert key == "grpc-message"
        assert all(" " <= c <= "~" for c in value)
        assert unquote(value, errors="replace") == details
    expected = [
        (k, base64.b64encode(v).rstrip(b"=").decode() if isinstance(v, bytes) else v)
        for k, v in metadata
    ]
    assert rest == expected
