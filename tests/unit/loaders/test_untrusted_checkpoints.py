"""A file whose unpickling would run a command: in no format does it, unless the config says `trusted`."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, LoadError, UntrustedCheckpoint
from support.models import malicious, mlp, model_config, tiny_bert


def whole(path: Path, marker: Path) -> None:
    torch.save(malicious(marker), path)


def inside_a_state_dict(path: Path, marker: Path) -> None:
    torch.save({"0.weight": torch.rand(2), "extra": malicious(marker)}, path)


def as_an_attribute_of_a_module(path: Path, marker: Path) -> None:
    module = mlp()
    module.extra = malicious(marker)  # type: ignore[assignment]
    torch.save(module, path)


def old_format(path: Path, marker: Path) -> None:
    torch.save(malicious(marker), path, _use_new_zipfile_serialization=False)


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(malicious(marker)))


def newer_protocol(path: Path, marker: Path) -> None:
    torch.save(malicious(marker), path, pickle_protocol=4)


def tar(path: Path, marker: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps(malicious(marker), 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def named_safetensors(path: Path, marker: Path) -> None:
    torch.save(malicious(marker), path)
    path.rename(path.with_suffix(".safetensors"))
    path.symlink_to(path.with_suffix(".safetensors"))


WRITERS = [
    whole,
    inside_a_state_dict,
    as_an_attribute_of_a_module,
    old_format,
    plain_pickle,
    newer_protocol,
    tar,
    named_safetensors,
]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize("write", WRITERS)
def test_untrusted_file_runs_nothing(
    tmp_path: Path, marker: Path, write: Callable[[Path, Path], None]
) -> None:
    path = tmp_path / "m.pt"
    write(path, marker)
    with pytest.raises(LoadError) as caught:
        ModelLoader().load(model_config(path), "cpu")
    assert not marker.exists()
    assert "m.pt" in caught.value.message
    if write is plain_pickle:
        assert isinstance(caught.value, InvalidModel)
    else:
        assert isinstance(caught.value, UntrustedCheckpoint)
    if write not in (tar, newer_protocol, plain_pickle):
        assert "system" in caught.value.message


def test_the_attack_of_these_tests_works_where_it_is_allowed(tmp_path: Path, marker: Path) -> None:
    whole(tmp_path / "m.pt", marker)
    with pytest.raises(LoadError):
        ModelLoader().load(model_config(tmp_path / "m.pt", trusted=True), "cpu")
    assert marker.exists()


def test_huggingface_weights_in_pickle_form_run_nothing(tmp_path: Path, marker: Path) -> None:
    tiny_bert(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save({"x": malicious(marker)}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(UntrustedCheckpoint, match="system"):
        ModelLoader().load(model_config(tmp_path / "bert"), "cpu")
    assert not marker.exists()
    with pytest.raises(InvalidModel, match="lacks weights"):
        ModelLoader().load(model_config(tmp_path / "bert", trusted=True), "cpu")
    assert marker.exists()


def exported(path: Path) -> nn.Module:
    module = mlp()
    torch.export.save(torch.export.export(module, (torch.rand(1, 8),)), path)
    return module


def test_exported_program_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    module = exported(path)
    with pytest.raises(UntrustedCheckpoint, match="trusted: true"):
        ModelLoader().load(model_config(path), "cpu")
    loaded = ModelLoader().load(model_config(path, trusted=True), "cpu").module
    x = torch.rand(1, 8)
    assert torch.allclose(loaded(x), module(x))
    assert not loaded.training
    loaded(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_crafted_exported_program_runs_nothing(tmp_path: Path, marker: Path) -> None:
    """torch.export.load unpickles the example inputs of the archive, whatever they are."""
    exported(tmp_path / "plain.pt2")
    crafted = tmp_path / "m.pt2"
    data = io.BytesIO()
    torch.save(malicious(marker), data)
    with zipfile.ZipFile(tmp_path / "plain.pt2") as source, zipfile.ZipFile(crafted, "w") as target:
        for name in source.namelist():
            inputs = name.endswith("sample_inputs/model.pt")
            target.writestr(name, data.getvalue() if inputs else source.read(name))
    with pytest.raises(UntrustedCheckpoint):
        ModelLoader().load(model_config(crafted), "cpu")
    assert not marker.exists()
    with crafted.open("rb") as file, pytest.raises(Exception):  # noqa: B017 - torch's own
        torch.export.load(file)
    assert marker.exists()


class ReadsAFile(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("MARKER", shared=True, size=4, dtype=torch.float32).sum()


class Indirect(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_torchscript_that_touches_files_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(ReadsAFile()), tmp_path / "m.pt")
    with pytest.raises(UntrustedCheckpoint, match="from_file"):
        ModelLoader().load(model_config(tmp_path / "m.pt"), "cpu")
    ModelLoader().load(model_config(tmp_path / "m.pt", trusted=True), "cpu")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('torch.save(x, "f")', "save"),
        ('ops.debugprims.load_tensor("f", [1], [1])', "load_tensor"),
        ("ops . c10d . barrier(x)", r"ops\.c10d"),
        ('getattr(torch, "from\\x5ffile")("f")', "getattr"),
        ("__torch__.torch.classes.dist_rpc.WorkerInfo()", r"torch\.classes\.dist_rpc"),
    ],
)
def test_torchscript_code_is_searched_before_it_is_loaded(
    tmp_path: Path, line: str, words: str
) -> None:
    torch.jit.save(torch.jit.script(Indirect()), tmp_path / "plain.pt")
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(".py"):
                data += f"    y = {line}\n".encode()
            target.writestr(name, data)
    with pytest.raises(UntrustedCheckpoint, match=words):
        ModelLoader().load(model_config(path), "cpu")


def test_pickle_that_needs_a_missing_class_says_so_when_trusted(tmp_path: Path) -> None:
    module = mlp()
    torch.save(module, tmp_path / "plain.pt")
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"torch.nn.modules.linear\nLinear", b"not_installed\nLayer")
            target.writestr(name, data)
    with pytest.raises(InvalidModel, match="not_installed"):
        ModelLoader().load(model_config(path, trusted=True), "cpu")


SCRIPT = """
import torch
from torch import nn


class Net(nn.Module):
    pass


torch.save(Net(), "model.pt")
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_a_module_of_a_script_says_that_trusting_it_cannot_help(
    tmp_path: Path, trusted: bool
) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, check=True)
    config = model_config(str(tmp_path / "model.pt"), trusted=trusted)
    refused = InvalidModel if trusted else UntrustedCheckpoint
    with pytest.raises(refused, match="script or notebook that saved it") as caught:
        ModelLoader().load(config, "cpu")
    assert "save `model.state_dict()`" in caught.value.message
    assert "trusted: true" not in caught.value.message


def test_trusted_classes_that_are_not_found_say_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    pass\n"
    )
    save = "import mynet, torch; torch.save(mynet.Net(), 'model.pt')"
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, check=True)
    config = model_config(str(tmp_path / "model.pt"), trusted=True)
    with pytest.raises(InvalidModel, match=r"No module named 'mynet'.*PYTHONPATH"):
        ModelLoader().load(config, "cpu")
