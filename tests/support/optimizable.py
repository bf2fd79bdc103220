"""Small modules that can be optimized, and how a test optimizes one without a server."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.runtime.optimize import frozen
from splitlearn_manager.runtime.optimize.choosing import Optimized, optimize
from splitlearn_manager.runtime.optimize.frozen import Frozen
from support.models import model_config

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler, and this machine has none",
)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


def convolution() -> nn.Module:
    """With batch norms that have seen something."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    for norm in (module[1], module[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
    return module.eval()


class Transformer(nn.Module):
    """Ids [batch, seq] → [batch, seq, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.register_buffer("places", torch.randn(32, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 32)
        self.narrow = nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places: torch.Tensor = self.places  # type: ignore[assignment]
        hidden = self.tokens(ids) + places[: ids.shape[1]]
        seen = self.norm(hidden)
        hidden = hidden + self.attention(seen, seen, seen, need_weights=False)[0]
        answer: torch.Tensor = hidden + self.narrow(torch.relu(self.wide(hidden)))
        return answer


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer().eval()


SHAPES: dict[str, tuple[int, ...]] = {
    "mlp": (-1, 8),
    "convolution": (-1, 3, -1, -1),
    "transformer": (-1, -1),
}


def built(kind: str) -> nn.Module:
    return {"mlp": mlp, "convolution": convolution, "transformer": transformer}[kind]()


def optimized(
    module: nn.Module,
    how: str,
    shape: Sequence[int],
    *,
    answered: Sequence[int] | None = None,
    cache_dir: Path | None = None,
    **keys: object,
) -> tuple[ModelComputeFunction, Optimized]:
    """The function of a module, optimized; free sizes are 1 for the batch and 12 else."""
    keys = {"batch_size": 8, **keys}
    config = model_config("m.pt", optimize=how, config={"input_shape": list(shape)}, **keys)
    function = ModelComputeFunction(module, input_shape=shape)
    sizes = [12 if size == -1 else size for size in shape]
    if shape[0] == -1:
        sizes[0] = 1
    return function, optimize(function, config, answered or tuple(sizes), 1.0, cache_dir=cache_dir)


def operators(form: Frozen) -> list[str]:
    """The names of what the program for batches calls."""
    graph = form._programs[0].folded.graph
    return [
        getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"
    ]


def take(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Have one of the forms of a frozen program, `folded` or `packed`, be the faster one."""

    def least_times(
        forms: Mapping[str, object], inputs: Sequence[torch.Tensor], _clock: object
    ) -> dict[str, tuple[float, ...]]:
        return {name: (1.0 if name == form else 2.0,) * len(inputs) for name in forms}

    monkeypatch.setattr(frozen, "least_times", least_times)
