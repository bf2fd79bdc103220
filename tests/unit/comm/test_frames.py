"""Messages taken apart and put together by hand are those of protocol buffers, with few copies."""

from __future__ import annotations

import ctypes

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_comm.core import CompressedTensorCodec, TensorCodec, frames
from splitlearn_comm.protocol import compute_pb2

SIZES = (0, 1, 127, 128, 16_383, 16_384, frames.BIG_BYTES, 300_000)
requests = st.builds(
    compute_pb2.ComputeRequest,
    data=st.sampled_from(SIZES).map(
        lambda size: bytes(range(256)) * (size // 256) + bytes(size % 256)
    ),
    shape=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    model_id=st.text(max_size=8),
    request_id=st.none() | st.integers(-5, 5),
    metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    use_cache=st.none() | st.booleans(),
)


@given(requests)
def test_what_is_written_is_read_again_as_protocol_buffers_would(
    request: compute_pb2.ComputeRequest,
) -> None:
    frame = request.SerializeToString()
    read, data = frames.read(compute_pb2.ComputeRequest(), frame)
    assert bytes(data) == request.data
    rest = compute_pb2.ComputeRequest()
    rest.CopyFrom(request)
    rest.ClearField("data")
    read.ClearField("data")
    assert read == rest
    written = frames.write(request.data, rest.SerializeToString())
    assert compute_pb2.ComputeRequest.FromString(written) == request


@given(requests, st.data())
def test_a_frame_cut_short_is_an_error_or_another_message_and_never_reads_beyond(
    request: compute_pb2.ComputeRequest, data: st.DataObject
) -> None:
    frame = request.SerializeToString()
    cut = frame[: data.draw(st.integers(0, len(frame)))]
    try:
        expected = compute_pb2.ComputeRequest.FromString(cut)
    except DecodeError:
        with pytest.raises(DecodeError):
            frames.read(compute_pb2.ComputeRequest(), cut)
    else:
        _, found = frames.read(compute_pb2.ComputeRequest(), cut)
        assert bytes(found) == expected.data


def test_a_field_that_comes_twice_counts_as_it_came_last() -> None:
    big = compute_pb2.ComputeRequest(data=bytes(frames.BIG_BYTES)).SerializeToString()
    frame = big + compute_pb2.ComputeRequest(data=b"last").SerializeToString()
    _, data = frames.read(compute_pb2.ComputeRequest(), frame)
    assert bytes(data) == compute_pb2.ComputeRequest.FromString(frame).data == b"last"


def test_a_size_without_an_end_is_an_error() -> None:
    with pytest.raises(DecodeError):
        frames.read(compute_pb2.ComputeRequest(), b"\x0a" + b"\xff" * frames.BIG_BYTES)


def test_a_large_request_is_not_copied_on_its_way_into_a_tensor() -> None:
    """gRPC makes one copy, into the bytes of the message; this is all that comes after it."""
    tensor = torch.randn(512, 512)
    data, shape = TensorCodec().encode(tensor)
    frame = compute_pb2.ComputeRequest(data=data, shape=shape).SerializeToString()
    request, view = frames.read(compute_pb2.ComputeRequest(), frame)
    decoded = TensorCodec().decode(view, request.shape)
    begin = ctypes.cast(ctypes.c_char_p(frame), ctypes.c_void_p).value
    assert begin is not None
    assert begin <= decoded.data_ptr() < begin + len(frame)
    assert torch.equal(decoded, tensor)


def test_a_tensor_keeps_the_bytes_that_it_has_taken_over() -> None:
    tensor = torch.randn(512, 512)
    data, shape = TensorCodec().encode(tensor)
    frame = compute_pb2.ComputeRequest(data=data, shape=shape).SerializeToString()
    decoded = TensorCodec().decode(frames.read(compute_pb2.ComputeRequest(), frame)[1], shape)
    del frame
    others = [torch.zeros(512, 512) for _ in range(8)]
    assert torch.equal(decoded, tensor)
    decoded += 1
    assert torch.equal(decoded, tensor + 1)
    assert all(not other.any() for other in others)


def test_an_answer_is_written_once() -> None:
    tensor = torch.randn(512, 512)
    view, shape = TensorCodec().view(tensor)
    assert isinstance(view, memoryview)
    assert view.obj.ctypes.data == tensor.data_ptr()  # type: ignore[union-attr]
    frame = frames.write(view, compute_pb2.ComputeResponse(shape=shape).SerializeToString())
    assert compute_pb2.ComputeResponse.FromString(frame).data == bytes(view)


def test_a_compressed_tensor_may_be_read_from_a_view() -> None:
    codec, tensor = CompressedTensorCodec(level=0), torch.randn(512, 512)
    data, shape = codec.encode(tensor)
    assert torch.equal(codec.decode(memoryview(data), shape), tensor)
