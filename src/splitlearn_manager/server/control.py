"""The socket on which the command line asks a running node; only its own user may.

One question a connection: a line with its name, answered with one JSON document. The only question is
`observe`: what planning needs to know (see `reconcile.observation`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path

from splitlearn_manager.errors import ServerError

log = logging.getLogger(__name__)

_QUESTION_S = 5.0
_ANSWER_S = 10.0
_LONGEST_QUESTION = 100


class NodeNotRunning(Exception):
    """Nobody listens on the socket."""


class _Handler(socketserver.StreamRequestHandler):
    timeout = _QUESTION_S
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError):
            question = self.rfile.readline(_LONGEST_QUESTION).strip().decode("ascii", "replace")
            answer = self.server.answers.get(question)
            if answer is not None:
                self.wfile.write(answer())


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    answers: dict[str, Callable[[], bytes]]

    def handle_error(self, request: object, client_address: object) -> None:
        log.exception("event=ControlFailed")


class ControlSocket:
    """Listens until `close`.

    Args:
        path: of the socket; what an earlier node left there is removed (the caller holds its lock).
        observe: the answer to `observe`.

    Raises:
        ServerError: it cannot listen there.
    """

    def __init__(self, path: Path, observe: Callable[[], bytes]) -> None:
        self._path = path
        try:
            path.unlink(missing_ok=True)
            mask = os.umask(0o177)
            try:
                self._server = _Server(str(path), _Handler)
            finally:
                os.umask(mask)
        except OSError as error:
            raise ServerError(f"socket {path}: {error.strerror or error}") from None
        self._server.answers = {"observe": observe}
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening and removes the socket."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


def ask(path: Path, question: str) -> bytes:
    """The node's answer. Raises NodeNotRunning if nobody listens, TimeoutError if it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise NodeNotRunning(f"nobody listens on {path}") from None
        connection.sendall(f"{question}\n".encode())
        with connection.makefile("rb") as answer:
            return answer.read()
