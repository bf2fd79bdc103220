"""What this process asks of the system's memory: large pages for weights, and to take back what is free.

Nothing here allocates, and nothing depends on whether the system does as it is asked.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_HUGE_PAGE = 2 * 2**20
_PAGE = 4096
_MADV_HUGEPAGE = 14
"""Linux's number for it; Python has it only as an attribute of `mmap`."""


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
