"""The examples of docs/cli.md, recorded: each command typed once, beside a real node.

cd tests && python -m support.cli_examples ../docs/cli.md      # what `make docs` does
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.cli.reference import page
from support.command_line import SCRIPT
from support.node import Node
from support.served import constant, declare, replace_file, write_factory
from support.waiting import eventually

_PLACE = "/srv"
_STATE = "desired-3ea5296960"


class _Recorder:
    """Types commands in a directory and keeps what they print, by the name of the command."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.examples: dict[str, str] = {}

    def type(self, *arguments: str, lines: int | None = None) -> str:
        """Runs `splitlearn-manager reconcile …`; keeps all that it prints, or its first lines."""
        done = subprocess.run(
            [SCRIPT, "reconcile", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            cwd=self._root,
            env={**os.environ, "XDG_STATE_HOME": str(self._root / "state")},
        )
        head = f" | head -{lines}" if lines is not None else ""
        text = "".join(done.stdout.splitlines(keepends=True)[:lines])
        shown = f"$ splitlearn-manager reconcile {' '.join(arguments)}{head}\n{text}"
        if done.returncode and not head:
            shown += f"$ echo $?\n{done.returncode}\n"
        self.keep(arguments[0], shown)
        return done.stdout

    def keep(self, name: str, text: str) -> None:
        text = re.sub(r"\S+/bin/python", ".venv/bin/python", text.replace(str(self._root), _PLACE))
        text = re.sub(r"desired-[0-9a-f]{10}\b", _STATE, text)
        self.examples[name] = self.examples.get(name, "") + text


def masked(example: str) -> list[str]:
    """The lines of an example without what is another with each run: times, sizes, ports, digests.

    What `run` logs comes in the order in which loads end; so the order is left out.
    """
    text = re.sub(r"--confirm-prune [0-9a-f]+", "--confirm-prune DIGEST", example)
    text = re.sub(r"\d[\d,.:]*", "N", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return sorted(lines) if "event=Serving" in text else lines


def record(root: Path) -> Mapping[str, str]:
    """The examples, by command. `root` must have a short path, as sockets have."""
    directory, recorder = root / "desired", _Recorder(root)
    directory.mkdir()
    write_factory(directory)
    replace_file(directory / "ranker.py", 'def build():\n    raise ValueError("no vocabulary")\n')
    torch.save(nn.Linear(2048, 3072), directory / "bert.pt")
    declare(directory, "bert", model_path="bert.pt", priority=1)
    declare(directory, "mlp", config=constant(1.0))
    declare(directory, "ranker", model_path="ranker:build")
    replace_file(
        directory / "gpt2.yaml", "model_id: gpt2\nmodel_path: nets:constant\nmax_memory_mb: 4gb\n"
    )
    settings = {"port": 0, "metrics_port": 0, "memory_quota_mb": {"cpu": 18432}}
    replace_file(directory / "server.yaml", json.dumps(settings))
    recorder.type("validate")
    recorder.type("plan")
    recorder.type("schema", lines=6)
    _of_once(root, recorder)
    with Node(directory, settings, environment={"XDG_STATE_HOME": str(root / "state")}) as node:
        node.wait_phase("mlp", "Ready")
        node.wait_phase("ranker", "Failed")
        eventually(lambda: node.find("Loaded model=bert"), "bert is loaded")
        eventually(lambda: any("Ask it" in line for line in node.printed), "the node is ready")
        recorder.keep("run", _of_run(node))
        _of_rollouts(node, recorder)
        _of_what_is_so(node, recorder)
        _beside(directory, recorder)
    return recorder.examples


def _of_rollouts(node: Node, recorder: _Recorder) -> None:
    """What is typed while a version of a model is tried; the model is gone afterwards."""
    rollout = {"canary": [{"percent": 5, "for_s": 600}, {"percent": 50, "for_s": 600}]}
    declare(node.directory, "tuned", config=constant(1.0))
    node.wait_phase("tuned", "Ready")
    for value, command in ((2.0, "promote"), (3.0, "abort")):
        declare(node.directory, "tuned", config=constant(value), rollout=rollout)
        told = lambda: "is tried: " in str(node.status("tuned")["conditions"])  # noqa: E731
        eventually(told, "the version is tried")
        recorder.type(command, "tuned")
        eventually(lambda: not told(), "it has ended")  # noqa: B023
    (node.directory / "tuned.yaml").unlink()
    eventually(lambda: not node.status("tuned"), "the model is gone")


def _of_what_is_so(node: Node, recorder: _Recorder) -> None:
    """What is typed while ranker has failed, and is not just being tried again.

    Where a try falls into it, all is typed once more: the pauses between tries grow.
    """

    def settled() -> object:
        status = node.status("ranker")
        still = json.loads(node.get("/api/v1/node")[1])["settled"]
        return status["phase"] == "Failed" and still and status["attempts"]

    def typed() -> bool:
        tries = eventually(settled, "ranker has failed, and nothing is going on")
        kept = dict(recorder.examples)
        recorder.type("status")
        recorder.type("status", "mlp")
        recorder.type("explain", "ranker")
        if tries == settled():
            return True
        recorder.examples = kept
        return False

    eventually(typed, "no try falls into what is typed", 120)


def _beside(directory: Path, recorder: _Recorder) -> None:
    """What is typed beside the node."""
    recorder.type("wait", "--for", "ready", "mlp")
    recorder.type("wait", "--for", "ready", "--timeout", "1", "bert", "rankr")
    recorder.type("suspend", "mlp")
    recorder.type("resume", "mlp")
    recorder.type("retry", "ranker")
    recorder.type("golden", "mlp")
    (directory / "gpt2.yaml").unlink()
    declare(directory, "mlp", config=constant(1.0), priority=2)
    recorder.type("wait", "--for", "synced", "mlp")
    recorder.type("history", "mlp")
    recorder.type("events", "mlp")
    for model_id in ("bert", "ranker"):
        (directory / f"{model_id}.yaml").unlink()
    printed = recorder.type("apply")
    digest = re.search(r"--confirm-prune (\w+)", printed)
    assert digest is not None, printed
    recorder.type("apply", "--confirm-prune", digest[1])


def _of_once(root: Path, recorder: _Recorder) -> None:
    directory = root / "small"
    directory.mkdir()
    write_factory(directory)
    declare(directory, "mlp", config=constant(1.0))
    recorder.type("once", "small")


def _of_run(node: Node) -> str:
    """The log of the start up to the loads, and what is printed when all is done.

    Each kind of line once a model: on a busy machine a load that fails has been tried again by then.
    """
    log: dict[tuple[str, ...], str] = {}
    for line in node.lines:
        if "ranker" not in line or "LoadFailed" in line:
            log.setdefault(tuple(re.findall(r"(?:event|model|meanwhile)=(\S+)", line)), line)
    shown = list(log.values())[:7]
    return "\n".join(["$ splitlearn-manager reconcile desired", *shown, *node.printed]) + "\n"


def main() -> None:
    """Writes the page that is named."""
    os.environ["NO_COLOR"] = "1"
    with tempfile.TemporaryDirectory(prefix="cli", dir="/tmp") as root:
        text = page(record(Path(root)))
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
