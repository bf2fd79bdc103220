"""The worker's part of sharing weights: it lends its parameters, and borrows those of others.

How the whole goes is told in `runtime.lent_weights`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from splitlearn_manager.core.loaders.sharing import can_be_shared, looks_of, never_writes
from splitlearn_manager.runtime.lent_weights import Entry
from splitlearn_manager.runtime.shared_area import anonymous_file, dtype_name, whole_pages


class Lent:
    """The parameters of this worker's model that others may borrow.

    Attributes:
        entries: which they are, and where they lie.
        descriptors: the file in which they lie; none if there are none.
    """

    def __init__(self, module: nn.Module, borrowed: Borrowed) -> None:
        self.entries: list[Entry] = []
        self.descriptors: list[int] = []
        if not hasattr(os, "memfd_create") or not never_writes(module):
            return
        lent = [p for p in module.parameters() if can_be_shared(p) and not borrowed.has(p)]
        size = sum(whole_pages(p.nbytes) for p in lent)
        if not size:
            return
        descriptor, offset = anonymous_file(size), 0
        memory = _mapped(descriptor, mmap.MAP_SHARED)
        for parameter in lent:
            dtype, shape = parameter.dtype, tuple(parameter.shape)
            own = _tensor(memory, offset, dtype, shape)
            own.copy_(parameter.detach())
            self.entries.append([dtype_name(dtype), list(shape), looks_of(parameter), offset])
            parameter.data = own
            offset += whole_pages(own.nbytes)
        self.descriptors.append(descriptor)


class Borrowed:
    """What other workers have, as a load of this one asks for it.

    Args:
        lenders: [number of the lender, its entries] each.
        descriptors: of their files, in the same order; closed by `close`.
    """

    def __init__(self, lenders: Sequence[Any], descriptors: list[int]) -> None:
        self._descriptors = descriptors
        self._offered: dict[tuple[str, tuple[int, ...], int], list[tuple[int, int, int]]] = {}
        self._files: dict[int, mmap.mmap] = {}
        self._mapped: dict[int, tuple[int, int]] = {}
        for descriptor, (lender, entries) in zip(descriptors, lenders, strict=True):
            for dtype, shape, looks, offset in entries:
                form = (dtype, tuple(shape), looks)
                self._offered.setdefault(form, []).append((lender, descriptor, offset))

    def alike(
        self, dtype: torch.dtype, shape: tuple[int, ...], looks: int
    ) -> Iterator[torch.Tensor]:
        """Parameters of others of that form, mapped: they are to be compared."""
        for lender, descriptor, offset in self._offered.get((dtype_name(dtype), shape, looks), ()):
            if lender not in self._files:
                self._files[lender] = _mapped(descriptor, mmap.MAP_PRIVATE)
            found = _tensor(self._files[lender], offset, dtype, shape)
            self._mapped[found.data_ptr()] = (lender, offset)
            yield found

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of theirs."""
        return tensor.data_ptr() in self._mapped

    def used_by(self, module: nn.Module) -> list[tuple[int, int]]:
        """(lender, offset) of all that a module has borrowed."""
        found = (self._mapped.get(p.data_ptr()) for p in module.parameters())
        return [place for place in found if place is not None]

    def close(self) -> None:
        """Nothing more is borrowed; what was stays."""
        self._offered.clear()
        self._files.clear()
        while self._descriptors:
            os.close(self._descriptors.pop())


def _mapped(descriptor: int, flags: int) -> mmap.mmap:
    """All of a file; only what is touched of it takes memory."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=flags, prot=prot)


def _tensor(
    memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
