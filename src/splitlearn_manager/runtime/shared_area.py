"""Tensors in memory that two processes have in common.

An area has no name that could outlive the processes: it is gone with the last descriptor and mapping. It
is sealed against shrinking, so that neither side can take memory away under the other (SIGBUS).

    call      the caller writes its tensors into the area and says where they lie
    answer    whoever answers writes over them, in the same area; in a new one where that is too small, or
              the model has kept a tensor of the call
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64
_SMALLEST = 256 * 2**10
_LARGE = 256 * 2**10
"""Numpy copies that much, and lets the interpreter's other threads go on meanwhile."""

Place = list[Any]
"""[dtype, shape, offset in bytes] of a tensor, as JSON has it."""


class Area:
    """Shared memory of a fixed size. The descriptor is open until `close`; tensors keep the memory."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        try:
            self._memory = mmap.mmap(descriptor, self.size)
        except BaseException:
            self.close()
            raise
        self.address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    @classmethod
    def of_size(cls, size: int) -> Area:
        """A new one for at least so many bytes."""
        return cls(anonymous_file(max(_SMALLEST, 2 ** math.ceil(math.log2(max(size, 1))))))

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def tensor(self, place: Place) -> torch.Tensor:
        """The tensor at a place; it is the area's memory.

        Raises:
            ValueError: the place is none of this area.
        """
        name, shape, offset = place
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) for n in shape):
            raise ValueError(f"no place of a tensor: {place}")
        return self.part(dtype, shape, offset)

    def part(self, dtype: torch.dtype, shape: Sequence[int], offset: int = 0) -> torch.Tensor:
        """As `tensor`."""
        count = self._values(dtype, shape, offset)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def read(self, dtype: torch.dtype, shape: Sequence[int]) -> bytes | memoryview:
        """A copy of the bytes of a tensor at the beginning. Raises ValueError as `tensor` does."""
        size = self._values(dtype, shape) * dtype.itemsize
        return self._memory[:size] if size < _LARGE else self._bytes(size).copy().data

    def _bytes(self, size: int, offset: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self._memory, np.uint8, size, offset)

    def _values(self, dtype: torch.dtype, shape: Sequence[int], offset: int = 0) -> int:
        """How many values a tensor has that lies in this area."""
        count = math.prod(shape)
        if min(shape, default=0) < 0 or offset < 0 or offset + count * dtype.itemsize > self.size:
            raise ValueError(f"a tensor outside of its area: {dtype}, {[*shape]}, {offset}")
        return count

    def put(self, tensor: torch.Tensor) -> None:
        """Copy one to the beginning; it is none of the area's, and fits."""
        try:
            data = tensor.view(-1).numpy().data.cast("B")
        except (RuntimeError, TypeError):
            # Its values do not lie in order, numpy does not know them, or there are none.
            self.part(tensor.dtype, tensor.shape).copy_(tensor)
        else:
            self.fill((data,))

    def fill(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Copy bytes from the beginning on, one piece behind the other; they fit."""
        at = 0
        for piece in pieces:
            end = at + len(piece)
            if end - at < _LARGE:
                self._memory[at:end] = piece
            else:
                np.copyto(self._bytes(end - at, at), np.frombuffer(piece, np.uint8))
            at = end

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is this area's."""
        return self.address <= tensor.data_ptr() < self.address + self.size

    @property
    def is_used(self) -> bool:
        """Whether there are tensors of this memory: each keeps a reference to it, besides these two."""
        return sys.getrefcount(self._memory) > 2

    def write(self, tensors: Sequence[torch.Tensor]) -> list[Place]:
        """Copy tensors from the beginning on; none of them is the area's, and they fit."""
        places: list[Place] = []
        for tensor, offset in zip(tensors, _offsets(tensors), strict=True):
            place = [dtype_name(tensor.dtype), list(tensor.shape), offset]
            if tensor.numel():
                self.tensor(place).copy_(tensor)
            places.append(place)
        return places


def bytes_for(tensors: Sequence[torch.Tensor]) -> int:
    """How large an area must be to hold them."""
    offsets = _offsets(tensors)
    return offsets[-1] + tensors[-1].nbytes if tensors else 0


def anonymous_file(size: int) -> int:
    """The descriptor of a file in memory, without a name, that cannot become shorter."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("splitlearn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())


def can_shrink(descriptor: int) -> bool:
    """Whether a file that another process has made may become shorter: reading it would then be fatal."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        return not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        return True


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in a message: an attribute of torch."""
    return str(dtype).removeprefix("torch.")


def whole_pages(size: int) -> int:
    """Bytes of as many pages as hold `size` bytes."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _offsets(tensors: Sequence[torch.Tensor]) -> list[int]:
    offsets, end = [], 0
    for tensor in tensors:
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        offsets.append(begin)
        end = begin + tensor.nbytes
    return offsets
