"""What a GET of the models' pages works on: a client that asks for one model costs that one."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlearn_manager import ManagedServer, ServerConfig
from splitlearn_manager.reconcile import status

COUNT = 5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagedServer]:
    for number in range(COUNT):
        (tmp_path / f"m{number}.yaml").write_text(f"model_id: m{number}\nmodel_path: none.pt\n")
    server = ManagedServer(ServerConfig(port=0, metrics_port=0, settle_s=0.05), directory=tmp_path)
    server.start()
    try:
        assert server.reconciler.wait_converged(lambda: False)
        yield server
    finally:
        server.stop()


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are described, each time they are."""
    ids: list[str] = []
    real = status.model_dict

    def counting(facts: status.Facts, **rest: object) -> dict[str, object]:
        ids.append(facts.model_id)
        return real(facts, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(status, "model_dict", counting)
    return ids


def get(server: ManagedServer, path: str) -> dict[str, object]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}{path}", timeout=10) as got:
        return dict(json.load(got))


def test_the_page_of_one_model_describes_that_one(
    server: ManagedServer, described: list[str]
) -> None:
    assert get(server, "/api/v1/models/m3")["model_id"] == "m3"
    assert described == ["m3"]


def test_the_page_of_all_models_describes_each_once(
    server: ManagedServer, described: list[str]
) -> None:
    models = get(server, "/api/v1/models")["models"]
    assert isinstance(models, list)
    assert len(models) == COUNT
    assert sorted(described) == [f"m{number}" for number in range(COUNT)]
