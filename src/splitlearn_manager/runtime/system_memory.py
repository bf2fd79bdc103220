"""Gives memory that is no longer used back to the system, and to the GPU."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back(device: str) -> None:
    """After a model is dropped: collect garbage, empty torch's cache of GPU memory, trim the heap.

    Args:
        device: where the model was: cpu, cuda:0, mps.
    """
    import torch

    gc.collect()
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
