"""How tensors travel to the servers that have no wire of their own.

The number of sizes, the sizes, the values; all little-endian: uint32 numbers, then float32 values.
"""

from __future__ import annotations

import numpy as np
import torch


def packed(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes."""
    sizes = np.array([tensor.dim(), *tensor.shape], dtype="<u4")
    return sizes.tobytes() + tensor.contiguous().numpy().tobytes()


def unpacked(data: bytes) -> torch.Tensor:
    """The tensor of these bytes; what is made of it must not write into it."""
    count = int(np.frombuffer(data, "<u4", 1)[0])
    sizes = np.frombuffer(data, "<u4", count, offset=4)
    values = np.frombuffer(data, "<f4", offset=4 * (1 + count)).copy()
    return torch.from_numpy(values.reshape(tuple(int(size) for size in sizes)))
