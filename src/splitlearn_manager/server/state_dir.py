"""A node's own directory: where it is, what is in it, and who has it.

    lock         held for as long as the node lives, so that there is one node a directory
    node.sock    the socket on which it can be asked
    record/      what it must not forget (see `reconcile.store`)
    compiled/    code that was compiled for models, which the next load of the same model takes from there

Everything in it may be deleted at any time, and is made anew by the node that runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

from splitlearn_manager.errors import ServerError

# Longest path of a Unix socket: 108 bytes on Linux, 104 on macOS, the ending zero included.
_LONGEST_SOCKET = 103


def state_dir_for(directory: str | Path) -> Path:
    """The state directory of a desired directory: its own, under `$XDG_STATE_HOME`."""
    base = os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state"
    absolute = os.path.abspath(directory)
    name = f"{Path(absolute).name or 'root'}-{_digest(absolute)}"
    return Path(base) / "splitlearn-manager" / name


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # No HOME, and a user whom the system does not know, as some containers have it: as if HOME were what
        # it is in others. Where nothing can be written there, the node says so and serves.
        return Path("/")


def record_of(state_dir: Path) -> Path:
    """The directory in which a node keeps its record."""
    return state_dir / "record"


def compiled_of(state_dir: Path) -> Path:
    """The directory in which a node keeps what it has compiled for models."""
    return state_dir / "compiled"


def socket_of(state_dir: Path) -> Path:
    """Where the node of a state directory listens; elsewhere if that path would be too long."""
    beside = state_dir / "node.sock"
    if len(os.fsencode(beside)) <= _LONGEST_SOCKET:
        return beside
    return Path(tempfile.gettempdir()) / f"splitlearn-{os.getuid()}-{_digest(str(state_dir))}.sock"


class Claim:
    """The right to be the one node of a state directory; given up by `release` or by dying.

    Where the directory cannot be written there is nothing to claim: `problem` says so, and a second
    node would not be noticed.

    Args:
        state_dir: made if it does not exist.
        directory: the desired directory, for the message.

    Attributes:
        problem: why the claim is not held; empty if it is.

    Raises:
        ServerError: another node has it; the message gives its process id.
    """

    def __init__(self, state_dir: Path, directory: str) -> None:
        self._path = state_dir / "lock"
        self._directory = directory
        self._file: IO[str] | None = None
        self.problem = ""
        self.renew()

    def renew(self) -> None:
        """Takes hold again if somebody has deleted the lock. Raises as the making of the claim."""
        if self._is_held():
            return
        self.release()
        try:
            file = self._open()
        except OSError as error:
            self.problem = f"{self._path}: {error.strerror or error}"
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = self._holder(file)
            file.close()
            raise ServerError(
                f"another node (process {holder}) serves {self._directory} already, or has the state "
                f"directory {self._path.parent}; stop that one, or serve another directory"
            ) from None
        except OSError as error:
            file.close()
            self.problem = f"{self._path}: cannot be locked: {error.strerror or error}"
            return
        self._file, self.problem = file, ""
        with contextlib.suppress(OSError):  # a full disk: it is held all the same
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()

    def release(self) -> None:
        """Lets another node have the directory."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._path.open("a+")
        except OSError:
            if not self._path.exists():
                raise
            return self._path.open("r")  # enough to be refused by the node that holds it

    def _is_held(self) -> bool:
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError:
            return False

    @staticmethod
    def _holder(file: IO[str]) -> str:
        try:
            file.seek(0)
            return file.read().strip() or "unknown"
        except OSError:
            return "unknown"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:10]
