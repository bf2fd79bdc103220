"""PyTorch files of every kind: told apart by content, read into our own memory, refused in plain words."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from splitlearn_manager.core.loaders.file_format import CORRUPT_CHECKPOINT, FileFormat, detect
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import (
    InvalidModel,
    LoadError,
    TerminalLoadError,
    WeightsNotFound,
)
from support.models import mlp, model_config, save_mlp

FACTORY = """
from torch import nn
def build(width=8):
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    return "net:build"


def load(path: Path, **keys: object) -> nn.Module:
    config = model_config(path, **keys).with_base_dir(path.parent)
    return ModelLoader().load(config, "cpu").module


def saved_whole(path: Path) -> None:
    save_mlp(path)


def saved_state_dict(path: Path) -> None:
    torch.save(mlp().state_dict(), path)


def saved_inside_a_checkpoint(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": mlp().state_dict()}, path)


def saved_in_the_old_format(path: Path) -> None:
    torch.save(mlp().state_dict(), path, _use_new_zipfile_serialization=False)


def saved_as_safetensors(path: Path) -> None:
    save_file(mlp().state_dict(), path)


def saved_as_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(mlp()), path)


KINDS: list[tuple[Callable[[Path], None], FileFormat]] = [
    (saved_whole, FileFormat.TORCH_ZIP),
    (saved_state_dict, FileFormat.TORCH_ZIP),
    (saved_inside_a_checkpoint, FileFormat.TORCH_ZIP),
    (saved_in_the_old_format, FileFormat.TORCH_LEGACY),
    (saved_as_safetensors, FileFormat.SAFETENSORS),
    (saved_as_torchscript, FileFormat.TORCHSCRIPT),
]


@pytest.mark.parametrize(("save", "kind"), KINDS)
def test_a_file_is_what_it_contains_whatever_its_name(
    tmp_path: Path, factory: str, save: Callable[[Path], None], kind: FileFormat
) -> None:
    path = tmp_path / "model.weights"
    save(path)
    assert detect(path) is kind
    x = torch.rand(2, 8)
    assert torch.equal(load(path, config={"factory": factory})(x), mlp()(x))


@pytest.mark.parametrize(("save", "kind"), KINDS)
def test_weights_are_our_own_once_loaded(
    tmp_path: Path, factory: str, save: Callable[[Path], None], kind: FileFormat
) -> None:
    """A mapped file that is truncated would end the process; one that is rewritten, mix versions."""
    path = tmp_path / "m.pt"
    save(path)
    module = load(path, config={"factory": factory})
    before = module(torch.ones(1, 8))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))
    assert torch.equal(module(torch.ones(1, 8)), before)
    os.truncate(path, 0)
    assert torch.equal(module(torch.ones(1, 8)), before)


@pytest.mark.parametrize(("save", "kind"), KINDS)
def test_a_file_that_is_cut_off_may_be_tried_again(
    tmp_path: Path, factory: str, save: Callable[[Path], None], kind: FileFormat
) -> None:
    path = tmp_path / "m.pt"
    save(path)
    whole = path.read_bytes()
    for length in (0, 60, len(whole) // 3, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError) as caught:
            load(path, config={"factory": factory})
        assert caught.value.reason == CORRUPT_CHECKPOINT, length
        assert not isinstance(caught.value, TerminalLoadError)
        assert "m.pt" in caught.value.message


def test_a_copy_whose_content_has_not_arrived_may_be_tried_again(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(bytes(5000))
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m.pt")
    assert caught.value.reason == CORRUPT_CHECKPOINT


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    """One flipped bit in the numbers: the archive's checksum says so."""
    path = tmp_path / "m.pt"
    module = save_mlp(path)
    data = bytearray(path.read_bytes())
    where = data.index(module[0].weight.detach().numpy().tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError) as caught:
        load(path)
    assert caught.value.reason == CORRUPT_CHECKPOINT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, this is no model at all", "none of the formats"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x80\x04K\x01.", "pickle"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_looks_like(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(InvalidModel, match=words):
        load(tmp_path / "m.pt")


def test_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=str(tmp_path / "m.pt")):
        load(tmp_path / "m.pt")


def test_directory_without_config_names_the_files_it_has(tmp_path: Path) -> None:
    save_mlp(tmp_path / "weights.pt")
    with pytest.raises(InvalidModel, match=r"weights\.pt"):
        load(tmp_path)


def test_a_model_type_that_is_not_that_of_what_is_there_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"with a config\.json, .*leave model_type out"):
        ModelLoader().load(model_config(str(tmp_path), model_type="pytorch"), "cpu")
    save_mlp(tmp_path / "m.pt")
    config = model_config(str(tmp_path / "m.pt"), model_type="huggingface")
    with pytest.raises(InvalidModel, match=r"m\.pt is a file, .*leave model_type out"):
        ModelLoader().load(config, "cpu")


def test_weights_without_a_factory_say_what_to_write(tmp_path: Path) -> None:
    for save in (saved_state_dict, saved_as_safetensors):
        save(tmp_path / "m.pt")
        with pytest.raises(InvalidModel, match=r"factory: package\.module:function"):
            load(tmp_path / "m.pt")


@pytest.mark.parametrize("save", [saved_state_dict, saved_as_safetensors])
def test_weights_must_fit_the_module_exactly(
    tmp_path: Path, factory: str, save: Callable[[Path], None]
) -> None:
    def saved(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        weights = dict(mlp().state_dict())
        change(weights)
        if save is saved_state_dict:
            torch.save(OrderedDict(weights), tmp_path / "m.pt")
        else:
            save_file(weights, tmp_path / "m.pt")

    saved(lambda weights: weights.pop("2.bias"))
    with pytest.raises(InvalidModel, match=r"missing: 2\.bias"):
        load(tmp_path / "m.pt", config={"factory": factory})
    saved(lambda weights: weights.update({"3.bias": torch.ones(1)}))
    with pytest.raises(InvalidModel, match=r"unexpected: 3\.bias"):
        load(tmp_path / "m.pt", config={"factory": factory})
    save(tmp_path / "m.pt")
    with pytest.raises(InvalidModel, match=r"size mismatch for 0\.weight"):
        load(tmp_path / "m.pt", config={"factory": factory, "kwargs": {"width": 9}})


@pytest.mark.parametrize(
    ("wrap", "help_"),
    [
        (nn.DataParallel, "save `model.module.state_dict()`"),
        (torch.compile, "save `model._orig_mod.state_dict()`"),
    ],
    ids=["parallel", "compiled"],
)
def test_weights_of_a_wrapped_model_say_what_to_save(
    tmp_path: Path, factory: str, wrap: Callable[[nn.Module], nn.Module], help_: str
) -> None:
    torch.save(wrap(mlp()).state_dict(), tmp_path / "m.pt")
    with pytest.raises(InvalidModel) as caught:
        load(tmp_path / "m.pt", config={"factory": factory})
    assert help_ in caught.value.message
    weights = {f"module.{name}": value for name, value in mlp(width=9).state_dict().items()}
    torch.save({**weights, "other": torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(InvalidModel) as caught:
        load(tmp_path / "m.pt", config={"factory": factory})
    assert "; it was saved from" not in caught.value.message


def test_a_dict_without_weights_lists_its_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "m.pt")
    with pytest.raises(InvalidModel, match="'epoch', 'loss'"):
        load(tmp_path / "m.pt")


def test_dtype_converts_the_weights(tmp_path: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    loaded = ModelLoader().load(
        model_config(tmp_path / "m.pt", config={"dtype": "bfloat16"}), "cpu"
    )
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    whole = ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")
    assert loaded.weights_mb == whole.weights_mb / 2


def test_frozen_weights_become_trainable(tmp_path: Path) -> None:
    torch.save(mlp().requires_grad_(False), tmp_path / "m.pt")
    assert all(p.requires_grad for p in load(tmp_path / "m.pt").parameters())
