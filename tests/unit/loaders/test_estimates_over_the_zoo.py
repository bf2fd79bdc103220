"""Every kind of model in every dtype: what its files say of its size, against what its load measured."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import estimate_mb, resolve_source
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.runtime.thread import ThreadRuntime

WIDE = 256
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = (*FLOATS, "int8")

# The modules and their code: in a file of their own, so that whatever unpickles them finds them.
NET = f"""
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Packed(nn.Module):
    '''A linear layer whose weights are in 8 bits, with one scale for each output.'''

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("packed", torch.ones(outputs, inputs, dtype=torch.int8))
        self.scale = nn.Parameter(torch.full((outputs, 1), 0.01))

    def forward(self, x):
        return x @ (self.packed * self.scale).t()


class Float(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.first = nn.Linear({WIDE}, 2 * {WIDE})
        self.second = nn.Linear(2 * {WIDE}, {WIDE})
        self.third = nn.Linear({WIDE}, 2 * {WIDE}, bias=False)
        if tied:
            self.third.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(1000, dtype=torch.int64))

    def forward(self, x):
        return self.second(self.first(x) + self.third(x))


def build(dtype="float32", tied=True):
    if dtype == "int8":
        return nn.Sequential(Packed({WIDE}, 2 * {WIDE}), Packed(2 * {WIDE}, {WIDE}))
    return Float(tied).to(getattr(torch, dtype))


class ZooConfig(PretrainedConfig):
    model_type = "zoo"

    def __init__(self, numbers="float32", **keys):
        super().__init__(**keys)
        self.numbers = numbers


class ZooModel(PreTrainedModel):
    config_class = ZooConfig
    base_model_prefix = "net"
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        if config.numbers == "int8":
            self.net = nn.Sequential(Packed({WIDE}, 2 * {WIDE}), Packed(2 * {WIDE}, {WIDE}))
        else:
            self.net = nn.Sequential(nn.Linear({WIDE}, 2 * {WIDE}), nn.Linear(2 * {WIDE}, {WIDE}))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x, **keys):
        return (self.net(x),)
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that NET is, which the loaders find beside the model."""
    import importlib
    import sys

    (tmp_path / "zoo_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo_net", raising=False)
    module = importlib.import_module("zoo_net")
    yield module
    sys.modules.pop("zoo_net", None)


def example(dtype: str) -> torch.Tensor:
    return torch.ones(2, WIDE, dtype=FLOATS.get(dtype, torch.float32))


def whole_module(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    torch.save(zoo.build(dtype).eval(), path / "m.pt")
    return {"model_path": "m.pt", "trusted": True}


def state_dict(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    torch.save(zoo.build(dtype).state_dict(), path / "m.pt")
    return {"model_path": "m.pt", "config": _built(dtype)}


def training_checkpoint(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    """With an optimizer's state, twice as large as the weights, which is not loaded."""
    weights = zoo.build(dtype).state_dict()
    moments = [{"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for w in weights.values()]
    state = dict(enumerate(moments))
    torch.save({"model": weights, "optimizer": {"state": state}, "epoch": 3}, path / "m.pt")
    return {"model_path": "m.pt", "config": _built(dtype)}


def safetensors(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    # The format has no shared tensors.
    save_file(zoo.build(dtype, tied=False).state_dict(), path / "m.safetensors")
    return {"model_path": "m.safetensors", "config": _built(dtype, tied=False)}


def sharded_huggingface(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    zoo.ZooConfig.register_for_auto_class()
    zoo.ZooModel.register_for_auto_class("AutoModel")
    model = zoo.ZooModel(zoo.ZooConfig(numbers=dtype))
    if dtype in FLOATS:
        model = model.to(FLOATS[dtype])
    model.save_pretrained(path / "hf", max_shard_size="200KB")
    shards = json.loads((path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 1
    return {"model_path": "hf", "trusted": True}


def torchscript(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    torch.jit.save(torch.jit.trace(zoo.build(dtype).eval(), example(dtype)), str(path / "m.pt"))
    return {"model_path": "m.pt"}


def export_archive(zoo: Any, path: Path, dtype: str) -> dict[str, Any]:
    program = torch.export.export(zoo.build(dtype).eval(), (example(dtype),))
    torch.export.save(program, path / "m.pt2")
    return {"model_path": "m.pt2", "trusted": True}


def _built(dtype: str, **kwargs: object) -> dict[str, Any]:
    return {"factory": "zoo_net:build", "kwargs": {"dtype": dtype, **kwargs}}


KINDS: tuple[Callable[..., dict[str, Any]], ...] = (
    whole_module,
    state_dict,
    training_checkpoint,
    safetensors,
    sharded_huggingface,
    torchscript,
    export_archive,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", KINDS)
def test_the_estimate_is_what_the_load_measures(
    zoo: Any, tmp_path: Path, save: Callable[..., dict[str, Any]], dtype: str
) -> None:
    check(tmp_path, save(zoo, tmp_path, dtype), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("save", [whole_module, state_dict, safetensors, sharded_huggingface])
def test_so_it_is_where_the_load_converts(
    zoo: Any, tmp_path: Path, save: Callable[..., dict[str, Any]], dtype: str
) -> None:
    keys = save(zoo, tmp_path, "float32")
    keys["config"] = {**keys.get("config", {}), "dtype": dtype}
    check(tmp_path, keys, dtype)


def check(tmp_path: Path, keys: dict[str, Any], dtype: str) -> None:
    """Loads it as a node would, and compares."""
    keys["config"] = {**keys.get("config", {}), "input_shape": [2, WIDE]}
    config = ModelConfig.model_validate({"model_id": "m", "device": "cpu", **keys})
    config = config.with_base_dir(tmp_path)
    estimated = estimate_mb(resolve_source(config), config)
    assert estimated.weights_mb is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = ThreadRuntime(ModelLoader()).start(config, "cpu")
    try:
        assert running.warmed, running.notes
        error = estimated.weights_mb / running.memory_mb - 1
        assert -0.02 <= error <= 0.03, (estimated, running.memory_mb)
        assert running.measure_activations() is not None
        stored = {t.dtype for t in _tensors(running.compute_function.model)}  # type: ignore[attr-defined]
        assert (torch.int8 if dtype == "int8" else FLOATS[dtype]) in stored
    finally:
        running.close()


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
