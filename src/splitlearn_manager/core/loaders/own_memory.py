"""Memory of our own for weights, and how the numbers of a file get into it.

A model never serves from pages of a file: one that is truncated would end the process with SIGBUS, one that
is rewritten in place would mix versions. So nothing is mapped. A tensor is allocated where and as it will
stay, and its bytes are read straight into it. What has to change on the way (dtype, device) goes through a
small buffer, a piece at a time, so that no tensor is ever in memory twice.

Where the bytes come from is a `ByteSource`: part of a safetensors file, or a member of an archive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from splitlearn_manager.runtime.system_memory import prefer_huge_pages

PIECE_BYTES = 4 * 2**20
"""What is read at a time: small beside any model, large beside the cost of a call."""

_CONVERTED_ELEMENTS = 32 * 2**10
"""What is converted at a time: no more than torch does in one thread, and the processor's cache holds it."""


class ByteSource(Protocol):
    """The bytes of one storage."""

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            LoadError: the file has become shorter (reason `CorruptCheckpoint`).
        """
        ...

    def ensure_intact(self) -> None:
        """Compare the checksum, where there is one; costs nothing if all bytes were read in order.

        Raises:
            LoadError: the bytes are not those that were written (reason `CorruptCheckpoint`).
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        start: of its first element, in bytes of the source.
        stride: in elements; None for a tensor whose elements lie in order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: ByteSource
    start: int = 0
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def with_shape(self, shape: tuple[int, ...]) -> StoredTensor:
        """The same elements in another shape; () for (1,)."""
        return self if shape == self.shape else replace(self, shape=shape, stride=None)


class InMemory:
    """The bytes of a tensor that torch itself has read; a `ByteSource`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor

    def read(self, target: memoryview, start: int) -> None:
        """Copies from the tensor."""
        target[:] = as_bytes(self._there())[start : start + len(target)]

    def ensure_intact(self) -> None:
        """Nobody else writes to it."""

    def take(self) -> torch.Tensor:
        """The tensor itself, or a copy if others have part of its memory. Nothing can be read afterwards."""
        tensor, self._tensor = self._there(), None
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def _there(self) -> torch.Tensor:
        if self._tensor is None:
            raise ValueError("the tensor has been taken")
        return self._tensor


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    """A tensor that torch itself has read, as a stored one."""
    tensor = tensor.detach().contiguous()
    return StoredTensor(tensor.dtype, tuple(tensor.shape), InMemory(tensor))


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie in order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def watch_storage(tensor: torch.Tensor) -> Callable[[], bool]:
    """A function that tells later whether the tensor's storage has been freed, and does not keep it."""
    gone: Callable[[], bool] = StorageWeakRef(tensor.untyped_storage()).expired  # type: ignore[no-untyped-call]
    return gone


def empty(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor without values, in order, in memory that is quick to fill."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    expect_writes(tensor)
    return tensor


def expect_writes(tensor: torch.Tensor) -> None:
    """Prepare memory that nothing has been written to yet."""
    if tensor.device.type == "cpu":
        prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)


def read_tensor(
    stored: StoredTensor, dtype: torch.dtype | None = None, device: str = "cpu"
) -> torch.Tensor:
    """The tensor on `device`, its elements in order; one of floating point as `dtype` if given."""
    converts = dtype is not None and dtype.is_floating_point and stored.dtype.is_floating_point
    final = dtype if converts and dtype else stored.dtype
    if isinstance(stored.source, InMemory) and final is stored.dtype and device == "cpu":
        return stored.source.take().view(stored.shape)
    target = empty(stored.shape, final, device)
    fill(target, stored)
    return target


def fill(target: torch.Tensor, stored: StoredTensor, via: torch.dtype | None = None) -> None:
    """Write a stored tensor's values into a tensor of the same shape, whatever its dtype, device and strides.

    Args:
        via: a dtype that the values are rounded to on the way.

    Raises:
        LoadError: the file has become shorter, or is damaged (reason `CorruptCheckpoint`).
    """
    with torch.no_grad():
        target = target.detach()
        if stored.numel:
            if stored.stride is not None or not target.is_contiguous():
                target.copy_(_through(_strided(stored), via))
            elif _is_direct(target, stored, via):
                bytes_of = as_bytes(target)
                for begin in range(0, len(bytes_of), PIECE_BYTES):
                    piece = bytes_of[begin : begin + PIECE_BYTES]
                    stored.source.read(piece, stored.start + begin)
            else:
                flat = target.view(-1)
                elements = _elements_at_once(stored, target)
                for begin, values in _pieces(stored, elements):
                    flat[begin : begin + len(values)].copy_(_through(values, via))
        stored.source.ensure_intact()


def holds(resident: torch.Tensor, stored: StoredTensor, via: torch.dtype | None = None) -> bool:
    """Whether a tensor in memory has exactly the bytes that `fill` would write to one like it.

    Args:
        resident: on the CPU, its elements in order, of the stored tensor's shape.

    Raises:
        LoadError: as `fill`.
    """
    if not stored.numel or stored.stride is not None:
        return False
    with torch.no_grad():
        flat = resident.detach().view(-1)
        for begin, values in _pieces(stored, _CONVERTED_ELEMENTS):
            own = flat[begin : begin + len(values)]
            if not _equal_bytes(own, _through(values, via).to(own.dtype)):
                return False
        stored.source.ensure_intact()
    return True


def read_first(
    stored: StoredTensor, count: int, dtype: torch.dtype, via: torch.dtype | None = None
) -> torch.Tensor:
    """The first `count` elements, flat, as `fill` would write them; the elements lie in order."""
    first = torch.empty(min(count, stored.numel), dtype=stored.dtype)
    stored.source.read(as_bytes(first), stored.start)
    return _through(first, via).to(dtype)


def _is_direct(target: torch.Tensor, stored: StoredTensor, via: torch.dtype | None) -> bool:
    same = target.dtype is stored.dtype and via in (None, stored.dtype)
    return same and target.device.type == "cpu"


def _through(values: torch.Tensor, via: torch.dtype | None) -> torch.Tensor:
    return values if via is None else values.to(via)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor whose elements lie in order, for writing."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    # As bytes: NaN is unequal to itself, and 0.0 is equal to -0.0.
    return np.array_equal(a.view(torch.uint8).numpy(), b.view(torch.uint8).numpy())


def _elements_at_once(stored: StoredTensor, target: torch.Tensor) -> int:
    if target.device.type == "cpu":
        return _CONVERTED_ELEMENTS
    return PIECE_BYTES // stored.dtype.itemsize


def _pieces(stored: StoredTensor, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first element, elements) in order; each piece is gone when the next is asked for."""
    size = stored.dtype.itemsize
    buffer = torch.empty(min(elements, stored.numel), dtype=stored.dtype)
    for begin in range(0, stored.numel, elements):
        piece = buffer[: stored.numel - begin]
        stored.source.read(as_bytes(piece), stored.start + begin * size)
        yield begin, piece


def _strided(stored: StoredTensor) -> torch.Tensor:
    """A tensor whose elements are not in order: the whole stretch that they lie in is read."""
    stride = stored.stride if stored.stride is not None else contiguous_stride(stored.shape)
    reach = 1 + sum((n - 1) * step for n, step in zip(stored.shape, stride, strict=True))
    stretch = empty((reach,), stored.dtype)
    stored.source.read(as_bytes(stretch), stored.start)
    return stretch.as_strided(stored.shape, stride)
