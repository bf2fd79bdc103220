"""Lets models in worker processes that have the same weights share one copy of them, by content.

    worker   moves its parameters into a file in memory, and tells the node which lie where
    node     keeps the descriptor, and offers what lies there to each worker that loads
    worker   compares an offered parameter that looks alike with the file, byte by byte, and maps it instead
             of reading it

What is mapped is the borrower's own from the first write on (copy on write), and the lender never writes: as
within one process only parameters are shared, of models that surely leave them as they are. When the lender
ends, what nobody borrowed is given back to the system; the rest lives on.

This is the node's part; the workers' is `worker.lending`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from splitlearn_manager.runtime.channel import MOST_DESCRIPTORS, Message
from splitlearn_manager.runtime.shared_area import whole_pages

Entry = list[Any]
"""[dtype, shape, checksum of the first elements, offset in bytes] of a parameter."""

_MOST_LENDERS = MOST_DESCRIPTORS // 2
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


@dataclass
class _File:
    """A file of parameters. `users`: the workers that map an entry, by its offset."""

    descriptor: int
    entries: dict[int, Entry]
    users: dict[int, set[int]] = field(default_factory=dict)


class LentWeights:
    """The node's book of who lends and who borrows; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[int, _File] = {}
        self._offers = 0

    @contextmanager
    def offer(self) -> Iterator[tuple[list[Any], list[int]]]:
        """(lenders, descriptors) for one load. Nothing of it is given back before the block ends."""
        descriptors: list[int] = []
        with self._lock:
            self._offers += 1
        try:
            with self._lock:
                chosen = list(self._files.items())[-_MOST_LENDERS:]
                lenders = [[worker, [*file.entries.values()]] for worker, file in chosen]
                for _, file in chosen:
                    descriptors.append(os.dup(file.descriptor))
            yield lenders, descriptors
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            with self._lock:
                self._offers -= 1
                self._give_back()

    def loaded(self, worker: int, answer: Message, descriptors: Sequence[int]) -> None:
        """A worker has loaded; within the block of its offer. The descriptor is kept."""
        with self._lock:
            for lender, offset in answer["borrowed"]:
                file = self._files.get(lender)
                if file is not None and offset in file.entries:
                    file.users.setdefault(offset, set()).add(worker)
            if descriptors:
                entries = {int(entry[3]): entry for entry in answer["lent"]}
                users = {offset: {worker} for offset in entries}
                self._files[worker] = _File(descriptors[0], entries, users)

    def gone(self, worker: int) -> None:
        """A worker has ended."""
        with self._lock:
            for file in self._files.values():
                for users in file.users.values():
                    users.discard(worker)
            self._give_back()

    def _give_back(self) -> None:
        if self._offers:
            return
        for worker, file in list(self._files.items()):
            for offset in [o for o in file.entries if not file.users.get(o)]:
                entry = file.entries.pop(offset)
                _punch(file.descriptor, offset, _bytes_of(entry))
            if not file.entries:
                os.close(file.descriptor)
                del self._files[worker]


def _punch(descriptor: int, offset: int, size: int) -> None:
    if sys.platform == "linux":
        punch = ctypes.CDLL(None, use_errno=True).fallocate
        punch(
            descriptor,
            _PUNCH_HOLE_KEEP_SIZE,
            ctypes.c_long(offset),
            ctypes.c_long(whole_pages(size)),
        )


def _bytes_of(entry: Entry) -> int:
    dtype: torch.dtype = getattr(torch, entry[0])
    return torch.Size(entry[1]).numel() * dtype.itemsize
