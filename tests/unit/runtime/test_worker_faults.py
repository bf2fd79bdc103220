"""What goes wrong inside a worker process, or around it, is told to who waits, and stays in that model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import ComputeFailed
from splitlearn_manager.runtime.process import ProcessRuntime, RunningInProcess
from splitlearn_manager.runtime.shared_area import Area
from support.models import model_config

RUNTIME = ProcessRuntime()

CODE = """
import sys
from torch import nn

class Net(nn.Module):
    def __init__(self, wish):
        super().__init__()
        self.wish = wish

    def forward(self, x):
        if x.sum() == 0:
            return x
        return getattr(self, self.wish)(x)

    def sparse(self, x):
        return x.to_sparse()

    def without_stderr(self, x):
        sys.stderr.close()
        raise ValueError("no such thing")

def make(wish):
    return Net(wish)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "faulty_net.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def started() -> Iterator[list[RunningInProcess]]:
    """What is put into it is closed in the end."""
    running: list[RunningInProcess] = []
    yield running
    for each in running:
        each.close()


def start(code: Path, wish: str, started: list[RunningInProcess]) -> RunningInProcess:
    config = model_config(
        "faulty_net:make", warmup=False, trusted=True, config={"kwargs": {"wish": wish}}
    )
    running = RUNTIME.start(config.with_base_dir(code), "cpu")
    started.append(running)
    return running


def fulfil(running: RunningInProcess) -> torch.Tensor:
    """Ask the model for its wish; a caller that is not answered is not left waiting for ever."""
    with working_for(10.0):
        answer = running.compute_function.compute(torch.ones(1, 2))
    assert isinstance(answer, torch.Tensor)
    return answer


def still_answers(running: RunningInProcess) -> bool:
    x = torch.zeros(1, 2)
    with working_for(10.0):
        answer = running.compute_function.compute(x)
    return isinstance(answer, torch.Tensor) and torch.equal(answer, x)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("sparse", "RuntimeError: nbytes is not defined for sparse tensors"),
        ("without_stderr", "ValueError: no such thing"),
    ],
)
def test_what_cannot_be_told_is_an_error_and_leaves_nobody_waiting(
    code: Path, started: list[RunningInProcess], wish: str, words: str
) -> None:
    """Seen to fail: the thread in the worker ended by that, and its caller waited for ever."""
    running = start(code, wish, started)
    with pytest.raises(ComputeFailed, match=words) as caught:
        fulfil(running)
    assert caught.value.reason == "ModelRaised"
    assert still_answers(running)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open")
def test_memory_that_is_refused_leaves_no_descriptor_open() -> None:
    """Seen to fail: each refused request left one more, until the node had none."""
    before = len([*Path("/proc/self/fd").iterdir()])
    for size in (2**60, 2**63):  # more than may be mapped; more than a file can have
        with pytest.raises((OSError, OverflowError)):
            Area.of_size(size)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
