"""Repositories of the hub: the cache first, then a download, and plain words when neither works."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitlearn_manager.core.loaders.hub import HUB_UNREACHABLE
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, LoadError, TerminalLoadError, WeightsNotFound
from splitlearn_manager.runtime.base import LoadedModel
from support.hub import COMMIT, FakeHub, serving
from support.models import model_config, tiny_bert

IDS = torch.tensor([[5, 7, 9]])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an endpoint at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    return tmp_path / "hub"


def load(path: str, **keys: object) -> LoadedModel:
    return ModelLoader().load(model_config(path, **keys), "cpu")


def lay_out(cache: Path, *, ref: str | None = None) -> Path:
    """A cached repository org/bert at COMMIT, as huggingface_hub lays it out."""
    repository = cache / "models--org--bert"
    snapshot = repository / "snapshots" / COMMIT
    tiny_bert(snapshot)
    if ref is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text(COMMIT)
    return snapshot


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    tiny_bert(tmp_path / "served")
    (tmp_path / "served" / "big_other_format.onnx").write_bytes(b"x")
    with serving({"org/bert": tmp_path / "served"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.mark.parametrize("revision", [COMMIT, "main", "v1"])
def test_a_cached_revision_never_touches_the_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    lay_out(cache, ref=None if revision == COMMIT else revision)
    monkeypatch.setattr(socket.socket, "connect", None)
    assert load(f"hf:org/bert@{revision}").module(IDS).shape == (1, 3, 16)
    if revision == "main":
        assert load("hf:org/bert").module(IDS).shape == (1, 3, 16)


def test_what_is_not_cached_is_downloaded_once_into_the_cache(cache: Path, hub: FakeHub) -> None:
    downloaded = load("hf:org/bert@v1")
    snapshot = cache / "models--org--bert" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_file()
    assert not (snapshot / "big_other_format.onnx").exists()
    assert (cache / "models--org--bert" / "refs" / "v1").read_text() == COMMIT
    hub.requests.clear()
    again = load("hf:org/bert@v1")
    assert hub.requests == []
    assert torch.equal(again.module(IDS), downloaded.module(IDS))
    assert load(f"hf:org/bert@{COMMIT}").module(IDS).shape == (1, 3, 16)
    assert hub.requests == []


def test_a_download_that_broke_off_is_completed(cache: Path, hub: FakeHub) -> None:
    snapshot = lay_out(cache, ref="v1")
    (snapshot / "model.safetensors").unlink()
    assert load("hf:org/bert@v1").module(IDS).shape == (1, 3, 16)
    assert (snapshot / "model.safetensors").is_file()


def test_downloads_print_nothing(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    load("hf:org/bert")
    assert capfd.readouterr() == ("", "")


def test_old_weights_are_fetched_where_there_are_no_others(hub: FakeHub, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = tmp_path / "served" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "served" / "pytorch_model.bin")
    weights.unlink()
    assert load("hf:org/bert").module(IDS).shape == (1, 3, 16)


def test_a_repository_without_weights_says_what_it_needs(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "served" / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFound, match=r"model\.safetensors or pytorch_model\.bin"):
        load("hf:org/bert")


def test_an_unreachable_hub_says_what_was_looked_for_and_where(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoadError) as caught:
        load("hf:org/bert@v1")
    assert caught.value.reason == HUB_UNREACHABLE
    assert not isinstance(caught.value, TerminalLoadError)
    for words in ("org/bert@v1", str(cache), os.environ["HF_ENDPOINT"]):
        assert words in caught.value.message


def test_an_unreachable_hub_and_half_a_snapshot_is_no_model(cache: Path) -> None:
    snapshot = lay_out(cache, ref="v1")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(LoadError) as caught:
        load("hf:org/bert@v1")
    assert not isinstance(caught.value, TerminalLoadError)
    assert "org/bert@v1" in caught.value.message


def test_an_unknown_repository_or_revision_waits_for_a_change(hub: FakeHub) -> None:
    with pytest.raises(InvalidModel, match="no repository org/other"):
        load("hf:org/other")
    with pytest.raises(InvalidModel, match="no org/bert@v9"):
        load("hf:org/bert@v9")


def test_deleting_the_cache_downloads_again(cache: Path, hub: FakeHub) -> None:
    load("hf:org/bert")
    shutil.rmtree(cache)
    assert load("hf:org/bert").module(IDS).shape == (1, 3, 16)
