"""A real node in a process of its own, serving a directory on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from splitlearn_comm import GRPCComputeClient
from splitlearn_manager.server.state_dir import state_dir_for
from support.waiting import eventually

_ENDED = ["ended"]


class Node:
    """`python -m splitlearn_manager.reconcile DIRECTORY`, started on enter and ended on exit.

    Args:
        directory: made if it does not exist.
        settings: keys of server.yaml besides the ports, which the system chooses.
        environment: variables that the process gets besides those of the tests.
        launcher: a command that the node's own is appended to; it must end in an exec of it.

    Attributes:
        state_dir: where the node keeps its state.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self._environment = dict(environment or {})
        self._launcher = tuple(launcher)
        directory.mkdir(exist_ok=True)
        values = {"port": 0, "metrics_port": 0, **(settings or {})}
        (directory / "server.yaml").write_text(json.dumps(values))
        self.state_dir = Path(str(values.get("state_dir") or state_dir_for(directory)))
        self.lines: list[str] = []
        self.printed: list[str] = []

    def __enter__(self) -> Node:
        self.spawn()
        try:
            serving = eventually(self._serving_or_ended, "the node serves", 60)
            assert serving != _ENDED, f"the node ended with exit code {self.process.returncode}"
        except BaseException:
            self.kill()
            print("\n".join(self.lines[-60:]))
            raise
        fields = dict(part.split("=", 1) for part in serving[0].split() if "=" in part)
        self.address, self.http = fields["grpc"], fields["http"]
        return self

    def spawn(self) -> None:
        """Starts the process, and waits for nothing; `with` does both."""
        self.process = subprocess.Popen(
            [
                *self._launcher,
                *(sys.executable, "-m", "splitlearn_manager.reconcile", str(self.directory)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._environment},
        )
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stderr, self.lines), (self.process.stdout, self.printed))
        ]
        for reader in self._readers:
            reader.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if kind else signal.SIGTERM)
        self.process.wait(60)
        for reader in self._readers:
            reader.join(10)
        if kind is not None:
            print("\n".join(self.lines[-60:]))

    @staticmethod
    def _read(stream: object, into: list[str]) -> None:
        with stream:  # type: ignore[attr-defined]
            for line in stream:  # type: ignore[attr-defined]
                into.append(line.rstrip("\n"))

    def _serving_or_ended(self) -> list[str]:
        ended = self.process.poll() is not None
        return self.find("event=Serving ") or (_ENDED if ended else [])

    def find(self, text: str) -> list[str]:
        """The lines logged so far that contain `text`."""
        return [line for line in list(self.lines) if text in line]

    def get(self, path: str) -> tuple[int, str]:
        """The status and the body of a GET on the node's HTTP port."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def status(self, model_id: str) -> dict[str, object]:
        """The model's status as /api/v1/models/ID tells it; empty if there is none."""
        code, body = self.get(f"/api/v1/models/{model_id}")
        return dict(json.loads(body)) if code == 200 else {}

    def wait_phase(self, model_id: str, phase: str, deadline_s: float = 60.0) -> dict[str, object]:
        """Waits until the model is in the phase and gives its status."""
        look = lambda: (s := self.status(model_id)).get("phase") == phase and s  # noqa: E731
        return eventually(look, f"{model_id} is {phase}", deadline_s) or {}

    def wait_generation(self, model_id: str, generation: int) -> dict[str, object]:
        """Waits until that generation serves and gives the model's status."""

        def look() -> dict[str, object]:
            status = self.status(model_id)
            served = status.get("observed_generation") == generation
            return status if served and status.get("phase") == "Ready" else {}

        return eventually(look, f"{model_id} serves generation {generation}")

    def wait_gone(self, model_id: str) -> None:
        eventually(lambda: not self.status(model_id), f"{model_id} is gone")

    def client(self) -> GRPCComputeClient:
        return GRPCComputeClient(self.address)

    def kill(self) -> None:
        """SIGKILL: the process ends at once, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)
