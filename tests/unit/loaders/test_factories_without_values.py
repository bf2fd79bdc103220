"""A factory's module is built without the random numbers that a file replaces, and is right all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel
from support.models import model_config

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.extend()

    def extend(self):
        pass

    def forward(self, x):
        return self.second(self.first(x))

class ComputedBuffer(Net):
    def extend(self):
        self.register_buffer("scale", torch.arange(8.0) + 1, persistent=False)

    def forward(self, x):
        return super().forward(x) * self.scale

class BufferOfRandomNumbers(Net):
    # Nobody fills it: it must have its numbers, those of the seed.
    def extend(self):
        torch.manual_seed(7)
        self.register_buffer("noise", torch.randn(8), persistent=False)

    def forward(self, x):
        return super().forward(x) + self.noise

class LooksAtItsWeights(Net):
    # What it computes from the weights that it was made with stays.
    def extend(self):
        torch.manual_seed(7)
        nn.init.normal_(self.first.weight)
        self.register_buffer("norm", self.first.weight.detach().norm(), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.norm

class CopyAtTheSide(Net):
    def extend(self):
        torch.manual_seed(7)
        nn.init.normal_(self.first.weight)
        self.side = self.first.weight.detach().clone()

    def forward(self, x):
        return super().forward(x) + self.side.sum()

class Tied(Net):
    def extend(self):
        self.second.weight = self.first.weight

class TiedAndLooksAtThem(Tied):
    def extend(self):
        super().extend()
        self.was = self.first.weight.detach().norm()

class TreeOfThem(Net):
    def extend(self):
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        nn.init.orthogonal_(self.parts[0].weight)
        nn.init.trunc_normal_(self.parts[1].weight)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return super().forward(x)

class DrawsAndDecides(Net):
    # How it is built depends on a number that is drawn after weights were.
    def extend(self):
        torch.manual_seed(7)
        nn.init.normal_(self.first.weight)
        self.sign = 1.0 if torch.rand(1).item() < 0.5 else -1.0

    def forward(self, x):
        return super().forward(x) * self.sign
"""
NAMES = [
    "Net",
    "ComputedBuffer",
    "BufferOfRandomNumbers",
    "LooksAtItsWeights",
    "CopyAtTheSide",
    "Tied",
    "TreeOfThem",
    "DrawsAndDecides",
]


@pytest.fixture
def factories(tmp_path: Path) -> dict[str, type[nn.Module]]:
    (tmp_path / "odd_nets.py").write_text(FACTORIES)
    namespace: dict[str, type[nn.Module]] = {}
    exec(FACTORIES, namespace)
    return namespace


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_the_module_that_was_saved(
    factories: dict[str, type[nn.Module]], tmp_path: Path, name: str
) -> None:
    net = factories[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    torch.save(net.state_dict(), tmp_path / "m")
    config = model_config(tmp_path / "m", config={"factory": f"odd_nets:{name}"})
    loaded = ModelLoader().load(config.with_base_dir(tmp_path), "cpu").module
    x = torch.randn(4, 8)
    assert torch.equal(loaded(x), net(x))


@pytest.mark.parametrize("name", ["Tied", "TiedAndLooksAtThem"])
@pytest.mark.parametrize("left_out", ["first.weight", "second.weight"])
def test_one_name_of_tied_weights_is_enough(
    factories: dict[str, type[nn.Module]], tmp_path: Path, name: str, left_out: str
) -> None:
    net = factories[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    weights = dict(net.state_dict())
    del weights[left_out]
    save_file(weights, tmp_path / "m")
    config = model_config(tmp_path / "m", config={"factory": f"odd_nets:{name}"})
    loaded = ModelLoader().load(config.with_base_dir(tmp_path), "cpu").module
    x = torch.randn(4, 8)
    assert torch.equal(loaded(x), net(x))
    del weights[({"first.weight", "second.weight"} - {left_out}).pop()]
    save_file(weights, tmp_path / "m")
    with pytest.raises(InvalidModel, match=r"missing: first\.weight, second\.weight"):
        ModelLoader().load(config.with_base_dir(tmp_path), "cpu")


PEAK = """
import resource, sys
import torch
from pathlib import Path
from splitlearn_manager.core.model_loader import ModelLoader
from support.models import model_config

def load(name):
    path = Path(sys.argv[1]) / name
    keys = {"factory": "large_net:build", "kwargs": {"width": 64 if name == "small" else 4096}}
    return ModelLoader().load(model_config(path, config=keys).with_base_dir(path.parent), "cpu")

kept = load("small")  # what loading needs once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = load("large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / large.weights_mb)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize("form", ["state dict", "whole"])
def test_a_load_takes_little_more_than_the_weights(tmp_path: Path, form: str) -> None:
    (tmp_path / "large_net.py").write_text(
        "from torch import nn\n"
        "def build(width):\n"
        "    return nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])\n"
    )
    for name, width in (("small", 64), ("large", 4096)):
        net = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        torch.save(net if form == "whole" else net.state_dict(), tmp_path / name)
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) <= 1.1
