"""The socket on which the command line reaches a running node; only the node's own user may use it.

One question a connection: a line of JSON, `{"do": NAME, …}`, answered with one line of JSON. What went
wrong is an answer too: `{"error": {"reason", "message"}}`. While a question waits for something to
happen, the node sends an empty line now and then: it shows the asker that the node is alive, and the
node that the asker still listens.

Each question has a thread of its own, so none holds up another; a question has a size limit and a
deadline, and there is a limit to how many are answered at a time. What the questions mean is not known
here; that is in `node_api`. The other end is `splitlearn_manager.cli.asking`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from splitlearn_manager.errors import ServerError, SplitlearnError
from splitlearn_manager.logs import log_event
from splitlearn_manager.monitoring.accepting import Acceptor

log = logging.getLogger(__name__)

LONGEST_QUESTION = 64 * 1024
MOST_QUESTIONS = 128

_QUESTION_S = 5.0
_SEND_S = 10.0
_SEND_AT_ONCE = 64 * 1024
_ACCEPT_QUEUE = 64
_FULL_PAUSE_S = 0.1
_STOPPING = "the node is shutting down"


class BadQuestion(SplitlearnError):
    """The question is not one that can be answered."""


class NodeStopping(SplitlearnError):
    """The node shuts down before what was waited for has happened."""


@dataclass(frozen=True)
class Question:
    """What was asked, with its arguments.

    Attributes:
        listens: whether the asker is still there and the node goes on; for answers that wait.
    """

    name: str
    arguments: Mapping[str, object]
    listens: Callable[[], bool] = field(default=lambda: True, compare=False)

    def text(self, key: str) -> str:
        """An argument that must be there, as text."""
        value = self.arguments.get(key)
        if not isinstance(value, str) or not value:
            raise BadQuestion(f"{self.name}: expected `{key}` as text, got {json.dumps(value)}")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self.arguments.get(key) is not None else None

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of texts; None if it is not there."""
        value = self.arguments.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadQuestion(f"{self.name}: expected `{key}` as a list of texts")
        return tuple(value)

    def number(self, key: str, otherwise: float) -> float:
        value = self.arguments.get(key, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise BadQuestion(
                f"{self.name}: expected `{key}` as a number ≥ 0, got {json.dumps(value)}"
            )
        return value

    def flag(self, key: str) -> bool:
        value = self.arguments.get(key, False)
        if not isinstance(value, bool):
            raise BadQuestion(f"{self.name}: expected `{key}` as true or false")
        return value


Answer = Callable[[Question], Mapping[str, object] | bytes]
"""Answers a question, with data for JSON or with a line of JSON; a SplitlearnError is an answer too."""


class ControlSocket:
    """Listens until `close`.

    Args:
        path: of the socket; what an earlier node left there is removed (the caller holds its lock).
        answers: by the name of the question.

    Raises:
        ServerError: it cannot listen there.
    """

    def __init__(self, path: Path, answers: Mapping[str, Answer]) -> None:
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
        self._server.answers = answers
        self._acceptor = Acceptor(self._server, "control")

    def close(self) -> None:
        """Stops listening and removes the socket; questions that wait end with `NodeStopping`."""
        self._server.closing.set()
        self._acceptor.end()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = _ACCEPT_QUEUE
    answers: Mapping[str, Answer]

    def __init__(self, path: str, handler: type[_Handler]) -> None:
        self.closing = threading.Event()
        self._places = threading.BoundedSemaphore(MOST_QUESTIONS)
        super().__init__(path, handler)

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError:
            # Out of file descriptors: whoever comes stays at the door, and would be seen at once again.
            self.closing.wait(_FULL_PAUSE_S)
            raise

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        if self._places.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except BaseException:
                self._places.release()  # there is no thread that would
                raise
            return
        with contextlib.suppress(OSError):
            message = f"{MOST_QUESTIONS} questions are being answered already; ask again later"
            request.sendall(_error_line("Busy", message))
        self.shutdown_request(request)

    def process_request_thread(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        log_event(log, logging.ERROR, "ControlFailed", exc_info=True)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    def handle(self) -> None:
        # Whoever asked has gone, or does not read: nobody is left to tell.
        with contextlib.suppress(OSError):
            try:
                line = _read_line(self.request)
            except BadQuestion as error:
                self._send(_error_line(error.reason, error.message))
                return
            if line is None:
                return
            waiting = bytearray()
            for piece in self._answer(line):
                waiting += piece
                if len(waiting) >= _SEND_AT_ONCE:
                    self._send(waiting)
                    waiting.clear()
            self._send(waiting)

    def _answer(self, line: bytes) -> Iterator[bytes]:
        try:
            question = self._understand(line)
            answer = self.server.answers[question.name](question)
        except SplitlearnError as error:
            yield _error_line(error.reason, error.message)
        except Exception as error:
            log_event(log, logging.ERROR, "ControlFailed", exc_info=True)
            kind = type(error).__name__
            yield _error_line("InternalError", f"the node failed to answer ({kind}); see its log")
        else:
            yield from _pieces(answer)

    def _understand(self, line: bytes) -> Question:
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError):
            raise BadQuestion('expected a line of JSON, as in {"do": "status"}') from None
        if not isinstance(asked, dict) or not isinstance(name := asked.pop("do", None), str):
            raise BadQuestion('expected an object that names the question, as in {"do": "status"}')
        if name not in self.server.answers:
            known = ", ".join(sorted(self.server.answers))
            raise BadQuestion(f"unknown question {name!r}; this node answers {known}")
        return Question(name, asked, self._listens)

    def _listens(self) -> bool:
        if self.server.closing.is_set():
            raise NodeStopping(_STOPPING)
        try:
            self._send(b"\n")
        except OSError:
            return False
        return True

    def _send(self, data: bytes | bytearray) -> None:
        self.request.settimeout(_SEND_S)
        self.request.sendall(data)


def _read_line(connection: socket.socket) -> bytes | None:
    """The question; None if the asker left without one. Its deadline is that of the whole line."""
    end, line = monotonic() + _QUESTION_S, b""
    while not line.endswith(b"\n"):
        left_s = end - monotonic()
        if left_s <= 0:
            return None
        connection.settimeout(left_s)
        piece = connection.recv(LONGEST_QUESTION)
        if not piece:
            return line or None
        line += piece
        if len(line) > LONGEST_QUESTION:
            raise BadQuestion(f"expected a question of at most {LONGEST_QUESTION:,} bytes")
    return line


def _pieces(answer: Mapping[str, object] | bytes) -> Iterator[bytes]:
    """An answer as one line; a long list item by item, so that no other thread waits for long."""
    if isinstance(answer, bytes):
        yield answer + b"\n"
        return
    opening = "{"
    for key, value in answer.items():
        yield f"{opening}{json.dumps(key)}: ".encode()
        opening = ", "
        if isinstance(value, list):
            yield b"["
            for position, item in enumerate(value):
                yield (", " if position else "").encode() + json.dumps(item, default=str).encode()
            yield b"]"
        else:
            yield json.dumps(value, default=str).encode()
    yield b"}\n" if answer else b"{}\n"


def _error_line(reason: str, message: str) -> bytes:
    error = {"error": {"reason": reason, "message": message}}
    return json.dumps(error, ensure_ascii=False).encode() + b"\n"
