"""Archives of torch.save whose author is trusted: unpickled, their weights checked and in memory of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitlearn_manager.core.loaders.file_format import CORRUPT_CHECKPOINT
from splitlearn_manager.core.loaders.own_memory import StoredTensor
from splitlearn_manager.core.loaders.torch_archive import TorchArchive
from splitlearn_manager.core.loaders.trusted_archive import can_unpickle, unpickle
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import LoadError
from support.models import model_config


class Scaled(nn.Module):
    """A layer of the author's own, with weights and with numbers that are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = torch.tensor([2.0, 4.0, 8.0, 16.0])
        self.notes = {"made": "by hand"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * self.scale
        return out


class OfOneStorage:
    """What torch must keep in common: two views of one storage, and the same tensor twice."""

    def __init__(self) -> None:
        whole = torch.arange(24.0)
        self.rows = whole.view(4, 6)
        self.columns = self.rows.t()[2:4]
        self.again = self.rows


def unpickled(path: Path) -> Any:
    with TorchArchive(path) as archive:
        assert can_unpickle(archive)
        return unpickle(archive)


def save_scaled(path: Path) -> Scaled:
    torch.manual_seed(1)
    module = Scaled().eval()
    torch.save(module, path)
    return module


def load(path: Path) -> nn.Module:
    return ModelLoader().load(model_config(path, trusted=True), "cpu").module


def test_a_module_of_own_layers_answers_as_it_did(tmp_path: Path) -> None:
    original = save_scaled(tmp_path / "m.pt")
    x = torch.rand(3, 4)
    loaded = load(tmp_path / "m.pt")
    assert torch.equal(loaded(x), original(x))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64],
)
def test_tensors_of_every_dtype_are_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    torch.save({"t": tensor, "path": Path("a")}, tmp_path / "m.pt")
    loaded = unpickled(tmp_path / "m.pt")
    assert loaded["t"].dtype is dtype
    assert torch.equal(loaded["t"], tensor)
    assert loaded["path"] == Path("a")


def test_what_had_memory_in_common_has_it_again(tmp_path: Path) -> None:
    original = OfOneStorage()
    torch.save(original, tmp_path / "m.pt")
    loaded = unpickled(tmp_path / "m.pt")
    assert torch.equal(loaded.columns, original.columns)
    assert loaded.again is loaded.rows
    loaded.rows[0, 2] = 100
    assert loaded.columns[0, 0] == 100


def test_sparse_tensors_and_parameters_are_the_same(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    torch.save([sparse, nn.Parameter(torch.ones(2))], tmp_path / "m.pt")
    loaded = unpickled(tmp_path / "m.pt")
    assert torch.equal(loaded[0].to_dense(), torch.eye(3))
    assert isinstance(loaded[1], nn.Parameter)


def damaged(path: Path, module: Scaled) -> bytes:
    """The file's bytes with one bit of a weight flipped."""
    data = bytearray(path.read_bytes())
    data[data.index(module.inner.weight.detach().numpy().tobytes())] ^= 1
    return bytes(data)


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(damaged(path, save_scaled(path)))
    with pytest.raises(LoadError) as caught:
        load(path)
    assert caught.value.reason == CORRUPT_CHECKPOINT


def test_a_file_that_was_damaged_since_it_was_read_is_checked_again(tmp_path: Path) -> None:
    """In place, of the same size, with the times of before: only the system's own time of change differs."""
    path = tmp_path / "m.pt"
    module = save_scaled(path)
    stat, broken = path.stat(), damaged(path, module)
    load(path)
    with path.open("r+b") as file:
        file.write(broken)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(LoadError) as caught:
        load(path)
    assert caught.value.reason == CORRUPT_CHECKPOINT


def test_a_checksum_is_compared_once_for_a_file_that_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reading would notice nothing: that is what makes it quick."""
    torch.save({"t": torch.arange(1000.0)}, tmp_path / "m.pt")

    def checksums_of_a_reading() -> int:
        counted: list[int] = []
        from zlib import crc32

        def counting(data: memoryview, start: int = 0) -> int:
            counted.append(len(data))
            return crc32(data, start)

        monkeypatch.setattr("splitlearn_manager.core.loaders.torch_archive.zlib.crc32", counting)
        with TorchArchive(tmp_path / "m.pt") as archive:
            found = archive.state_dict()
            assert found is not None
            _read(found["t"])
        return sum(counted)

    assert checksums_of_a_reading() >= 4000
    assert checksums_of_a_reading() == 0


def _read(stored: StoredTensor) -> None:
    from splitlearn_manager.core.loaders.own_memory import read_tensor

    assert torch.equal(read_tensor(stored), torch.arange(1000.0))


def test_an_archive_that_lacks_a_storage_is_damaged(tmp_path: Path) -> None:
    import zipfile

    save_scaled(tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "m.pt", "w") as some,
    ):
        for name in whole.namelist():
            if not name.endswith("data/0"):
                some.writestr(name, whole.read(name))
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m.pt")
    assert caught.value.reason == CORRUPT_CHECKPOINT
    assert "data/0" in caught.value.message


def test_a_state_dict_beside_objects_of_other_classes_is_read_without_making_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor, so that what a training kept beside it takes no memory."""
    (tmp_path / "some_net.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Linear(4, 4)\n"
    )
    module = nn.Linear(4, 4)
    torch.save({"model": module.state_dict(), "by": Path("a")}, tmp_path / "m.pt")
    monkeypatch.setattr(
        "splitlearn_manager.core.loaders.pytorch.unpickle", lambda archive: pytest.fail("unpickled")
    )
    config = model_config(tmp_path / "m.pt", trusted=True, config={"factory": "some_net:make"})
    loaded = ModelLoader().load(config.with_base_dir(tmp_path), "cpu").module
    x = torch.rand(2, 4)
    assert torch.equal(loaded(x), module(x))
