"""The process is stopped for seconds, as by a debugger or a paused machine, and goes on where it was."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from chaos.faults import SETTINGS, served, wait_ready
from support.node import Node
from support.served import answer_of, constant, declare, loads
from support.waiting import eventually

MODELS = {f"m{n}": float(n) for n in range(1, 5)}


def test_a_stopped_process_goes_on_without_doing_anything_twice(tmp_path: Path) -> None:
    directory, pause = served(tmp_path / "desired", MODELS), threading.Event()
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MODELS)
        for round_ in range(3):
            os.kill(node.process.pid, signal.SIGSTOP)
            try:
                declare(directory, "m1", config=constant(10.0 + round_))
                pause.wait(3.0)
            finally:
                os.kill(node.process.pid, signal.SIGCONT)
            eventually(lambda r=round_: answer_of(node, "m1") == 10.0 + r, "the edit is served")
        eventually(lambda: loads(node, "m1") >= 4, "the log says so")
        assert loads(node, "m1") == 4
        for model_id in ("m2", "m3", "m4"):
            assert answer_of(node, model_id) == MODELS[model_id]
            assert loads(node, model_id) == 1
        assert node.get("/healthz")[0] == 200
        assert not node.find("Traceback")
        assert node.stop() == 0


def test_a_process_stopped_in_the_middle_of_an_edit_settles_on_the_whole_file(
    tmp_path: Path,
) -> None:
    """It stops with half of the file seen, and wakes when the file is whole and old enough to count."""
    directory, pause = served(tmp_path / "desired", MODELS), threading.Event()
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MODELS)
        path = directory / "m1.yaml"
        text = path.read_text().replace("1.0", "21.0")
        half = text.index("kwargs")
        with path.open("w") as file:
            file.write(text[:half])
            file.flush()
            os.kill(node.process.pid, signal.SIGSTOP)
            try:
                pause.wait(0.5)
                file.write(text[half:])
                file.flush()
                pause.wait(1.0)
            finally:
                os.kill(node.process.pid, signal.SIGCONT)
        eventually(lambda: answer_of(node, "m1") == 21.0, "the whole file is served")
        eventually(lambda: loads(node, "m1") >= 2, "the log says so")
        assert loads(node, "m1") == 2
