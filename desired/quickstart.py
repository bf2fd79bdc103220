"""Builds the model that mlp.yaml declares; the node calls `mlp` when it loads it."""

import torch
from torch import nn


def mlp(width: int = 768, hidden: int = 1024, seed: int = 0) -> nn.Module:
    """Two linear layers with random weights: input and output [..., width] float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
