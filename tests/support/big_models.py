"""Models of any size that cost no disk: safetensors files with holes, each with an answer of its own."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from support.served import declare

WIDTH = 4
X = torch.ones(1, WIDTH)

_FACTORY = """
import torch
from torch import nn


class Big(nn.Module):
    def __init__(self, mb):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(mb * 2**18), requires_grad=False)

    def forward(self, x):
        return x * self.weight[0]


def big(mb):
    return Big(mb)
"""


def write_factory(directory: Path) -> None:
    """`bigs.py`, whose models answer their input times their first weight."""
    (directory / "bigs.py").write_text(_FACTORY, encoding="utf-8")


def declare_big(directory: Path, model_id: str, mb: int, answer: float, **keys: object) -> None:
    """A model of `mb` MB that answers `answer`. Its weights, all others 0, are beside the directory."""
    weights = directory.parent / f"{model_id}.safetensors"
    size = mb * 2**20
    entry = {"weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    header += b" " * (-len(header) % 8)
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<f", answer))
        file.truncate(8 + len(header) + size)
    config = {"factory": "bigs:big", "kwargs": {"mb": mb}, "input_shape": [1, WIDTH]}
    declare(directory, model_id, model_path=str(weights), config=config, **keys)
