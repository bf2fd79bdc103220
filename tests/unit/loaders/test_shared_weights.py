"""Models with the same weights share one copy, and nothing that one of them does is seen by another."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.model_loader import ModelLoader
from support.models import model_config

WIDTH = 256
"""Weights of 256 KB, which are worth sharing."""

FACTORY = f"""
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear({WIDTH}, {WIDTH}), nn.BatchNorm1d({WIDTH}))

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear({WIDTH}, {WIDTH})

    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.add_(1.0)
        return self.linear(x)

def counting():
    return Counting()
"""


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).eval()


@pytest.fixture(params=["whole", "state dict", "safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "shared_nets.py").write_text(FACTORY)
    path = tmp_path / "m"
    match request.param:
        case "whole":
            torch.save(network(), path)
        case "state dict":
            torch.save(network().state_dict(), path)
        case "safetensors":
            save_file(network().state_dict(), path)
    return path


def load(path: Path, **config: object) -> nn.Module:
    keys = {"factory": "shared_nets:plain", **config}
    described = model_config(path, config=keys).with_base_dir(path.parent)
    return ModelLoader().load(described, "cpu").module


def weight_of(module: nn.Module) -> torch.Tensor:
    return next(p for p in module.parameters() if p.dim() == 2)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_two_models_of_the_same_weights_share_them(path: Path) -> None:
    first, second = load(path), load(path)
    assert address(weight_of(first)) == address(weight_of(second))
    x = torch.randn(3, WIDTH)
    assert torch.equal(first(x), network()(x))
    assert torch.equal(second(x), network()(x))


def test_buffers_are_never_shared(path: Path) -> None:
    first, second = load(path), load(path)
    addresses = [{address(b) for b in m.buffers()} for m in (first, second)]
    assert not addresses[0] & addresses[1]


def test_other_weights_of_the_same_shape_are_not_shared(path: Path) -> None:
    first = load(path)
    other = network()
    with torch.no_grad():
        other[0].weight[-1, -1] += 1.0  # its beginning is the same
    torch.save(other, path.with_name("other"))
    second = load(path.with_name("other"))
    assert address(weight_of(first)) != address(weight_of(second))
    assert torch.equal(weight_of(second), other[0].weight)


def test_another_dtype_is_not_shared(path: Path) -> None:
    first, second = load(path), load(path, dtype="bfloat16")
    assert address(weight_of(first)) != address(weight_of(second))
    assert torch.equal(weight_of(second), network()[0].weight.bfloat16())


def test_what_is_shared_is_gone_with_its_last_owner(path: Path) -> None:
    first, second = load(path), load(path)
    owners = [weakref.ref(weight_of(m)) for m in (first, second)]
    del first
    gc.collect()
    assert torch.equal(weight_of(second), network()[0].weight)
    del second
    gc.collect()
    assert [owner() for owner in owners] == [None, None]


def test_a_module_that_writes_to_its_weights_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "shared_nets.py").write_text(FACTORY)
    layer = network()[0]
    torch.save({f"linear.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "m")
    torch.save(layer, tmp_path / "plain")
    plain = load(tmp_path / "plain")
    first = load(tmp_path / "m", factory="shared_nets:counting")
    second = load(tmp_path / "m", factory="shared_nets:counting")
    first(torch.zeros(1, WIDTH))
    assert torch.equal(weight_of(plain), layer.weight)
    assert torch.equal(weight_of(second), layer.weight)


def test_training_one_of_them_leaves_the_others_as_they_were(path: Path) -> None:
    first, second = load(path), load(path)
    before = weight_of(second).detach().clone()
    function = ModelComputeFunction(first, "cpu", "first")
    output = function.forward_for_training(torch.randn(2, WIDTH), "f")
    function.backward("f", torch.ones_like(output), learning_rate=0.5)
    assert not torch.equal(weight_of(first), before)
    assert torch.equal(weight_of(second), before)


def test_a_file_that_is_rewritten_or_cut_off_changes_no_model_in_memory(path: Path) -> None:
    first, second = load(path), load(path)
    x = torch.randn(3, WIDTH)
    expected = network()(x)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(first(x), expected)
    with path.open("r+b") as file:
        file.truncate(16)
    assert torch.equal(second(x), expected)
