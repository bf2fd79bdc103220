"""Models that cannot be loaded: each says why and what helps, and disturbs no other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic

import pytest
import torch
from torch import nn

from splitlearn_comm import RemoteComputeError
from splitlearn_manager.core.residency import STAY_S
from support.node import Node
from support.served import (
    WIDTH,
    Callers,
    X,
    answer_of,
    condition,
    constant,
    declare,
    impatient,
    loads,
    replace_file,
    save_version,
    version_of,
    write_factory,
)
from support.waiting import eventually

SETTINGS = {
    "max_models": 20,
    "max_parallel_loads": 2,
    "settle_s": 0.1,
    "resync_s": 0.3,
    "max_workers": 20,
    "memory_quota_mb": {"cpu": 100},
}

RAISES = """
def build():
    raise RuntimeError("no such layer: attention.7")
"""

HANGS = """
import threading


def build():
    threading.Event().wait()
"""

WORKS = """
import torch


def build():
    while True:
        torch.ones(64, 64) @ torch.ones(64, 64)
"""


class _Mischief:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node whose every bad model is there from the start, and good ones among them."""
    directory = tmp_path_factory.mktemp("bad-models") / "desired"
    directory.mkdir()
    write_factory(directory)
    replace_file(directory / "raising.py", RAISES)
    replace_file(directory / "hanging.py", HANGS)
    declare(directory, "a-hangs", model_path="hanging:build", load_timeout_s=600)
    declare(directory, "a-raises", model_path="raising:build")
    declare(directory, "times-out", model_path="hanging:build", load_timeout_s=1)
    save_version(directory / "narrow.pt", 1)
    shape = {"input_shape": [1, WIDTH + 1]}
    declare(directory, "dies-in-warmup", model_path="narrow.pt", config=shape)
    torch.save(_Mischief(), directory / "mischief.pt")
    declare(directory, "untrusted", model_path="mischief.pt")
    declare(directory, "missing", model_path="nowhere.pt")
    torch.save(nn.Linear(1024, 1024), directory / "four-mb.pt")
    declare(directory, "too-large", model_path="four-mb.pt", max_memory_mb=3)
    declare(directory, "z-good", config=constant(1.0))
    with Node(directory, SETTINGS) as node:
        yield node
        assert node.stop() == 0, "a loader that hangs keeps nobody from stopping"


def failed(node: Node, model_id: str, reason: str) -> dict[str, object]:
    """The model's status once it has FAILED for that reason."""

    def look() -> dict[str, object]:
        status = node.status(model_id)
        same = (status.get("phase"), status.get("reason")) == ("Failed", reason)
        return status if same else {}

    return eventually(look, f"{model_id} is Failed: {reason}")


def test_a_load_that_hangs_or_fails_leaves_the_others_a_slot(node: Node) -> None:
    node.wait_phase("z-good", "Ready")
    assert node.status("a-hangs")["phase"] == "Loading"
    assert answer_of(node, "z-good") == 1.0


@pytest.mark.parametrize(
    ("model_id", "reason", "says", "retries"),
    [
        ("a-raises", "LoadFailed", ["raising:build", "RuntimeError", "raising.py:3"], True),
        ("dies-in-warmup", "WarmupFailed", ["'dies-in-warmup'", f"[1, {WIDTH + 1}]"], True),
        ("untrusted", "UntrustedCheckpoint", ["mischief.pt", "trusted: true"], False),
        ("missing", "WeightsNotFound", ["nowhere.pt"], False),
        ("too-large", "OverMemoryLimit", ["'too-large'", "4 MB", "max_memory_mb is 3"], False),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why_and_what_helps(
    node: Node, model_id: str, reason: str, says: list[str], retries: bool
) -> None:
    status = failed(node, model_id, reason)
    for part in says:
        assert part in str(status["message"])
    assert (status["sync"], status["health"]) == ("OutOfSync", "Degraded")
    ready = condition(status, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", reason)
    if not retries:
        assert status["next_retry_s"] is None
    with impatient(node) as client, pytest.raises(RemoteComputeError, match="UNAVAILABLE"):
        client.compute(X, model_id=model_id)


def test_a_load_that_exceeds_its_time_is_given_up_and_not_piled_up(node: Node) -> None:
    status = failed(node, "times-out", "LoadTimeout")
    assert "load_timeout_s = 1 s" in str(status["message"])
    # While the loader has not come back, another one would only hang beside it.
    assert status["next_retry_s"] is None
    assert loads(node, "times-out", "failure") == 1


def test_correcting_the_code_or_the_weights_recovers_at_once(node: Node) -> None:
    """No wait for the next retry: another version is another attempt."""
    for model_id, reason in (
        ("a-raises", "LoadFailed"),
        ("times-out", "LoadTimeout"),
        ("untrusted", "UntrustedCheckpoint"),
        ("missing", "WeightsNotFound"),
        ("dies-in-warmup", "WarmupFailed"),
        ("too-large", "OverMemoryLimit"),
    ):
        failed(node, model_id, reason)
    directory = node.directory
    replace_file(directory / "raising.py", "from nets import constant as build\n")
    declare(directory, "times-out", config=constant(2.0))
    save_version(directory / "mischief.pt", 3)
    save_version(directory / "nowhere.pt", 4)
    declare(directory, "dies-in-warmup", model_path="narrow.pt", config={"input_shape": [1, WIDTH]})
    declare(directory, "too-large", model_path="four-mb.pt", max_memory_mb=30)
    for model_id in (
        "a-raises",
        "times-out",
        "untrusted",
        "missing",
        "dies-in-warmup",
        "too-large",
    ):
        status = node.wait_phase(model_id, "Ready", 10)
        assert (status["sync"], status["health"]) == ("Synced", "Healthy")
    assert answer_of(node, "times-out") == 2.0
    with impatient(node) as client:
        assert version_of(client.compute(X, model_id="untrusted")) == 3
        assert version_of(client.compute(X, model_id="missing")) == 4


def degraded(node: Node, model_id: str) -> Mapping[str, object]:
    look = lambda: (s := node.status(model_id))["health"] == "Degraded" and s  # noqa: E731
    return eventually(look, f"{model_id} is Degraded") or {}


def test_an_update_that_fails_leaves_the_old_version_serving(node: Node) -> None:
    declare(node.directory, "surging", config=constant(1.0), update="surge")
    node.wait_phase("surging", "Ready")
    with Callers(node, "surging") as callers:
        declare(node.directory, "surging", config={"kwargs": {"valeu": 2.0}}, update="surge")
        status = degraded(node, "surging")
        assert (status["phase"], status["sync"]) == ("Ready", "OutOfSync")
        synced = condition(status, "Synced")
        assert (synced["status"], synced["reason"]) == ("False", "UpdateFailed")
        assert "valeu" in synced["message"]
        ready = condition(status, "Ready")
        assert (ready["status"], ready["reason"]) == ("False", "OlderGenerationServes")
        callers.one_more_each()
        assert {float(answer[0, 0]) for answer in callers.answers[0]} == {1.0}
        declare(node.directory, "surging", config=constant(3.0), update="surge")
        callers.wait_for(lambda: float(callers.answers[0][-1][0, 0]) == 3.0, "the next edit serves")
    status = node.wait_generation("surging", 3)
    assert (status["sync"], status["health"]) == ("Synced", "Healthy")


def test_weights_that_turn_out_to_be_broken_leave_the_old_version_serving(node: Node) -> None:
    weights = node.directory / "surging.pt"
    save_version(weights, 1)
    declare(node.directory, "checkpoint", model_path="surging.pt")
    node.wait_phase("checkpoint", "Ready")
    with Callers(node, "checkpoint") as callers:
        replace_file(weights, b"PK\x03\x04 and then nothing of use")
        status = degraded(node, "checkpoint")
        assert condition(status, "Synced")["reason"] == "UpdateFailed"
        callers.one_more_each()
    assert {version_of(answer) for answer in callers.answers[0]} == {1}


def test_a_limit_below_what_is_loaded_is_refused_and_the_old_one_stays(node: Node) -> None:
    """max_memory_mb applies in place only while it holds."""
    path = node.directory / "limited.pt"
    torch.save(nn.Linear(1024, 1024), path)
    declare(node.directory, "limited", model_path="limited.pt", max_memory_mb=50)
    node.wait_phase("limited", "Ready")
    declare(node.directory, "limited", model_path="limited.pt", max_memory_mb=2)
    status = degraded(node, "limited")
    synced = condition(status, "Synced")
    assert (synced["status"], synced["reason"]) == ("False", "UpdateFailed")
    assert "max_memory_mb is 2" in synced["message"]
    assert (status["phase"], status["observed_generation"]) == ("Ready", 1)
    declare(node.directory, "limited", model_path="limited.pt", max_memory_mb=40)
    assert node.wait_generation("limited", 3)["health"] == "Healthy"
    assert loads(node, "limited") == 1


def test_an_update_by_recreate_that_fails_goes_back_to_what_served(node: Node) -> None:
    declare(node.directory, "recreated", config=constant(1.0), update="recreate")
    node.wait_phase("recreated", "Ready")
    declare(node.directory, "recreated", config={"kwargs": {"valeu": 2.0}}, update="recreate")
    status = degraded(node, "recreated")
    while status["phase"] != "Ready":
        status = node.wait_phase("recreated", "Ready")
    assert condition(status, "Synced")["reason"] == "UpdateFailed"
    assert status["observed_generation"] == 1
    assert answer_of(node, "recreated") == 1.0
    declare(node.directory, "recreated", config=constant(3.0), update="recreate")
    node.wait_generation("recreated", 3)
    assert answer_of(node, "recreated") == 3.0


def test_a_node_stops_cleanly_while_a_loader_is_at_work(tmp_path: Path) -> None:
    """The loader's thread is in the middle of torch then, where it must not be torn down."""
    directory = tmp_path / "desired"
    directory.mkdir()
    replace_file(directory / "working.py", WORKS)
    declare(directory, "working", model_path="working:build")
    with Node(directory, {"settle_s": 0.1}) as node:
        node.wait_phase("working", "Loading")
        assert node.stop() == 0
    assert node.lines[-1].endswith("event=Stopped")


def test_room_is_made_by_the_rules_and_a_request_brings_a_model_back(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    settings = {"settle_s": 0.1, "resync_s": 0.3, "max_models": 2, "memory_quota_mb": {"cpu": 10}}
    with Node(directory, settings) as node:
        torch.save(nn.Linear(2048, 2048), directory / "huge.pt")
        declare(directory, "huge", model_path="huge.pt")
        waiting = node.wait_phase("huge", "Pending")
        assert waiting["reason"] == "InsufficientMemory"
        assert "on cpu, where all models together may take 10 MB" in str(waiting["message"])
        assert condition(waiting, "Ready")["reason"] == "InsufficientMemory"

        # The first load brings PyTorch, and a model stays for as long as its load took: it is loaded twice.
        declare(directory, "first", config=constant(0.5))
        node.wait_phase("first", "Ready")
        declare(directory, "first", config=constant(1.0))
        node.wait_generation("first", 2)
        declare(directory, "second", config=constant(2.0))
        node.wait_phase("second", "Ready")
        assert answer_of(node, "first") == 1.0, "so that the second is the least recently used"
        answered_s = monotonic()

        declare(directory, "third", config=constant(3.0))
        node.wait_phase("third", "Ready")
        parked = node.wait_phase("second", "Evicted")
        assert (parked["health"], parked["reason"]) == ("Suspended", "Evicted")
        assert node.status("first")["phase"] == "Ready"

        # One that has begun to answer stays for a moment, whoever waits for its room.
        eventually(lambda: monotonic() > answered_s + STAY_S, "the first has had its time")
        assert answer_of(node, "second") == 2.0
        node.wait_phase("first", "Evicted")
        assert node.status("third")["phase"] == "Ready"

        # Without requests nothing is swapped: the rest of the test's turns show it.
        counts = [loads(node, m) for m in ("first", "second", "third")]
        assert counts == [2, 2, 1]
        replace_file(directory / "noise.yaml", "nonsense\n")
        eventually(lambda: node.find("noise.yaml"), "a later turn")
        assert [loads(node, m) for m in ("first", "second", "third")] == counts
        assert node.status("huge")["reason"] == "InsufficientMemory"
