"""The command line: in this process, in one of its own, and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

COMMAND = (sys.executable, "-m", "splitlearn_manager.reconcile")
SCRIPT = Path(sys.executable).with_name("splitlearn-manager")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def reconcile(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `python -m splitlearn_manager.reconcile` with these arguments."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def lines_of(text: str) -> list[str]:
    """The lines with each run of spaces as one, for what is said rather than how it is aligned."""
    return [re.sub(r" {2,}", "  ", line.rstrip()) for line in text.splitlines()]


def plain(text: str) -> str:
    """What is left without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


class Terminal:
    """A command on a terminal of its own, until the `with` ends.

    Args:
        environment: variables besides those of the tests; NO_COLOR is not taken over from them.
    """

    def __init__(
        self, *arguments: object, environment: Mapping[str, str] | None = None, columns: int = 80
    ) -> None:
        self._arguments = [*COMMAND, *map(str, arguments)]
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self._environment = {**kept, "TERM": "xterm-256color", **(environment or {})}
        self._columns = columns
        self._pieces: list[bytes] = []

    def __enter__(self) -> Terminal:
        self._ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, self._columns, 0, 0))
        self.process = subprocess.Popen(
            self._arguments,
            stdin=its,
            stdout=its,
            stderr=its,
            env=self._environment,
            start_new_session=True,
        )
        os.close(its)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        self._reader.join(10)
        os.close(self._ours)
        if kind is not None:
            print(self.written[-4000:])

    @property
    def written(self) -> str:
        """All that was written so far, with colours and movements of the cursor."""
        return b"".join(self._pieces).decode(errors="replace").replace("\r\n", "\n")

    def wait(self) -> int:
        """Waits for the end; the exit code."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._ours, 65536)
            except OSError:  # Linux's way of saying that the other side was closed
                return
            if not piece:
                return
            self._pieces.append(piece)


def on_a_terminal(
    *arguments: object, environment: Mapping[str, str] | None = None, columns: int = 80
) -> str:
    """What a command that ends by itself writes to a terminal."""
    with Terminal(*arguments, environment=environment, columns=columns) as terminal:
        terminal.wait()
        return terminal.written
