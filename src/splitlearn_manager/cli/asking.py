"""The asking end of a node's control socket: one question, one answer, or the reason why there is none.

It knows the socket's path and the form of questions and answers (see `server.control`), and nothing of
what they mean. It never waits for longer than its patience without a sign of life from the node.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from pathlib import Path
from time import monotonic

PATIENCE_S = 10.0
LONGEST_ANSWER = 512 * 1024 * 1024

_CONNECT_PAUSE_S = 0.05


class NodeError(Exception):
    """The node gave no answer. The message is for people and names the socket."""


class NodeNotRunning(NodeError):
    """Nobody listens on the socket."""


class NotAllowed(NodeError):
    """The socket is another user's."""


class NodeSilent(NodeError):
    """Somebody listens, and says nothing."""


class NodeGone(NodeError):
    """The connection ended before the answer was whole."""


class Refused(NodeError):
    """The node answered that it will not or cannot; `reason` is stable, the message is the node's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def ask(
    path: Path, do: str, *, patience_s: float = PATIENCE_S, **arguments: object
) -> dict[str, object]:
    """The node's answer to a question.

    Args:
        patience_s: how long the node may say nothing at all.

    Raises:
        Refused: the node answered with an error.
        NodeError: one of its other kinds: there is no answer.
    """
    with _connect(path, patience_s) as connection:
        try:
            connection.settimeout(patience_s)
            # A node that is too busy answers before it has read the question, and hangs up.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            line = _read_answer(connection)
        except TimeoutError:
            message = f"the node at {path} has said nothing for {patience_s:g} s"
            raise NodeSilent(message) from None
        except OSError:
            line = b""
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise NodeGone(f"the node at {path} ended before it had answered")
    error = answer.get("error")
    if isinstance(error, dict):
        raise Refused(str(error.get("reason", "")), str(error.get("message", "")))
    return answer


def _connect(path: Path, patience_s: float) -> socket.socket:
    _check_owner(path)
    end = monotonic() + patience_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(patience_s)
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            # Full is the queue of a node that takes nobody up, and for a moment that of a busy one.
            if not isinstance(error, BlockingIOError | TimeoutError):
                raise _unreachable(path, error) from None
            if monotonic() >= end:
                message = f"the node at {path} has taken up no question for {patience_s:g} s"
                raise NodeSilent(message) from None
        else:
            return connection
        select.select([], [], [], _CONNECT_PAUSE_S)


def _unreachable(path: Path, error: OSError) -> NodeError:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        return NodeNotRunning(f"nobody listens on {path}")
    if isinstance(error, PermissionError):
        return NotAllowed(f"{path}: permission denied")
    return NodeError(f"{path}: {error.strerror or error}")


def _check_owner(path: Path) -> None:
    """Refuses a socket that somebody else put there: what is typed here is for our own node."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return  # connecting says what is wrong
    if owner != os.geteuid() != 0:
        raise NotAllowed(f"{path} belongs to user {_name_of(owner)}")


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _read_answer(connection: socket.socket) -> bytes:
    """A line that is not empty; less than that if the node ended."""
    pieces: list[bytes] = []
    size = 0
    while piece := connection.recv(1 << 20):
        if not pieces:
            piece = piece.lstrip(b"\n")
        if piece:
            pieces.append(piece)
            size += len(piece)
            if piece.endswith(b"\n"):
                break
        if size > LONGEST_ANSWER:
            return b""
    return b"".join(pieces)
