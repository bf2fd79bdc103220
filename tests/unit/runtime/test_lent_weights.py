"""Workers with the same weights share one copy: seen by what each of them holds alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from splitlearn_manager.runtime.process import ProcessRuntime, RunningInProcess
from support.models import model_config

pytestmark = pytest.mark.skipif(
    not hasattr(psutil.Process(), "memory_full_info")
    or not hasattr(__import__("os"), "memfd_create"),
    reason="what a process holds alone can be read on Linux only",
)

WIDTH = 2048
LAYERS = 4
WEIGHTS_MB = LAYERS * WIDTH * WIDTH * 4 / 2**20
X = torch.ones(1, WIDTH)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()


@pytest.fixture
def runtime() -> Iterator[tuple[ProcessRuntime, list[RunningInProcess]]]:
    started: list[RunningInProcess] = []
    yield ProcessRuntime(), started
    for running in started:
        running.close()


Runtime = tuple[ProcessRuntime, list[RunningInProcess]]


def start(runtime: Runtime, path: Path, **keys: object) -> RunningInProcess:
    running = runtime[0].start(model_config(path, **keys), "cpu")
    runtime[1].append(running)
    return running


def proportional_mb(*running: RunningInProcess) -> float:
    """What they hold together: what several of them have in common counts once."""
    found = (psutil.Process(each._worker.pid).memory_full_info().pss for each in running)
    return float(sum(found)) / 2**20


def answer(running: RunningInProcess) -> torch.Tensor:
    found = running.compute_function.compute(X)
    assert isinstance(found, torch.Tensor)
    return found


def test_two_of_one_file_hold_the_weights_once(tmp_path: Path, runtime: Runtime) -> None:
    module = network(1)
    torch.save(module, tmp_path / "m.pt")
    first = start(runtime, tmp_path / "m.pt")
    alone_mb = proportional_mb(first)
    second = start(runtime, tmp_path / "m.pt", batch_size=4)
    assert proportional_mb(first, second) < alone_mb + 0.5 * WEIGHTS_MB + 60
    with torch.inference_mode():
        expected = module(X)
    assert torch.allclose(answer(first), expected, atol=1e-5)
    assert torch.equal(answer(first), answer(second))


def test_the_borrower_is_right_when_the_lender_has_ended(tmp_path: Path, runtime: Runtime) -> None:
    torch.save(network(1), tmp_path / "m.pt")
    first = start(runtime, tmp_path / "m.pt")
    expected = answer(first)
    second = start(runtime, tmp_path / "m.pt")
    first.close()
    assert torch.equal(answer(second), expected)
    third = start(runtime, tmp_path / "m.pt")
    second.close()
    assert torch.equal(answer(third), expected)
    (file,) = runtime[0]._lent._files.values()
    assert len(file.entries) == LAYERS
    third.close()
    assert runtime[0]._lent._files == {}


def test_what_nobody_borrowed_goes_with_the_lender(tmp_path: Path, runtime: Runtime) -> None:
    module = network(1)
    torch.save(module, tmp_path / "a.pt")
    other = network(2)
    other[0] = module[0]  # one layer in common
    torch.save(other, tmp_path / "b.pt")
    first = start(runtime, tmp_path / "a.pt")
    second = start(runtime, tmp_path / "b.pt")
    expected = answer(second)
    first.close()
    assert torch.equal(answer(second), expected)
    lent = min(runtime[0]._lent._files.items())[1]
    assert [entry[1] for entry in lent.entries.values()] == [[WIDTH, WIDTH]]
    held_mb = os.fstat(lent.descriptor).st_blocks * 512 / 2**20
    assert held_mb < 2 * WEIGHTS_MB / LAYERS


def test_another_model_shares_nothing(tmp_path: Path, runtime: Runtime) -> None:
    torch.save(network(1), tmp_path / "a.pt")
    torch.save(network(2), tmp_path / "b.pt")
    first, second = start(runtime, tmp_path / "a.pt"), start(runtime, tmp_path / "b.pt")
    assert not torch.equal(answer(first), answer(second))
    assert len(runtime[0]._lent._files) == 2


def test_training_one_leaves_the_other_as_it_is(tmp_path: Path, runtime: Runtime) -> None:
    torch.save(network(1), tmp_path / "m.pt")
    first, second = start(runtime, tmp_path / "m.pt"), start(runtime, tmp_path / "m.pt")
    expected = answer(second)
    for trained, other in ((first, second), (second, first)):
        before = answer(other)
        output = trained.compute_function.forward_for_training(X, "f")
        trained.compute_function.backward("f", torch.ones_like(output), learning_rate=1e-3)
        assert not torch.equal(answer(trained), expected)
        assert torch.equal(answer(other), before)


def test_a_rewritten_file_gives_the_new_weights(tmp_path: Path, runtime: Runtime) -> None:
    torch.save(network(1), tmp_path / "m.pt")
    first = start(runtime, tmp_path / "m.pt")
    before = answer(first)
    module = network(1)
    with torch.no_grad():
        module[3].weight[-1, -1] += 1  # it looks alike
    torch.save(module, tmp_path / "m.pt")
    second = start(runtime, tmp_path / "m.pt")
    with torch.inference_mode():
        assert torch.allclose(answer(second), module(X), atol=1e-5)
    assert torch.equal(answer(first), before)
