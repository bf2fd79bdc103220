"""A node's own directory: who serves a desired directory, and the socket on which it can be asked.

One node a state directory: the lock file is held for as long as the process lives, so it is never left
behind by a crash. Everything in the directory may be deleted at any time; a node that runs then is only
no longer found by the command line.
"""

from __future__ import annotations

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
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    absolute = os.path.abspath(directory)
    name = f"{Path(absolute).name or 'root'}-{_digest(absolute)}"
    return Path(base) / "splitlearn-manager" / name


def socket_of(state_dir: Path) -> Path:
    """Where the node of a state directory listens; elsewhere if that path would be too long."""
    beside = state_dir / "node.sock"
    if len(os.fsencode(beside)) <= _LONGEST_SOCKET:
        return beside
    return Path(tempfile.gettempdir()) / f"splitlearn-{os.getuid()}-{_digest(str(state_dir))}.sock"


class Claim:
    """The right to be the one node of a state directory; given up by `release` or by dying.

    Args:
        state_dir: made if it does not exist.
        directory: the desired directory, for the message.

    Raises:
        ServerError: another node has it (the message gives its process id), or the directory cannot
            be written.
    """

    def __init__(self, state_dir: Path, directory: str) -> None:
        path = state_dir / "lock"
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file: IO[str] = path.open("a+")
        except OSError as error:
            raise ServerError(f"state directory {state_dir}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ServerError(
                f"another node (process {holder}) serves {directory} already"
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets another node have the directory."""
        self._file.close()


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:10]
