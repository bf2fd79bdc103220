"""An answer is the same whether it is given as a tensor or as its bytes, however it is sent and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_comm.core.codec import Int8Codec, TensorCodec
from splitlearn_comm.core.compression import Zlib
from splitlearn_comm.core.packed import Output, Packed, strung

CODECS = {
    "as it is": TensorCodec(),
    "another dtype": TensorCodec(torch.float64),
    "bfloat16": TensorCodec(torch.bfloat16),
    "int8": Int8Codec(),
    "compressed": TensorCodec(compression=Zlib(1)),
}


@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    name=st.sampled_from(sorted(CODECS)),
    data=st.data(),
)
def test_bytes_answer_as_their_tensor_does(
    shape: tuple[int, ...], name: str, data: st.DataObject
) -> None:
    """Seen to fail with the answer's own bytes sent whatever dtype is asked for."""
    codec = CODECS[name]
    tensor = torch.randn(shape)
    raw = tensor.numpy().tobytes()
    ways = [Output(tensor), Output(Packed(raw, shape, torch.float32))]
    assert tuple(ways[1].shape) == tuple(ways[0].shape)
    first = data.draw(st.integers(0, shape[0])) if shape else 0
    count = data.draw(st.integers(0, shape[0] - first)) if shape else 0
    cuts = [lambda output: output.whole()]
    if shape and shape[0]:
        cuts.append(lambda output: output.rows(first, count))
    for cut in cuts:
        (sent, its_shape), (other, others_shape) = (cut(way).view(codec) for way in ways)
        assert bytes(other) == bytes(sent)
        assert tuple(others_shape) == tuple(its_shape)
        assert torch.equal(cut(ways[1]).tensor(), cut(ways[0]).tensor())


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises(TypeError, match="dense tensor of real numbers"):
        Output(torch.zeros(2, dtype=torch.complex64)).whole().view(TensorCodec())


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
    name=st.sampled_from(sorted(CODECS)),
)
def test_rows_may_be_an_answer_of_another_shape(shapes: list[tuple[int, int]], name: str) -> None:
    """Seen to fail with the bytes of the whole given for each part."""
    tensors = [torch.randn(*shape, 2) for shape in shapes]
    output, at = Output(torch.cat([t.reshape(-1, 2) for t in tensors])), 0
    for tensor in tensors:
        count = tensor.shape[0] * tensor.shape[1]
        rows = output.rows_as(at, count, tensor.shape)
        at += count
        assert torch.equal(rows.tensor(), tensor)
        data, shape = rows.view(CODECS[name])
        expected, others_shape = Output(tensor).whole().view(CODECS[name])
        assert (bytes(data), tuple(shape)) == (bytes(expected), tuple(others_shape))


def test_strung_values_are_those_of_all_tensors() -> None:
    tensors = [torch.randn(2, 3), torch.randn(1, 5)]
    parts = [Packed(t.numpy().tobytes(), tuple(t.shape), t.dtype) for t in tensors]
    assert torch.equal(strung(parts), torch.cat([t.flatten() for t in tensors]))
    assert strung([Packed(b"", (1, 0), torch.float32)]).shape == (0,)
