"""Modules that torch.save wrote whole are rebuilt exactly, and untrusted ones without running anything."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_manager.core.loaders.module_builder import read_module
from splitlearn_manager.core.loaders.module_records import known_globals, module_classes
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, UntrustedCheckpoint
from support.models import model_config, save_mlp


class Tied(nn.Module):
    pass


def tied() -> nn.Module:
    module = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    module["head"].weight = module["embedding"].weight
    return module


def batch_norm_with_statistics() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU())
    module(torch.rand(2, 3, 8, 8))
    return module


MODULES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Dropout(), nn.LayerNorm(4)), (2, 6)),
    (lambda: nn.Linear(4, 4).to(torch.float64), (1, 4)),
    (lambda: nn.Linear(4, 4).to(torch.bfloat16), (1, 4)),
    (batch_norm_with_statistics, (1, 3, 8, 8)),
    (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.SiLU()), (1, 2, 9)),
    (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (1, 2, 4, 4)),
    (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Softmax(-1)), (1, 2, 4, 4)),
    (lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True), (2, 5, 3)),
    (lambda: nn.GRU(3, 4), (5, 3)),
    (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2
        ),
        (1, 5, 8),
    ),
    (
        lambda: nn.TransformerEncoderLayer(
            8, 2, 16, activation=nn.functional.silu, batch_first=True
        ),
        (1, 5, 8),
    ),
    (lambda: nn.PReLU(), (3,)),
    (lambda: nn.Upsample(scale_factor=2), (1, 1, 4)),
]


@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_a_module_of_torch_layers_is_rebuilt_exactly_without_trust(
    tmp_path: Path, make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    original = make().eval()
    torch.save(original, tmp_path / "m.pt")
    rebuilt = read_module(tmp_path / "m.pt").eval()
    assert repr(rebuilt) == repr(original)
    assert vars(rebuilt).keys() == vars(original).keys()
    x = torch.rand(shape, dtype=next(original.parameters(), torch.zeros(1)).dtype)
    expected, got = original(x), rebuilt(x)
    first = (expected[0], got[0]) if isinstance(expected, tuple) else (expected, got)
    assert torch.equal(*first)


def test_the_quick_start_checkpoint_loads_untrusted_and_can_be_trained(tmp_path: Path) -> None:
    original = save_mlp(tmp_path / "model.pt")
    with torch.inference_mode():
        loaded = ModelLoader().load(model_config(tmp_path / "model.pt"), "cpu")
    x = torch.rand(2, 8)
    assert torch.equal(loaded.module(x), original(x))
    assert not loaded.module.training
    loaded.module(x).sum().backward()
    parameters = list(loaded.module.parameters())
    assert all(p.is_leaf and p.requires_grad and p.grad is not None for p in parameters)
    assert loaded.weights_mb == sum(p.nbytes for p in parameters) / 2**20
    assert loaded.loader == "pytorch"


def test_tied_weights_stay_one_and_count_once(tmp_path: Path) -> None:
    torch.save(tied(), tmp_path / "m.pt")
    rebuilt = read_module(tmp_path / "m.pt")
    assert isinstance(rebuilt, nn.ModuleDict)
    assert rebuilt["head"].weight is rebuilt["embedding"].weight
    loaded = ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")
    assert loaded.weights_mb == 5 * 4 * 4 / 2**20


def test_a_view_of_a_larger_storage_keeps_its_place(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    whole = torch.arange(20.0)
    module.weight = nn.Parameter(whole[4:16:2].view(3, 2).t())
    torch.save(module, tmp_path / "m.pt")
    assert torch.equal(read_module(tmp_path / "m.pt").weight, module.weight)


def test_a_class_of_the_users_own_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(Tied(), tmp_path / "m.pt")
    with pytest.raises(UntrustedCheckpoint) as caught:
        ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")
    message = caught.value.message
    assert "m.pt" in message
    assert "Tied" in message
    assert "trusted: true" in message
    assert "state_dict()" in message
    assert "factory" in message


def test_trusted_modules_of_any_class_load(tmp_path: Path) -> None:
    original = nn.DataParallel(nn.Linear(2, 2))
    torch.save(original, tmp_path / "m.pt")
    with pytest.raises(UntrustedCheckpoint):
        ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")
    loaded = ModelLoader().load(model_config(tmp_path / "m.pt", trusted=True), "cpu")
    assert torch.equal(loaded.module(torch.ones(1, 2)), original(torch.ones(1, 2)))


def test_a_checkpoint_with_a_module_inside_a_dict_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"net": nn.Linear(2, 2), "epoch": 3}, tmp_path / "m.pt")
    with pytest.raises(InvalidModel, match="'net', 'epoch'"):
        ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")


def test_the_archive_is_read_by_the_same_rules_that_torch_uses(tmp_path: Path) -> None:
    """A second member of the same name, or bytes around the archive, could be read in two ways."""
    path = tmp_path / "m.pt"
    save_mlp(path)
    data = path.read_bytes()
    path.write_bytes(data + b"tail")
    with pytest.raises(InvalidModel, match="bytes around it"):
        ModelLoader().load(model_config(path), "cpu")
    save_mlp(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(InvalidModel, match="named twice"):
        ModelLoader().load(model_config(path), "cpu")


def test_a_class_that_goes_by_the_name_of_a_layer_is_not_taken_for_it() -> None:
    """Torch makes such ones while it traces; no checkpoint with that layer was loaded afterwards."""
    proxy = type("Linear", (nn.Linear,), {"_modules": property(lambda self: {})})
    proxy.__module__, proxy.__qualname__ = nn.Linear.__module__, nn.Linear.__qualname__
    found = module_classes()
    assert nn.Linear in found
    assert proxy not in found


def test_the_table_of_names_holds_only_layers_activations_and_tensors() -> None:
    """Whatever torch adds to torch.nn later, nothing but this kind of thing may be named."""
    assert all(cls.__module__.startswith("torch.nn.modules.") for cls in module_classes())
    assert not any("Lazy" in cls.__name__ for cls in module_classes())
    others = {
        name
        for name in known_globals()
        if not name.startswith(("torch.nn.modules.", "torch.nn.functional."))
    }
    dtypes_and_storages = {
        name
        for name in others
        if isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
        or name.endswith("Storage")
    }
    assert {n for n in others - dtypes_and_storages if not n.startswith("torch._C._nn.")} == {
        "collections.OrderedDict",
        "builtins.set",
        "torch.Size",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    }
