"""A real node that serves from a real GPU, asked over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from splitlearn_comm.client.errors import RemoteComputeError
from support.node import Node
from support.real_gpu import WIDTH, RealGpu, Weights
from support.served import condition, declare, history, impatient, loads, replace_file
from support.waiting import eventually

WORKERS = 2

# Each thread that serves takes room for products once and keeps it; and see test_gpu_memory.
SLACK_MB = 48.0 + 64.0 * WORKERS

FACTORIES = """
import torch
from torch import nn

def greedy(device):
    held = torch.ones(512 * 2**18, device=device)
    return nn.Linear(2**20, 2**22, bias=False, device=device)


# Takes 16 TB for each input after the first.
class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        taken = torch.empty(max(0, len(x) - 1) * 2**44, dtype=torch.uint8, device=x.device)
        return x * self.scale + taken.sum()
"""


def inputs(seed: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def running(gpu: RealGpu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("desired")
    (directory / "on_gpu.py").write_text(FACTORIES)
    settings = {"memory_quota_mb": {gpu.device: 1000}, "max_workers": WORKERS}
    with Node(directory, settings) as started:
        yield started


@pytest.fixture
def node(running: Node) -> Iterator[Node]:
    """The node, which serves nothing yet."""
    yield running
    remove(running, *[p.stem for p in running.directory.glob("*.yaml") if p.stem != "server"])


def compute(node: Node, model_id: str, x: torch.Tensor) -> torch.Tensor:
    with impatient(node) as client:
        answer = client.compute(x, model_id=model_id)
    assert isinstance(answer, torch.Tensor)
    return answer


def remove(node: Node, *model_ids: str) -> None:
    for model_id in model_ids:
        (node.directory / f"{model_id}.yaml").unlink(missing_ok=True)
    for model_id in model_ids:
        node.wait_gone(model_id)


def test_the_gpu_answers_with_the_numbers_of_the_cpu_whoever_asks_at_the_same_time(
    gpu: RealGpu, node: Node, weights: Weights
) -> None:
    path = str(weights(128))
    shape = {"input_shape": [-1, WIDTH]}
    declare(node.directory, "on-gpu", model_path=path, device="auto", config=shape)
    declare(node.directory, "on-cpu", model_path=path, device="cpu", config=shape)
    for model_id, device in (("on-gpu", gpu.device), ("on-cpu", "cpu")):
        assert node.wait_phase(model_id, "Ready", 120)["device"] == device
    expected = [compute(node, "on-cpu", inputs(seed)) for seed in range(8)]
    wrong: list[BaseException] = []

    def ask(first: int) -> None:
        try:
            for number in range(24):
                seed = (first + number) % len(expected)
                answer = compute(node, "on-gpu", inputs(seed))
                torch.testing.assert_close(answer, expected[seed], rtol=1e-3, atol=1e-4)
        except BaseException as error:
            wrong.append(error)

    callers = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong, wrong[0]
    _, metrics = node.get("/metrics")
    assert 'gpu_memory_mb{gpu_id="0"}' in metrics


def test_an_update_beside_the_old_version_fails_no_request_and_gives_its_memory_back(
    gpu: RealGpu, node: Node, weights: Weights, tmp_path: Path
) -> None:
    versions = [weights(64), weights(128)]
    replace_file(tmp_path / "m.pt", versions[0].read_bytes())
    shape = {"input_shape": [-1, WIDTH]}
    where = {"model_path": str(tmp_path / "m.pt"), "device": gpu.device, "config": shape}
    declare(node.directory, "m", update="surge", **where)
    node.wait_phase("m", "Ready", 120)
    x = inputs(0)
    answers = [compute(node, "m", x)]
    used_mb, done = gpu.used_mb, threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not done.is_set():
                answers.append(compute(node, "m", x))
        except BaseException as error:
            failures.append(error)

    caller = threading.Thread(target=ask, daemon=True)
    caller.start()
    replace_file(tmp_path / "m.pt", versions[1].read_bytes())
    eventually(lambda: loads(node, "m") == 2, "the new version is loaded", 60)
    count = len(answers)
    eventually(lambda: failures or len(answers) > count + 1, "the new version answers", 60)
    done.set()
    caller.join(30)
    assert not failures, failures[0]
    new = compute(node, "m", x)
    assert not torch.equal(new, answers[0])
    assert all(torch.equal(a, answers[0]) or torch.equal(a, new) for a in answers)
    eventually(lambda: gpu.used_mb - used_mb <= 64 + SLACK_MB, "the old version's memory is back")


def test_a_request_brings_an_evicted_model_back_to_the_gpu(
    gpu: RealGpu, node: Node, weights: Weights
) -> None:
    path, shape = str(weights(768)), {"input_shape": [1, WIDTH]}
    used_mb = gpu.used_mb
    for model_id in ("first", "second"):
        keys = {"device": gpu.device, "batch_size": 1, "config": shape}
        declare(node.directory, model_id, model_path=path, **keys)
        node.wait_phase(model_id, "Ready", 120)
    node.wait_phase("first", "Evicted")
    x = inputs(0, batch=1)
    expected = compute(node, "second", x)
    for model_id, other in (("first", "second"), ("second", "first")):
        assert torch.equal(compute(node, model_id, x), expected)
        node.wait_phase(other, "Evicted")
        assert gpu.used_mb - used_mb <= 1000 + SLACK_MB
    assert node.status("second")["device"] == gpu.device
    remove(node, "first", "second")
    eventually(lambda: gpu.used_mb - used_mb <= SLACK_MB, "all memory is back")


def test_a_load_without_memory_is_told_and_tried_again_while_others_serve(
    gpu: RealGpu, node: Node, weights: Weights
) -> None:
    keys = {"device": gpu.device, "config": {"input_shape": [-1, WIDTH]}}
    declare(node.directory, "serves", model_path=str(weights(64)), **keys)
    node.wait_phase("serves", "Ready", 120)
    x = inputs(0)
    expected, used_mb = compute(node, "serves", x), gpu.used_mb
    declare(node.directory, "greedy", model_path="on_gpu:greedy", device=gpu.device)
    status = node.wait_phase("greedy", "Failed", 120)
    assert condition(status, "Ready")["reason"] == "OutOfMemory"
    eventually(lambda: loads(node, "greedy", "failure") >= 2, "it is tried again")
    assert torch.equal(compute(node, "serves", x), expected)
    assert gpu.used_mb - used_mb <= 512 + SLACK_MB
    remove(node, "greedy")
    eventually(lambda: gpu.used_mb - used_mb <= SLACK_MB, "what it had taken is back")


def test_a_forward_without_memory_fails_alone(gpu: RealGpu, node: Node) -> None:
    keys = {"batch_size": 1, "warmup": False, "trusted": True}
    declare(node.directory, "hungry", model_path="on_gpu:Hungry", device=gpu.device, **keys)
    node.wait_phase("hungry", "Ready", 120)
    assert torch.equal(compute(node, "hungry", inputs(0, 1)), 2 * inputs(0, 1))
    used_mb = gpu.used_mb
    for _ in range(3):
        with pytest.raises(RemoteComputeError) as raised:
            compute(node, "hungry", inputs(0, 2))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert torch.equal(compute(node, "hungry", inputs(1, 1)), 2 * inputs(1, 1))
    assert gpu.used_mb - used_mb <= SLACK_MB
    assert "LoadFailed" not in {reason for reason, _ in history(node.status("hungry"))}


def test_a_hidden_gpu_is_not_used(gpu: RealGpu, weights: Weights, tmp_path: Path) -> None:
    with Node(tmp_path / "desired", environment={"CUDA_VISIBLE_DEVICES": ""}) as node:
        shape = {"input_shape": [1, WIDTH]}
        path = str(weights(64))
        declare(node.directory, "anywhere", model_path=path, device="auto", config=shape)
        declare(node.directory, "there", model_path=path, device=gpu.device, config=shape)
        assert node.wait_phase("anywhere", "Ready", 120)["device"] == "cpu"
        status = node.wait_phase("there", "Pending")
        assert condition(status, "Ready")["reason"] == "DeviceNotFound"
