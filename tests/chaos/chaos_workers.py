"""Worker processes are killed again and again under load: requests inside them fail, nothing else does."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from pathlib import Path

import psutil
import torch

from splitlearn_comm.client import RemoteComputeError
from support.node import Node
from support.served import Callers, X, constant, declare, impatient, save_version, write_factory
from support.waiting import eventually

KILLS = int(os.environ.get("KILLS") or 100)
EACH = 8
"""Kills of one model: a few less than what the limit on failed loads lets pass within a minute."""
MB = 2**20


def worker_of(node: Node, model_id: str) -> int:
    """The process id of the worker that serves the model; 0 if none does."""
    told = str(node.status(model_id)).partition("'events'")[0]
    found = re.findall(r"in a process of its own, pid (\d+)", told)
    return int(found[0]) if found else 0


class Asking(threading.Thread):
    """Asks a model all the time; keeps the errors."""

    def __init__(self, node: Node, model_id: str) -> None:
        super().__init__(daemon=True)
        self._node = node
        self._model_id = model_id
        self.over = threading.Event()
        self.answered = 0
        self.errors: list[str] = []

    def run(self) -> None:
        with impatient(self._node) as client:
            while not self.over.is_set():
                try:
                    answer = client.compute(X, model_id=self._model_id)
                except RemoteComputeError as error:
                    self.errors.append(str(error))
                    self.over.wait(0.01)
                else:
                    assert torch.equal(answer, torch.full((1, 4), 16.0))
                    self.answered += 1


def test_workers_that_are_killed_fail_the_requests_inside_them_and_nothing_else(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    save_version(directory / "v.pt", 1)
    ids = [f"p{n}" for n in range(-(-KILLS // EACH))]
    for model_id in ids:
        declare(
            directory,
            model_id,
            model_path="v.pt",
            runtime="process",
            config={"input_shape": [1, 4]},
        )
    declare(directory, "beside", config=constant(1.0))
    with Node(directory, {"max_models": len(ids) + 2}) as node:
        for model_id in (*ids, "beside"):
            node.wait_phase(model_id, "Ready")
        process = psutil.Process(node.process.pid)
        before_mb = process.memory_info().rss / MB
        asking = [Asking(node, model_id) for model_id in ids]
        killed: set[int] = set()
        with Callers(node, "beside", 2):
            for thread in asking:
                thread.start()
            for model_id in itertools.islice(itertools.cycle(ids), KILLS):
                pid = eventually(
                    lambda m=model_id: worker_of(node, m) not in killed and worker_of(node, m),  # type: ignore[misc]
                    f"{model_id} has a worker again",
                    90,
                )
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            for model_id in ids:
                node.wait_phase(model_id, "Ready", 90)
            for thread in asking:
                thread.over.set()
                thread.join(60)
        assert len(killed) == KILLS
        assert not any(psutil.pid_exists(pid) for pid in killed)
        errors = [error for thread in asking for error in thread.errors]
        inside = [e for e in errors if "INTERNAL: " in e]
        # While a worker comes back, its model is not ready: that is said as for any model that loads.
        assert all("SIGKILL" in e for e in inside)
        assert all("UNAVAILABLE: " in e for e in errors if e not in inside)
        assert all(thread.answered for thread in asking)
        after_mb = process.memory_info().rss / MB
        workers = [c for c in process.children(recursive=True) if c.is_running()]
        print(
            f"\n{KILLS} kills of {len(ids)} models: {len(inside)} requests were inside and failed INTERNAL; "
            f"the node: {before_mb:.0f} MB before, {after_mb:.0f} MB after; {len(workers)} processes"
        )
        assert after_mb < before_mb * 1.1 + 30
        # One for each model, and the one that they are forked from.
        assert len(workers) <= len(ids) + 2
