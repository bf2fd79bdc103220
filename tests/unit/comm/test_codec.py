"""Tensors become bytes and come back; bytes that are no such tensor are refused."""

from __future__ import annotations

import warnings
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_comm.core import (
    CompressedTensorCodec,
    Int8Codec,
    InvalidRequest,
    TensorCodec,
    Zlib,
    Zstd,
)

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
CODECS = {
    "plain": TensorCodec(),
    "compressed": CompressedTensorCodec(),
    "zstd": TensorCodec(compression=Zstd()),
    "int8": Int8Codec(),
    "int8, zstd": Int8Codec(compression=Zstd()),
}

shapes = st.lists(st.integers(0, 5), max_size=5)


@given(
    shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), level=st.integers(-1, 9)
)
def test_what_is_encoded_comes_back(
    shape: list[int], dtype: torch.dtype, seed: int, level: int
) -> None:
    codec = TensorCodec(dtype) if level < 0 else CompressedTensorCodec(level, dtype)
    if level > 6:
        codec = TensorCodec(dtype, compression=Zstd(level))
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    data, wire_shape = codec.encode(values)
    back = codec.decode(data, wire_shape)
    assert wire_shape == shape
    assert back.dtype == dtype
    assert torch.equal(back, values)


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_float32_comes_back_bit_for_bit(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    back = TensorCodec().decode(*TensorCodec().encode(tensor))
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


@given(data=st.binary(max_size=200), shape=st.lists(st.integers(-3, 2**31 - 1), max_size=70))
def test_any_bytes_and_shape_decode_or_are_refused(data: bytes, shape: list[int]) -> None:
    for codec in CODECS.values():
        try:
            tensor = codec.decode(data, shape)
        except InvalidRequest:
            continue
        assert list(tensor.shape) == shape


def test_bytes_are_little_endian_float32_in_c_order() -> None:
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()
    data, shape = TensorCodec().encode(tensor)
    assert shape == [2, 2]
    assert data == bytes.fromhex("0000803f 00004040 00000040 00008040")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
        torch.ones(2, 3, requires_grad=True),
        torch.ones(1).expand(4, 5),
        torch.tensor(3.0),
        torch.nn.Parameter(torch.ones(2)),
        torch.view_as_complex(torch.ones(3, 2)).conj().imag,
    ],
    ids=["strided", "requires_grad", "expanded", "scalar", "parameter", "negated view"],
)
def test_any_memory_layout_is_encoded(tensor: torch.Tensor) -> None:
    back = TensorCodec().decode(*TensorCodec().encode(tensor))
    assert torch.equal(back, tensor.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_travel_as_float32(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1, 2, 3]).to(dtype)
    back = TensorCodec().decode(*TensorCodec().encode(tensor))
    assert back.dtype == torch.float32
    assert back.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_decoded_tensor_may_be_written_to_and_warns_of_nothing(codec: TensorCodec) -> None:
    data, shape = codec.encode(torch.ones(3))
    before = bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = codec.decode(data, shape)
        tensor.add_(1)
    assert data == before
    assert codec.decode(data, shape).tolist() == [1.0, 1.0, 1.0]


def test_wrong_length_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"\[2, 3\] of float32 needs 24 bytes.* carries 20"):
        TensorCodec().decode(bytes(20), [2, 3])


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([-1, 4], "negative"),
        ([2**31 - 1] * 3, "more elements"),
        ([0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "more elements"),
        ([1] * 65, "65 dimensions"),
    ],
)
def test_impossible_shape_is_refused(shape: list[int], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        TensorCodec().decode(b"", shape)


def test_tensor_without_elements_keeps_its_shape() -> None:
    for codec in CODECS.values():
        assert codec.decode(*codec.encode(torch.empty(2, 0, 3))).shape == (2, 0, 3)


def test_any_byte_but_zero_is_true_for_bool() -> None:
    assert TensorCodec(torch.bool).decode(b"\x00\x01\x02\xff", [4]).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_zip_bomb_is_not_inflated_beyond_its_shape() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    with pytest.raises(InvalidRequest, match="needs 16 bytes, but the message inflates to more"):
        CompressedTensorCodec().decode(bomb, [4])
    with pytest.raises(InvalidRequest, match="inflates to more"):
        CompressedTensorCodec().decode(bomb, [0])


def test_compressed_tensor_beyond_the_limit_is_refused_unread() -> None:
    codec = CompressedTensorCodec(max_decoded_bytes=1000)
    with pytest.raises(InvalidRequest, match=r"needs 1004 bytes.* at most 1000"):
        codec.decode(zlib.compress(bytes(1004)), [251])
    assert codec.with_dtype(torch.float16).max_decoded_bytes == 1000


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"not zlib at all", "not zlib data"),
        (zlib.compress(bytes(16))[:-6], "cut short"),
        (zlib.compress(bytes(16)) + b"more", "4 bytes follow"),
        (zlib.compress(bytes(12)), "needs 16 bytes.* carries 12"),
    ],
)
def test_broken_compressed_bytes_are_refused(data: bytes, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        CompressedTensorCodec().decode(data, [4])


def test_compression_is_used() -> None:
    data, _ = CompressedTensorCodec(level=9).encode(torch.zeros(10_000))
    assert len(data) < 1000


@pytest.mark.parametrize(
    "value",
    [[1.0], None, torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()],
    ids=["list", "None", "complex", "sparse"],
)
def test_what_is_no_dense_real_tensor_cannot_be_encoded(value: object) -> None:
    with pytest.raises(TypeError):
        TensorCodec().encode(value)


def test_codec_of_unknown_dtype_or_level_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        TensorCodec(torch.complex64)
    with pytest.raises(ValueError, match="0 to 9"):
        CompressedTensorCodec(level=10)


@given(
    shape=shapes,
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e30]),
    seed=st.integers(0, 1000),
    compressed=st.booleans(),
)
def test_int8_is_off_by_at_most_half_a_step_of_its_vector(
    shape: list[int], magnitude: float, seed: int, compressed: bool
) -> None:
    """Found by: one scale for the whole tensor instead of one for each vector."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * magnitude
    if values.dim():
        values = values * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (values.dim() - 1))
    codec = Int8Codec(compression=Zstd() if compressed else None)
    back = codec.decode(*codec.encode(values))
    assert back.shape == values.shape
    assert back.dtype is torch.float32
    if values.numel():
        step = values.abs().reshape(-1, shape[-1] if shape else 1).amax(1, keepdim=True) / 127
        off = (back - values).abs().reshape(step.shape[0], -1)
        assert bool((off <= step * 0.5001 + 1e-38).all())


def test_int8_holds_the_largest_values() -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[largest, -largest, 0.0], [0.0, largest / 2, -largest]])
    back = Int8Codec().decode(*Int8Codec().encode(values))
    assert back.isfinite().all()
    assert torch.allclose(back, values, rtol=0.01)


def test_int8_sends_a_byte_a_value_and_a_scale_a_vector() -> None:
    data, shape = Int8Codec().encode(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert shape == [2, 3]
    assert len(data) == 6 + 2 * 4
    assert data[:3] == bytes([64, 256 - 127, 32])


def test_a_vector_that_is_not_finite_arrives_as_nan_and_others_as_they_are() -> None:
    values = torch.tensor([[1.0, float("inf")], [float("nan"), 2.0], [127.0, -127.0]])
    back = Int8Codec().decode(*Int8Codec().encode(values))
    assert back[:2].isnan().all()
    assert torch.equal(back[2], values[2])


@pytest.mark.parametrize("compression", [Zlib(), Zstd()], ids=["zlib", "zstd"])
def test_compressed_data_is_not_trusted_about_its_size(compression: Zlib | Zstd) -> None:
    codec = TensorCodec(compression=compression)
    large = compression.compress(memoryview(bytes(1 << 26)))
    assert len(large) < 1 << 17
    with pytest.raises(InvalidRequest, match="inflates to more"):
        codec.decode(large, [2])
    with pytest.raises(InvalidRequest, match="at most 1073741824 are accepted"):
        codec.decode(large, [1 << 30])
    small = compression.compress(memoryview(bytes(8)))
    with pytest.raises(InvalidRequest, match="carries 8"):
        codec.decode(small, [3])
    for damaged in (small[:-2], small + b"x", b"", b"no such data"):
        with pytest.raises(InvalidRequest):
            codec.decode(damaged, [2])


def test_zstandard_without_a_size_in_its_frame_is_read_as_far_as_expected() -> None:
    import zstandard

    def streamed(raw: bytes) -> bytes:
        press = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        return press.compress(raw) + press.flush()

    codec = TensorCodec(compression=Zstd())
    assert torch.equal(codec.decode(streamed(bytes(8)), [2]), torch.zeros(2))
    with pytest.raises(InvalidRequest):
        codec.decode(streamed(bytes(1 << 20)), [2])


@pytest.mark.parametrize("make", [lambda: Zlib(10), lambda: Zstd(0), lambda: Zstd(20)])
def test_levels_that_do_not_exist_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="level: expected"):
        make()  # type: ignore[operator]
