"""What this process asks of the system's memory: large pages for weights, to keep what the next batch needs,
and to take back what is free.

Nothing here allocates, and nothing depends on whether the system does as it is asked.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_HUGE_PAGE = 2 * 2**20
_PAGE = 4096
_MADV_HUGEPAGE = 14
"""Linux's number for it; Python has it only as an attribute of `mmap`."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""
_OWN_MAPPING = 32 * 2**20
"""Larger blocks have a mapping of their own, which goes when they are freed; glibc takes no more."""
_KEPT_FREE = 2 * _OWN_MAPPING
_KEPT_WHILE_FREEING = 128 * 1024
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def prefer_huge_pages(address: int, size: int) -> None:
    """Ask for pages of 2 MB for memory that is about to be written for the first time.

    The system then hands out (and clears) 2 MB at a time, not 4 KB, which is most of what reading weights
    from the page cache costs. Memory use does not change: only whole 2 MB inside the range are affected.

    Args:
        address, size: in bytes; memory that this process has allocated.
    """
    begin = -(-address // _PAGE) * _PAGE
    length = (address + size) // _PAGE * _PAGE - begin
    if sys.platform == "linux" and length >= _HUGE_PAGE:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)


def keep_for_the_next_batch() -> None:
    """Have the C library keep up to 64 MB of free memory for each thread, for as long as no model goes.

    As it starts, it hands what a forward frees back to the system at once, and each batch has its pages
    cleared anew: a fifth of the processor time of a small convolution net. It comes to these limits by
    itself (mallopt(3), "dynamic mmap threshold"), but only once blocks of that size were freed. What the
    environment says of them goes first. `trim_heap` returns what is free in any case.
    """
    told = any(name in os.environ for name in _MALLOC_VARIABLES)
    if sys.platform != "linux" or told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)
        _returning.mallopt = mallopt


class _Returning:
    """See `returning_what_is_freed`: the setting is the process's, and models may go at the same time.

    Attributes:
        mallopt: sets what the C library keeps; None as long as it was not told to keep anything.
    """

    def __init__(self) -> None:
        self.mallopt: Callable[[int, int], object] | None = None
        self._lock = threading.Lock()
        self._going = 0

    def add(self, going: int) -> None:
        """One more model goes, or one less."""
        with self._lock:
            self._going += going
            if self.mallopt is not None:
                kept = _KEPT_WHILE_FREEING if self._going else _KEPT_FREE
                self.mallopt(_M_TRIM_THRESHOLD, kept)


_returning = _Returning()


@contextmanager
def returning_what_is_freed() -> Iterator[None]:
    """Have the C library return at once what is freed until the end of the block: a model's weights.

    `trim_heap` does not return what is free at the end of the memory of a thread. Weights are read by threads
    of their own, and are often the end of it.
    """
    _returning.add(1)
    try:
        yield
    finally:
        _returning.add(-1)


def give_back(device: str, is_freed: Callable[[], bool] = lambda: False) -> None:
    """After a model is dropped: collect garbage, empty torch's cache of GPU memory, trim the heap.

    Args:
        device: where the model was: cpu, cuda:0, mps.
        is_freed: whether all of the model is gone already. Then no garbage is looked for: that stops all
            threads for as long as it takes to look at every object of the process.
    """
    if not is_freed():
        gc.collect()
    empty_caches(device)


def watch_module(module: nn.Module) -> Callable[[], bool]:
    """A function that tells later whether all parts and weights of a module are gone, and keeps none."""
    parts = (*module.modules(), *module.parameters(), *module.buffers())
    watched = [weakref.ref(part) for part in parts]
    return lambda: all(part() is None for part in watched)


def empty_caches(device: str) -> None:
    """Give back what torch and the C library keep for the next allocation, without looking for garbage.

    Args:
        device: as for `give_back`.
    """
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Have the C library return free pages to the system.

    Only glibc keeps free pages for itself by the gigabyte, and only glibc has a call against it.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
