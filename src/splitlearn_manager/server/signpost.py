"""A link at the place where the command line looks for the node of a directory, to where it listens.

Without it a node whose `state_dir` is elsewhere would be found only by whoever knows that setting. A
convenience: a node that cannot put it up serves all the same. It never takes the place of a node that
answers.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from splitlearn_manager.server.state_dir import socket_of, state_dir_for

_CONNECT_S = 1.0


class Signpost:
    """Stands until `take_down`.

    Args:
        directory: the desired directory.
        target: the socket on which its node listens.
    """

    def __init__(self, directory: str | Path, target: Path) -> None:
        self._place = socket_of(state_dir_for(directory))
        self._target = Path(os.path.abspath(target))
        self.stands = False
        if self._place == self._target or _answers(self._place):
            return
        with contextlib.suppress(OSError):
            self._place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self._place.with_name(f"{self._place.name}.{os.getpid()}")
            beside.unlink(missing_ok=True)
            beside.symlink_to(self._target)
            beside.replace(self._place)
            self.stands = True

    def take_down(self) -> None:
        """Removes it, unless it leads to another node by now."""
        with contextlib.suppress(OSError):
            if self.stands and self._place.readlink() == self._target:
                self._place.unlink()
        self.stands = False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True
