"""What end-to-end tests put into a served directory, and clients that call it all the time.

The models are small and tell what they are: `constant` answers one number everywhere, a checkpoint of
`save_version` answers with its version, and shows it if two versions were mixed.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client.retry import FixedDelay
from support.node import Node
from support.waiting import eventually

WIDTH = 4

FACTORY = """
import torch
from torch import nn

STEP = 0.0


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value) + STEP))

    def forward(self, x):
        return x * 0 + self.value


def constant(value=1.0):
    return Constant(value)
"""

X = torch.ones(1, WIDTH)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes beside the file and renames: nobody ever sees half of it."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    os.replace(beside, path)


def declare(directory: Path, model_id: str, /, **keys: object) -> Path:
    """Writes ID.yaml; by default of the factory that `write_factory` puts there."""
    values = {"model_id": model_id, "model_path": "nets:constant", "device": "cpu", **keys}
    path = directory / f"{model_id}.yaml"
    replace_file(path, "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return path


def constant(value: float) -> dict[str, object]:
    """The `config` of a model that answers `value`."""
    return {"input_shape": [1, WIDTH], "kwargs": {"value": value}}


def write_factory(directory: Path, step: float = 0.0, name: str = "nets") -> Path:
    """NAME.py with the factory `constant`; its models answer `step` more than they are told."""
    path = directory / f"{name}.py"
    replace_file(path, FACTORY.replace("STEP = 0.0", f"STEP = {step}"))
    return path


def version_bytes(path: Path, version: int) -> bytes:
    """A checkpoint of two layers, all weights `version`: its answer to `X` is 16·version²."""
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(version)
    beside = path.with_name(f".{path.name}.saving")
    torch.save(module, beside)
    data = beside.read_bytes()
    beside.unlink()
    return data


def save_version(path: Path, version: int) -> None:
    """Puts a checkpoint of that version in place by a rename."""
    replace_file(path, version_bytes(path, version))


def version_of(answer: torch.Tensor) -> int:
    """The version that answered; fails if the answer is not that of exactly one."""
    values = {float(value) for value in answer.flatten()}
    assert len(values) == 1, f"the rows differ: {answer}"
    version = round(math.sqrt(values.pop()) / WIDTH)
    assert torch.equal(answer, torch.full_like(answer, WIDTH**2 * version**2)), f"mixed: {answer}"
    return version


def impatient(node: Node) -> GRPCComputeClient:
    """A client that tries once: a failure is seen, not retried away."""
    return GRPCComputeClient(node.address, retry_strategy=FixedDelay(max_attempts=1))


def answer_of(node: Node, model_id: str) -> float:
    """What a model of `constant` answers."""
    with impatient(node) as client:
        answer = client.compute(X, model_id=model_id)
    values = {float(value) for value in answer.flatten()}
    assert len(values) == 1
    return values.pop()


def loads(node: Node, model_id: str, status: str = "success") -> int:
    """How often the model was loaded, from the node's metrics."""
    _, body = node.get("/metrics")
    pattern = rf'^model_load_total{{(?=[^}}]*model_id="{re.escape(model_id)}")'
    pattern += rf'(?=[^}}]*status="{status}")[^}}]*}} (\S+)$'
    found = re.search(pattern, body, re.MULTILINE)
    return int(float(found[1])) if found else 0


def condition(status: Mapping[str, object], kind: str) -> dict[str, str]:
    """A model's condition of that type."""
    conditions = status["conditions"]
    assert isinstance(conditions, list)
    return next(dict(c) for c in conditions if c["type"] == kind)


def history(status: Mapping[str, object]) -> list[tuple[str, str]]:
    """Reason and message of each event of a model."""
    events = status["events"]
    assert isinstance(events, list)
    return [(event["reason"], event["message"]) for event in events]


class Sentinel:
    """A model by which a test sees that the node has dealt with everything written before."""

    def __init__(self, node: Node, model_id: str = "sentinel") -> None:
        self._node = node
        self._model_id = model_id
        self._generation = 1
        declare(node.directory, model_id, config=constant(0.0))
        node.wait_phase(model_id, "Ready")

    def passes(self) -> None:
        """Returns once two changes of its own, written after what the test wrote, have taken effect.

        Files settle in the order in which they are written, and one turn of the loop acts on all that
        have settled: whatever the first change's turn began shows at the second's.
        """
        for _ in range(2):
            self._generation += 1
            declare(
                self._node.directory,
                self._model_id,
                config=constant(0.0),
                priority=self._generation,
            )
            self._node.wait_generation(self._model_id, self._generation)


class Callers:
    """Threads that call one model until the `with` ends, which fails if any call failed."""

    def __init__(self, node: Node, model_id: str, threads: int = 1) -> None:
        self.answers: list[list[torch.Tensor]] = [[] for _ in range(threads)]
        self.failures: list[Exception] = []
        self._node = node
        self._model_id = model_id
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(answers,), daemon=True)
            for answers in self.answers
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        self.wait_for(lambda: all(self.answers), "every caller has an answer")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and not self.failures:
            self.one_more_each()
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        if kind is None:
            assert not self.failures, f"{len(self.failures)} calls failed: {self.failures[0]!r}"

    def one_more_each(self) -> None:
        """Waits until each has an answer to a call that began from now on."""
        counts = [len(answers) for answers in self.answers]
        self.wait_for(
            lambda: all(len(a) >= n + 2 for a, n in zip(self.answers, counts, strict=True)),
            "every caller goes on",
        )

    def wait_for(self, look: Callable[[], object], what: str, deadline_s: float = 30.0) -> None:
        """As `eventually`, but a failed call ends it at once."""
        eventually(lambda: self.failures or look(), what, deadline_s)
        assert not self.failures, f"a call failed: {self.failures[0]!r}"

    def _call(self, answers: list[torch.Tensor]) -> None:
        try:
            with impatient(self._node) as client:
                while not self._stop.is_set():
                    answers.append(client.compute(X, model_id=self._model_id))
        except Exception as error:
            self.failures.append(error)
