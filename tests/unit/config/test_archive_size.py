"""What archives of torch say of their size, against what was measured once they were loaded."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitlearn_manager.config.archive_size import archive_bytes
from splitlearn_manager.config.files import RealFileSystem
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import estimate_mb, resolve_source
from splitlearn_manager.core.model_loader import ModelLoader

HIDDEN = 256
FACTORY = f"""
import torch
from torch import nn

def build(**options):
    return nn.Sequential(nn.Linear({HIDDEN}, 512), nn.ReLU(), nn.Linear(512, {HIDDEN}))
"""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 512), nn.ReLU(), nn.Linear(512, HIDDEN)).eval()


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(5000, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def saved_whole(path: Path) -> dict[str, Any]:
    torch.save(nn.Sequential(nn.Embedding(999, HIDDEN), nn.Linear(HIDDEN, 77)), path)
    return {}


def saved_in_half(path: Path) -> dict[str, Any]:
    torch.save(network().half(), path)
    return {}


def saved_in_bfloat16(path: Path) -> dict[str, Any]:
    torch.save(network().bfloat16(), path)
    return {}


def to_be_halved(path: Path) -> dict[str, Any]:
    torch.save(network(), path)
    return {"config": {"dtype": "float16"}}


def state_dict(path: Path) -> dict[str, Any]:
    torch.save(network().state_dict(), path)
    return {"config": {"factory": "made_for_size:build"}}


def checkpoint_of_a_training(path: Path) -> dict[str, Any]:
    """Of which the optimizer's state, twice the weights, is never loaded."""
    trained = network()
    optimizer = torch.optim.Adam(trained.parameters())
    trained(torch.randn(2, HIDDEN)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "model": trained.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, path)
    return {"config": {"factory": "made_for_size:build"}}


def scripted(path: Path) -> dict[str, Any]:
    torch.jit.save(torch.jit.trace(Tied(), torch.randn(2, HIDDEN)), str(path))
    return {}


def exported(path: Path) -> dict[str, Any]:
    torch.export.save(torch.export.export(network(), (torch.randn(2, HIDDEN),)), path)
    return {"trusted": True}


def exported_and_tied(path: Path) -> dict[str, Any]:
    torch.export.save(torch.export.export(Tied(), (torch.randn(2, HIDDEN),)), path)
    return {"trusted": True}


@pytest.mark.parametrize(
    "save",
    [
        saved_whole,
        saved_in_half,
        saved_in_bfloat16,
        to_be_halved,
        state_dict,
        checkpoint_of_a_training,
        scripted,
        exported,
        exported_and_tied,
    ],
)
def test_the_estimate_is_what_is_measured_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    (tmp_path / "made_for_size.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "m.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = save(path)
        values = {"model_id": "m", "model_path": str(path), **keys}
        config = ModelConfig.model_validate(values).with_base_dir(tmp_path)
        loaded = ModelLoader().load(config, "cpu")
    estimated = estimate_mb(resolve_source(config), config)
    assert estimated.how.startswith("archive index")
    assert estimated.weights_mb == pytest.approx(loaded.weights_mb, rel=0.001)


def test_nothing_of_the_archive_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "was run",))

    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1000), "evil": Evil()}, path)
    assert archive_bytes(path, None, RealFileSystem()) == 4000
    assert not (tmp_path / "was run").exists()


def archive_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"m/{name}", data)
    return path


def test_what_is_damaged_or_is_no_archive_has_no_size(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(network().state_dict(), whole)
    data = whole.read_bytes()
    endless = b"\x80\x02" + b"(" * 100_000
    files = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"weights",
        "legacy": pickle.dumps({"a": 1}),
        "scrambled": data[:100] + bytes(byte ^ 255 for byte in data[100:600]) + data[600:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert archive_bytes(tmp_path / name, None, RealFileSystem()) is None, name
    for name, pickled in {
        "no pickle": b"x",
        "endless": endless,
        "none": pickle.dumps(1)[:3],
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    }.items():
        path = archive_of(tmp_path / name, **{"data.pkl": pickled})
        assert archive_bytes(path, None, RealFileSystem()) is None, name
    assert archive_bytes(archive_of(tmp_path / "other", a=b"1"), None, RealFileSystem()) is None


def test_a_compressed_archive_that_is_damaged_has_no_size(tmp_path: Path) -> None:
    """Its decoder's errors are none of zipfile's; bzip2 even tells damage as an error of the disk."""
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = tmp_path / f"m{method}.pt"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("m/data.pkl", bytes(range(256)))
        data = bytearray(path.read_bytes())
        start = data.index(b"m/data.pkl") + len("m/data.pkl")
        data[start : start + 40] = bytes(byte ^ 255 for byte in data[start : start + 40])
        path.write_bytes(data)
        assert archive_bytes(path, None, RealFileSystem()) is None, method


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"\x80\x02}r" + struct.pack("<I", 20_000_000) + b".", id="LONG_BINPUT"),
        pytest.param(b"\x80\x02}p20000000\n.", id="PUT"),
    ],
)
def test_a_pickle_takes_no_more_memory_than_what_it_describes(
    tmp_path: Path, pickled: bytes
) -> None:
    path = archive_of(tmp_path / "m.pt", **{"data.pkl": pickled})
    tracemalloc.start()
    try:
        assert archive_bytes(path, None, RealFileSystem()) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_storage_that_is_not_in_the_archive_is_no_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(10)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read("archive/data.pkl")
    path = archive_of(tmp_path / "m.pt", **{"data.pkl": pickled})
    assert archive_bytes(path, None, RealFileSystem()) is None


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        archive_bytes(tmp_path / "m.pt", None, RealFileSystem())
