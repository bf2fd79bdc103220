"""Updates that must not be: each leaves the old version serving, fails no request, and says why."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support.node import Node
from support.served import (
    WIDTH,
    Callers,
    declare,
    loads,
    replace_file,
    save_version,
    version_bytes,
    version_of,
)
from support.waiting import eventually

CODE = """
import os
import time

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, fails=""):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)
        self.fails = fails

    def forward(self, x):
        if self.fails == "raises":
            raise ValueError("no vocabulary")
        return self.layer(x) * 2


def good():
    return Model()


def raising():
    raise ValueError("out of order")


def hanging():
    time.sleep(600)


def failing():
    return Model("raises")


def crashing():
    os._exit(9)
"""


@dataclass
class Place:
    """A model of a node, version 1 to begin with.

    Attributes:
        runtime: where the model runs.
    """

    node: Node
    runtime: str
    model_id: str

    @property
    def directory(self) -> Path:
        return self.node.directory

    @property
    def weights(self) -> Path:
        return self.directory / f"{self.model_id}.pt"

    def begin(self) -> None:
        save_version(self.weights, 1)
        self.declare()
        self.node.wait_phase(self.model_id, "Ready")

    def declare(self, **keys: object) -> None:
        standard: dict[str, object] = {
            "model_path": self.weights.name,
            "update": "surge",
            "runtime": self.runtime,
            "config": {"input_shape": [1, WIDTH]},
        }
        declare(self.directory, self.model_id, **{**standard, **keys})

    def status(self) -> dict[str, object]:
        return self.node.status(self.model_id)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("bad") / "desired"
    directory.mkdir()
    (directory / "code.py").write_text(CODE)
    settings = {
        "settle_s": 0.05,
        "resync_s": 0.2,
        "max_models": 50,
        "prune_guard_percent": 100,
        "memory_quota_mb": {"cpu": 500},
    }
    with Node(directory, settings) as started:
        yield started


def spoiled(value: float) -> bytes:
    """A checkpoint like those of `save_version`, all weights that value."""
    return of_module(nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))), value)


def of_module(module: nn.Module, value: float) -> bytes:
    import io

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def missing(place: Place) -> None:
    place.declare(model_path="gone.pt")


def truncated(place: Place) -> None:
    replace_file(place.weights, version_bytes(place.weights, 2)[:-300])


def wrong_shapes(place: Place) -> None:
    replace_file(place.weights, of_module(nn.Linear(WIDTH + 1, WIDTH), 1.0))


def nan(place: Place) -> None:
    replace_file(place.weights, spoiled(float("nan")))


def raising_loader(place: Place) -> None:
    place.declare(model_path="code:raising")


def hanging_loader(place: Place) -> None:
    place.declare(model_path="code:hanging", load_timeout_s=1.0)


def raising_warmup(place: Place) -> None:
    place.declare(model_path="code:failing")


def golden_mismatch(place: Place) -> None:
    x = np.ones((1, WIDTH), np.float32)
    np.savez(place.directory / "golden.npz", input=x, output=x * 17)
    place.declare(verify={"golden": "golden.npz"})


def too_different(place: Place) -> None:
    place.declare(verify={"max_difference": 0.5})
    place.node.wait_generation(place.model_id, 2)
    save_version(place.weights, 2)


def over_its_limit(place: Place) -> None:
    large = nn.Linear(1024, 1024, bias=False)
    replace_file(place.directory / "large.pt", of_module(large, 1.0))
    place.declare(model_path="large.pt", max_memory_mb=1, config={"input_shape": [1, 1024]})


def untrusted(place: Place) -> None:
    torch.save(subprocess.Popen, place.directory / "trusting.pt")
    replace_file(place.weights, (place.directory / "trusting.pt").read_bytes())


def crashing_worker(place: Place) -> None:
    place.declare(model_path="code:crashing", runtime="process")


KINDS: dict[str, tuple[Callable[[Place], None], str]] = {
    "missing file": (missing, "WeightsNotFound"),
    "truncated weights": (truncated, "CorruptCheckpoint"),
    "wrong shapes": (wrong_shapes, "WarmupFailed"),
    "NaN weights": (nan, "NotFinite"),
    "raising loader": (raising_loader, "LoadFailed"),
    "hanging loader": (hanging_loader, "LoadTimeout"),
    "raising warmup": (raising_warmup, "WarmupFailed"),
    "golden mismatch": (golden_mismatch, "GoldenMismatch"),
    "too different": (too_different, "AnswersDiffer"),
    "too large": (over_its_limit, "OverMemoryLimit"),
    "untrusted pickle": (untrusted, "UntrustedCheckpoint"),
    "crash while loading": (crashing_worker, "WorkerDied"),
}


@pytest.mark.parametrize("runtime", ["thread", "process"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_update_leaves_the_old_version_serving(node: Node, kind: str, runtime: str) -> None:
    spoil, reason = KINDS[kind]
    place = Place(node, runtime, f"{kind.replace(' ', '-')}-{runtime}")
    place.begin()
    with Callers(node, place.model_id, 2) as callers:
        spoil(place)
        told = lambda: reason in str(place.status().get("conditions"))  # noqa: E731
        callers.wait_for(told, f"the status says {reason}")
        callers.one_more_each()
        status = place.status()
        assert (status["health"], status["sync"]) == ("Degraded", "OutOfSync")
        # The way back: what serves is what is declared again, whatever was tried.
        save_version(place.weights, 1)
        place.declare()
        well = lambda: place.status().get("health") == "Healthy"  # noqa: E731
        callers.wait_for(well, "all is well again")
    assert all(version_of(answer) == 1 for answers in callers.answers for answer in answers)
    (node.directory / f"{place.model_id}.yaml").unlink()


def test_golden_answers_are_recorded_and_held_against_the_next_version(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    with Node(directory, {"settle_s": 0.05, "resync_s": 0.2}) as node:
        place = Place(node, "thread", "versions")
        save_version(place.weights, 3)
        place.declare()
        node.wait_phase("versions", "Ready")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "splitlearn_manager.reconcile",
                "golden",
                "versions",
                str(directory),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        file = directory / "versions.golden.safetensors"
        assert f"1 answer of versions (generation 1) recorded in {file}" in done.stdout
        place.declare(verify={"golden": file.name})
        node.wait_generation("versions", 2)
        assert f"inputs of {file.name} as expected" in str(node.status("versions"))
        with Callers(node, "versions") as callers:
            save_version(place.weights, 4)
            look = lambda: "GoldenMismatch" in str(node.status("versions")["conditions"])  # noqa: E731
            callers.wait_for(look, "the new version is found to answer otherwise")
            callers.one_more_each()
            assert {version_of(a) for a in callers.answers[0]} == {3}
            # What would help, if those answers were meant, does.
            _, explained = node.get("/api/v1/models/versions/explain")
            assert "leave `verify.golden` out" in explained
            place.declare()
            callers.wait_for(lambda: version_of(callers.answers[0][-1]) == 4, "it serves")


def test_a_storm_of_edits_ends_with_the_last_one(tmp_path: Path) -> None:
    """500 edits of one file: what is loaded are the states that had settled, and nothing is left behind."""
    edits, between = 500, threading.Event()
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "code.py").write_text(CODE)
    with Node(directory, {"settle_s": 0.1, "resync_s": 0.2}) as node:
        place = Place(node, "thread", "versions")
        place.begin()
        with Callers(node, "versions", 2) as callers:
            for number in range(2, edits + 1):
                rows = 1 + number % 7
                place.declare(config={"input_shape": [rows, WIDTH]}, priority=number)
                between.wait(0.01)
            place.declare(priority=edits + 1)

            def synced() -> bool:
                now = place.status()
                state = (now.get("sync"), now.get("phase"), now.get("priority"))
                return state == ("Synced", "Ready", edits + 1)

            callers.wait_for(synced, "the last edit serves")
            settled = int(str(node.status("versions")["generation"]))
        status = node.status("versions")
        assert status["observed_generation"] == status["generation"] == settled
        # Each generation is a state that had settled.
        assert loads(node, "versions") <= settled
        history = [entry for entry in node.lines if "event=Loaded model=versions" in entry]
        assert len(history) == loads(node, "versions")
        eventually(
            lambda: str(node.get("/metrics")[1]).count("models_loaded 1.0"), "one model is loaded"
        )
