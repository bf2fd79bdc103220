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

import math
import zlib
from collections.abc import Sequence

import torch

from splitlearn_comm.core.errors import InvalidRequest
from splitlearn_comm.core.packed import Packed

MAX_DIMENSIONS = 64
DEFAULT_MAX_DECODED_BYTES = 1 << 30
_MAX_ELEMENTS = (1 << 63) - 1
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
    dims = tuple(shape)
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

    Raises:
        ValueError: for any other dtype.
    """

    plain = True
    """Whether what travels is the tensor's own memory, so that rows of it are bytes of it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _DTYPES:
            names = ", ".join(dtype_name(known) for known in _DTYPES)
            raise ValueError(f"a tensor cannot be sent as {dtype}; the codec knows {names}")
        self.dtype = dtype

    def with_dtype(self, dtype: torch.dtype) -> TensorCodec:
        """Return the same kind of codec for another dtype."""
        return TensorCodec(dtype)

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
        plain = tensor
        if not self._is_plain(tensor):
            plain = tensor.detach().to("cpu", self.dtype).contiguous().resolve_neg()
        # Through uint8, because numpy has no bfloat16; flattened, because a scalar has no bytes to view.
        raw = plain.view(-1).view(torch.uint8).numpy().data
        return self._pack(raw), list(tensor.shape)

    def _is_plain(self, tensor: torch.Tensor) -> bool:
        """Whether its memory is what travels."""
        return (
            tensor.dtype is self.dtype
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.requires_grad
            and not tensor.is_neg()
        )

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
        expected = math.prod(dims) * self.dtype.itemsize
        raw = self._unpack(data, expected, dims)
        if len(raw) != expected:
            raise InvalidRequest(
                f"shape {list(dims)} of {dtype_name(self.dtype)} needs {expected} bytes, "
                f"but the message carries {len(raw)}"
            )
        return Packed(raw, dims, self.dtype)

    def _pack(self, raw: memoryview) -> bytes | memoryview:
        return raw

    def _unpack(
        self, data: bytes | memoryview, expected: int, dims: tuple[int, ...]
    ) -> bytes | memoryview:
        return data


class CompressedTensorCodec(TensorCodec):
    """Tensor bytes compressed with zlib.

    Args:
        level: zlib's level, 0 (store) to 9 (smallest).
        dtype: as for `TensorCodec`.
        max_decoded_bytes: the largest tensor that is inflated. A message of 100 MiB may inflate to a
            thousand times as much, and its shape is the sender's claim.
    """

    plain = False

    def __init__(
        self,
        level: int = 6,
        dtype: torch.dtype = torch.float32,
        *,
        max_decoded_bytes: int = DEFAULT_MAX_DECODED_BYTES,
    ) -> None:
        super().__init__(dtype)
        if not 0 <= level <= 9:
            raise ValueError(f"level: expected 0 to 9, got {level}")
        self.level = level
        self.max_decoded_bytes = max_decoded_bytes

    def with_dtype(self, dtype: torch.dtype) -> CompressedTensorCodec:
        """Return a compressing codec of the same level for another dtype."""
        return CompressedTensorCodec(self.level, dtype, max_decoded_bytes=self.max_decoded_bytes)

    def _pack(self, raw: memoryview) -> bytes:
        return zlib.compress(raw, self.level)

    def _unpack(self, data: bytes | memoryview, expected: int, dims: tuple[int, ...]) -> bytes:
        if expected > self.max_decoded_bytes:
            raise InvalidRequest(
                f"shape {list(dims)} of {dtype_name(self.dtype)} needs {expected} bytes; "
                f"compressed tensors of at most {self.max_decoded_bytes} are accepted"
            )
        inflater = zlib.decompressobj()
        try:
            # One byte more than the shape allows tells an exact fit from an overflow; 0 would mean no limit.
            raw = inflater.decompress(data, expected + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the tensor's bytes are not zlib data: {error}") from error
        if len(raw) > expected:
            raise InvalidRequest(
                f"shape {list(dims)} of {dtype_name(self.dtype)} needs {expected} bytes, "
                "but the message inflates to more"
            )
        if not inflater.eof:
            raise InvalidRequest(
                f"the compressed tensor is cut short: {len(raw)} of {expected} bytes"
            )
        if inflater.unused_data:
            raise InvalidRequest(
                f"{len(inflater.unused_data)} bytes follow the end of the compressed tensor"
            )
        return raw


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
