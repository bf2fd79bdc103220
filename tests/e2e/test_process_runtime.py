"""Models in worker processes beside others, on a real node: what crashes is one model, and it comes back."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import grpc
import psutil
import pytest
import torch

from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client import RemoteComputeError
from support.node import Node
from support.served import X, declare, history, impatient, save_version, version_of
from support.waiting import eventually

KILLS = 8
"""Fewer than what the limit on failed loads of one model lets pass within a minute."""


def worker_of(node: Node, model_id: str) -> int:
    """The process id of the worker that serves the model; 0 if none does."""
    told = str(node.status(model_id))
    found = re.findall(r"in a process of its own, pid (\d+)", told.partition("'events'")[0])
    return int(found[0]) if found else 0


class Asking:
    """Threads that ask for a model all the time; each error is kept with its status."""

    def __init__(self, node: Node, model_id: str, threads: int) -> None:
        self._node = node
        self._model_id = model_id
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        self.answered = 0
        self.errors: list[str] = []
        self.wrong: list[torch.Tensor] = []

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        with impatient(self._node) as client:
            while not self._ended.is_set():
                try:
                    answer = client.compute(X, model_id=self._model_id)
                except RemoteComputeError as error:
                    self.errors.append(str(error))
                    continue
                if version_of(answer) != 1:
                    self.wrong.append(answer)
                self.answered += 1


@pytest.mark.skipif(os.name != "posix", reason="workers are killed by signals")
def test_killed_workers_fail_what_is_inside_and_come_back(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    save_version(tmp_path / "m.pt", 1)
    save_version(tmp_path / "other.pt", 2)
    declare(directory, "m", model_path=str(tmp_path / "m.pt"), runtime="process")
    declare(directory, "other", model_path=str(tmp_path / "other.pt"))
    with Node(directory) as node:
        node.wait_phase("m", "Ready")
        node.wait_phase("other", "Ready")
        killed: list[int] = []
        with Asking(node, "m", 4) as asking, impatient(node) as client:
            for _ in range(KILLS):
                pid = eventually(
                    lambda: (p := worker_of(node, "m")) not in {0, *killed} and p,
                    "a new worker serves",
                    90,
                )
                before = asking.answered
                eventually(lambda before=before: asking.answered > before + 4, "it answers", 60)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                assert version_of(client.compute(X, model_id="other")) == 2
        assert asking.wrong == []
        for error in asking.errors:
            inside = "INTERNAL: " in error and "SIGKILL" in error
            meanwhile = "UNAVAILABLE: " in error
            assert inside or meanwhile, error
        assert not any(psutil.pid_exists(pid) for pid in killed)
        status = node.wait_phase("m", "Ready", 90)
        assert any(reason == "WorkerDied" for reason, _ in history(status))


def test_a_crashed_model_says_why_and_the_node_ends_without_orphans(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "bad_net.py").write_text(
        "import os, torch\n\nclass Bad(torch.nn.Module):\n    def forward(self, x):\n"
        "        print('about to fall', flush=True)\n        os._exit(9)\n\n"
        "def bad():\n    return Bad()\n"
    )
    declare(directory, "m", model_path="bad_net:bad", runtime="process", warmup=False)
    with Node(directory) as node:
        node.wait_phase("m", "Ready")
        with (
            impatient(node) as client,
            pytest.raises(RemoteComputeError, match="exit code 9") as caught,
        ):
            client.compute(X, model_id="m")
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        eventually(lambda: node.find('msg="about to fall"'), "what it printed is logged")
        eventually(lambda: node.find("reason=WorkerDied"), "its end is logged")
        node.wait_phase("m", "Ready")
        workers = psutil.Process(node.process.pid).children(recursive=True)
        assert workers
        node.process.kill()
        psutil.wait_procs(workers, timeout=20)
        assert not [worker for worker in workers if worker.is_running()]


def test_an_update_and_the_way_between_thread_and_process(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    save_version(tmp_path / "m.pt", 1)
    keys = {"model_path": str(tmp_path / "m.pt")}
    declare(directory, "m", runtime="process", **keys)
    with Node(directory) as node, GRPCComputeClient(node.address) as client:
        node.wait_phase("m", "Ready")
        first = worker_of(node, "m")
        assert version_of(client.compute(X, model_id="m")) == 1
        save_version(tmp_path / "m.pt", 2)
        eventually(
            lambda: version_of(client.compute(X, model_id="m")) == 2, "the new weights serve"
        )
        eventually(lambda: not psutil.pid_exists(first), "the old worker has ended")
        declare(directory, "m", runtime="thread", **keys)
        node.wait_generation("m", 2)
        assert worker_of(node, "m") == 0
        assert version_of(client.compute(X, model_id="m")) == 2
