"""Turns tensors into bytes and back: what travels in `data`, `grad_output_data` and the cache entries.

The bytes are C-contiguous and little-endian, as the memory of every supported machine is. A codec
fixes the dtype on the wire; the shape travels beside the bytes. Decoding checks the shape against the
bytes before it allocates anything, so a request can never make the server allocate more than it sent
(for a compressed tensor: more than `max_decoded_bytes`).

A decoded tensor is writable, because a model may write into its input. Decoding copies the bytes of a
message, which are immutable, once; those that are given as a view are taken over: nobody else may read them
any more.
Codecs hold no state and may be shared by threads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from splitlearn_comm.core.compression import Compression, TooMuch, Zlib
from splitlearn_comm.core.errors import InvalidRequest
from splitlearn_comm.core.packed import Packed

MAX_DIMENSIONS = 64
DEFAULT_MAX_DECODED_BYTES = 1 << 30
_MAX_ELEMENTS = (1 << 63) - 1
_LARGEST_SCALE = float(np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0)))
"""127 times that is finite; what is rounded up from the largest float32 is not."""
_DTYPES = (
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
)


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as a tuple, or raise `InvalidRequest` if no tensor can have it."""
    return _checked(tuple(shape))


@lru_cache(maxsize=1024)
def _checked(dims: tuple[int, ...]) -> tuple[int, ...]:
    if len(dims) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"the shape has {len(dims)} dimensions; at most {MAX_DIMENSIONS} are possible"
        )
    if any(dim < 0 for dim in dims):
        raise InvalidRequest(f"shape {list(dims)} has a negative dimension")
    # Zeros count as ones: torch computes strides even for a tensor without elements.
    if math.prod(max(dim, 1) for dim in dims) > _MAX_ELEMENTS:
        raise InvalidRequest(f"shape {list(dims)} has more elements than a tensor can have")
    return dims


class TensorCodec:
    """Plain tensor bytes of one dtype.

    Args:
        dtype: the dtype on the wire: float16, bfloat16, float32, float64, int8, int16, int32, int64,
            uint8 or bool. Both ends of a connection must use the same.
        compression: what makes the bytes smaller, the same at both ends; None for nothing.
        max_decoded_bytes: the largest tensor that is expanded. A message of 100 MiB may expand to a
            thousand times as much, and its shape is the sender's claim.

    Raises:
        ValueError: for any other dtype.
    """

    exact = True
    """Whether every value of the dtype arrives as it is."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        compression: Compression | None = None,
        max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    ) -> None:
        if dtype not in _DTYPES:
            names = ", ".join(dtype_name(known) for known in _DTYPES)
            raise ValueError(f"a tensor cannot be sent as {dtype}; the codec knows {names}")
        self.dtype = dtype
        self.compression = compression
        self.max_decoded_bytes = max_decoded_bytes

    @property
    def plain(self) -> bool:
        """Whether what travels is the tensor's own memory, so that rows of it are bytes of it."""
        return self.compression is None

    @property
    def wire_dtype(self) -> str:
        """What a request announces of it under the key `dtype`."""
        return dtype_name(self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> TensorCodec:
        """Return the same kind of codec for another dtype."""
        return self._alike(TensorCodec(dtype))

    def with_int8(self) -> TensorCodec:
        """Return the same kind of codec that sends a byte for each value, see `Int8Codec`."""
        return self._alike(Int8Codec())

    def with_compression(self, compression: Compression | None) -> TensorCodec:
        """Return the codec with another compression, or none."""
        other = copy.copy(self)
        other.compression = compression
        return other

    def encode(self, tensor: torch.Tensor) -> tuple[bytes, list[int]]:
        """Return the tensor's bytes, converted to this codec's dtype, and its shape.

        Any device, memory layout and `requires_grad` will do; the tensor itself is not changed.

        Raises:
            TypeError: if `tensor` is no dense tensor of real numbers.
        """
        data, shape = self.view(tensor)
        return bytes(data), shape

    def view(self, tensor: torch.Tensor) -> tuple[bytes | memoryview, list[int]]:
        """As `encode`, without a copy where the tensor's own memory holds those bytes already."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise TypeError(
                f"cannot send a {tensor.layout} tensor of {tensor.dtype}; "
                "expected a dense tensor of real numbers"
            )
        raw = self._raw(tensor)
        packed = raw if self.compression is None else self.compression.compress(raw)
        return packed, list(tensor.shape)

    def decode(self, data: bytes | memoryview, shape: Sequence[int]) -> torch.Tensor:
        """Return a CPU tensor of `shape` and this codec's dtype that may be written to.

        Args:
            data: bytes, which are copied, or a view of some, which the tensor takes over.
            shape: as it came with the bytes.

        Raises:
            InvalidRequest: if the shape is impossible or does not fit the bytes.
        """
        return self.unpack(data, shape).tensor()

    def unpack(self, data: bytes | memoryview, shape: Sequence[int]) -> Packed:
        """As `decode`, for a tensor that is made later."""
        dims = checked_shape(shape)
        expected = self._bytes(dims)
        if self.compression is not None:
            if max(expected, math.prod(dims) * self.dtype.itemsize) > self.max_decoded_bytes:
                limit = f"compressed tensors of at most {self.max_decoded_bytes} are accepted"
                raise InvalidRequest(f"{self._needs(dims)}; {limit}")
            try:
                data = self.compression.expand(data, expected)
            except TooMuch:
                text = f"{self._needs(dims)}, but the message inflates to more"
                raise InvalidRequest(text) from None
        if len(data) != expected:
            raise InvalidRequest(f"{self._needs(dims)}, but the message carries {len(data)}")
        return self._packed(data, dims)

    def _needs(self, dims: tuple[int, ...]) -> str:
        return f"shape {list(dims)} of {self.wire_dtype} needs {self._bytes(dims)} bytes"

    # What a way of writing numbers has of its own.

    def _raw(self, tensor: torch.Tensor) -> memoryview:
        """The bytes of a tensor."""
        plain = tensor
        if not self._is_plain(tensor):
            plain = tensor.detach().to("cpu", self.dtype).contiguous().resolve_neg()
        if plain.dtype is torch.bfloat16:
            plain = plain.view(torch.int16)  # numpy has none
        # Flattened, because a scalar has no bytes to view.
        return plain.numpy().reshape(-1).view(np.uint8).data

    def _bytes(self, dims: tuple[int, ...]) -> int:
        """How many bytes a tensor has."""
        return math.prod(dims) * self.dtype.itemsize

    def _packed(self, raw: bytes | memoryview, dims: tuple[int, ...]) -> Packed:
        """A tensor's bytes in this codec's dtype."""
        return Packed(raw, dims, self.dtype)

    def _is_plain(self, tensor: torch.Tensor) -> bool:
        """Whether its memory is what travels."""
        return (
            tensor.dtype is self.dtype
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.requires_grad
            and not tensor.is_neg()
        )

    def _alike(self, other: TensorCodec) -> TensorCodec:
        other.compression, other.max_decoded_bytes = self.compression, self.max_decoded_bytes
        return other


class Int8Codec(TensorCodec):
    """A byte for each value, and a scale for each vector along the last dimension; decodes to float32.

    On the wire: the values, int8, in the tensor's order; behind them one float32 for each vector. A value is
    its byte times its vector's scale, which is the largest magnitude of the vector over 127. A vector with a
    value that is not finite arrives as NaN.
    """

    exact = False
    plain = False
    wire_dtype = "int8"

    def __init__(self, *, compression: Compression | None = None) -> None:
        super().__init__(torch.float32, compression=compression)

    def _raw(self, tensor: torch.Tensor) -> memoryview:
        values = tensor.detach().to("cpu", torch.float32).reshape(-1, _vector(tuple(tensor.shape)))
        scales = values.abs().amax(1, keepdim=True) / 127 if values.numel() else values[:, :1]
        scales = torch.where(scales.isfinite(), scales.clamp(max=_LARGEST_SCALE), torch.nan)
        # Zeros are zeros with any scale; a byte for what is not finite may be any.
        whole = (values / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-127, 127)
        coded = whole.nan_to_num_().to(torch.int8)
        both = torch.cat(
            [coded.reshape(-1).view(torch.uint8), scales.reshape(-1).view(torch.uint8)]
        )
        return both.numpy().data

    def _bytes(self, dims: tuple[int, ...]) -> int:
        values = math.prod(dims)
        return values + 4 * (values // _vector(dims))

    def _packed(self, raw: bytes | memoryview, dims: tuple[int, ...]) -> Packed:
        values = math.prod(dims)
        if not values:
            return Packed(b"", dims, self.dtype)
        coded = np.frombuffer(raw, np.int8, values).reshape(-1, _vector(dims))
        scales = np.frombuffer(raw, "<f4", offset=values)[:, None]
        return Packed(memoryview((coded * scales).reshape(-1)).cast("B"), dims, self.dtype)


def _vector(dims: tuple[int, ...]) -> int:
    """The size of the last dimension; 1 for a scalar, and where there are no values."""
    return max(1, dims[-1]) if dims else 1


class CompressedTensorCodec(TensorCodec):
    """Tensor bytes compressed with zlib.

    Args:
        level: zlib's level, 0 (store) to 9 (smallest).
        dtype, max_decoded_bytes: as for `TensorCodec`.
    """

    def __init__(
        self,
        level: int = 6,
        dtype: torch.dtype = torch.float32,
        *,
        max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    ) -> None:
        super().__init__(dtype, compression=Zlib(level), max_decoded_bytes=max_decoded_bytes)


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
