"""Whether an optimized model gives the plain model's answer.

For each value, with t = `optimize_tolerance`, absolute and relative at once:

    |optimized - plain| ≤ t · (1 + |plain|)

Values that are not finite, and integers and bools, must be the same; so must shape and dtype.
"""

from __future__ import annotations

import math

import torch


def difference(optimized: torch.Tensor, plain: torch.Tensor) -> float:
    """The smallest tolerance within which the answers agree; infinite if there is none."""
    if optimized.shape != plain.shape or optimized.dtype != plain.dtype:
        return math.inf
    if torch.equal(optimized, plain):
        return 0.0
    if not plain.is_floating_point():
        return math.inf
    mine, theirs = optimized.detach().double(), plain.detach().double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    apart = torch.where(same, 0.0, (mine - theirs).abs() / (1 + theirs.abs()))
    # Infinity beside a number, or NaN beside one, gives NaN or infinity.
    return float(apart.max()) if bool(apart.isfinite().all()) else math.inf
