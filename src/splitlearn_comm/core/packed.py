"""Tensors in the form in which they travel: the bytes of a request, and the rows of an answer.

A request's bytes become a tensor only when its batch is formed, all in one piece; a batch's output is viewed
as bytes once, and each request is sent its rows of them. Every operation of torch lets other threads of the
interpreter go first, so that a few operations less for each request count for more than their own time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from splitlearn_comm.core.lanes import empty, worth_pinning

if TYPE_CHECKING:
    from splitlearn_comm.core.codec import TensorCodec


@dataclass(frozen=True, slots=True)
class Packed:
    """The bytes of a tensor, which fit its shape and dtype.

    Attributes:
        data: C-contiguous and little-endian; a view is owned by whoever has this object.
    """

    data: bytes | memoryview
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Its size in dimension 0; 0 for a scalar."""
        return self.shape[0] if self.shape else 0

    def tensor(self) -> torch.Tensor:
        """A CPU tensor that may be written to. Immutable bytes are copied, a view is taken over."""
        if not self.data:
            return torch.empty(self.shape, dtype=self.dtype)
        view = isinstance(self.data, memoryview)
        owned = taken_over(self.data) if view else bytearray(self.data)  # type: ignore[arg-type]
        return _of(owned, self.dtype, self.shape)


def joined(parts: Sequence[Packed], *, pinned: bool = False) -> torch.Tensor:
    """One CPU tensor of all rows, in order, copied once.

    Args:
        parts: of one dtype, and of the same sizes but for dimension 0.
        pinned: in memory that a GPU reads by itself, where that is worth it.
    """
    first = parts[0]
    if len(parts) == 1 and not pinned:
        return first.tensor()
    rows = sum(part.rows for part in parts)
    shape = (rows, *first.shape[1:]) if len(parts) > 1 else first.shape
    if (
        pinned
        and first.dtype is not torch.bool
        and worth_pinning(sum(len(part.data) for part in parts))
    ):
        return _filled(empty(shape, first.dtype, pinned=True), parts)
    if len(parts) == 1:
        return first.tensor()
    owned = bytearray().join([part.data for part in parts])
    return _of(owned, first.dtype, shape) if owned else torch.empty(shape, dtype=first.dtype)


def strung(parts: Sequence[Packed]) -> torch.Tensor:
    """All values of tensors of one dtype but bool, one behind the other: one dimension, copied once."""
    owned = bytearray().join([part.data for part in parts])
    dtype = parts[0].dtype
    return torch.frombuffer(owned, dtype=dtype) if owned else torch.empty(0, dtype=dtype)


def _filled(tensor: torch.Tensor, parts: Sequence[Packed]) -> torch.Tensor:
    memory, at = tensor.view(-1).view(torch.uint8).numpy().data, 0
    for part in parts:
        memory[at : at + len(part.data)] = part.data
        at += len(part.data)
    return tensor


class Output:
    """What a model answered to a batch, on the processor.

    Args:
        answer: as a tensor, or as its bytes.

    Attributes:
        shape: of the answer.
    """

    __slots__ = ("_packed", "_tensor", "_views", "shape")

    def __init__(self, answer: torch.Tensor | Packed) -> None:
        self._packed = answer if isinstance(answer, Packed) else None
        self._tensor = None if isinstance(answer, Packed) else answer
        self.shape: Sequence[int] = answer.shape
        self._views: dict[torch.dtype, memoryview] = {}

    def rows(self, first: int, count: int) -> Rows:
        """Those that answer one request of the batch."""
        return Rows(self, first, count)

    def rows_as(self, first: int, count: int, shape: Sequence[int]) -> Rows:
        """Rows that are an answer of that shape, of as many values."""
        return Rows(self, first, count, shape)

    def whole(self) -> Rows:
        """All of it, whatever its shape."""
        return Rows(self, 0, None)

    def tensor(self) -> torch.Tensor:
        """As a tensor, the same one each time."""
        if self._tensor is None:
            assert self._packed is not None
            self._tensor = self._packed.tensor()
        return self._tensor

    def view(self, codec: TensorCodec) -> memoryview:
        """All bytes, for a codec that packs nothing.

        Raises:
            TypeError: if it is no dense tensor of real numbers.
        """
        view = self._views.get(codec.dtype)
        if view is None:
            packed = self._packed
            if packed is None or packed.dtype is not codec.dtype:
                view = memoryview(codec.view(self.tensor())[0])
            else:
                view = memoryview(packed.data)
            self._views[codec.dtype] = view
        return view


class Rows:
    """The part of an output that answers one request.

    Args:
        count: None for all of it.
        shape: the answer's, where it is not that of so many rows.
    """

    __slots__ = ("_count", "_first", "_output", "_shape")

    def __init__(
        self,
        output: Output,
        first: int,
        count: int | None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self._output = output
        self._first = first
        self._count = count
        self._shape = shape

    def tensor(self) -> torch.Tensor:
        """As a tensor, which shares the output's memory."""
        whole = self._output.tensor()
        if self._count is None:
            return whole
        rows = whole.narrow(0, self._first, self._count)
        return rows if self._shape is None else rows.reshape(tuple(self._shape))

    def view(self, codec: TensorCodec) -> tuple[bytes | memoryview, Sequence[int]]:
        """As `TensorCodec.view`; the bytes are valid as long as this object is.

        Raises:
            TypeError: if it is no dense tensor of real numbers.
        """
        if not codec.plain:
            return codec.view(self.tensor())
        view, shape = self._output.view(codec), self._output.shape
        if self._count is None:
            return view, shape
        row = len(view) // shape[0]
        mine = view[self._first * row : (self._first + self._count) * row]
        return mine, (self._count, *shape[1:]) if self._shape is None else self._shape


def _of(
    owned: bytearray | ctypes.Array[ctypes.c_char], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    if dtype is torch.bool:
        # Only 0 and 1 are bools; other byte values would behave differently from operation to operation.
        return torch.frombuffer(owned, dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(owned, dtype=dtype).reshape(shape)


def taken_over(view: memoryview) -> ctypes.Array[ctypes.c_char]:
    """The memory of a view of bytes, writable, for somebody who alone will use it from now on.

    Only for views of large objects: small ones may be shared by the whole interpreter.
    """
    address = np.frombuffer(view, dtype=np.uint8).ctypes.data
    memory = (ctypes.c_char * len(view)).from_address(address)
    # What is made of the array keeps it alive, and it the bytes.
    memory._bytes = view  # type: ignore[attr-defined]
    return memory
