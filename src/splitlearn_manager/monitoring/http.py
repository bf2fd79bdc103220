"""Metrics, health and model states over plain HTTP, for Prometheus, load balancers and people.

    /                        what there is here, as plain text
    /metrics                 Prometheus' text format
    /healthz                 200 while the process and its loop are alive, else 503; JSON
    /readyz                  200 once the first convergence is done, else 503; JSON
    /api/v1/node             the node itself
    /api/v1/models           {"models": [...]}
    /api/v1/models/ID        one model, or 404; with /explain why it is where it is, with /history its
                             versions
    /api/v1/events           {"events": [...], "next": N}; ?after=N for those after it, ?model_id=ID

It only reads: GET and HEAD, nothing else. Each connection has a thread of its own, a request must
be small and arrive whole within a deadline, and of too many connections the oldest is closed
(`connections`); so whoever hangs, dribbles or floods blocks nobody else. A source that raises gives
500 without its details, which go to the log. Nothing is logged per request above DEBUG.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Protocol
from urllib.parse import parse_qs, unquote

from splitlearn_manager.errors import ServerError
from splitlearn_manager.monitoring.accepting import Acceptor
from splitlearn_manager.monitoring.connections import (
    MAX_REQUEST_BYTES,
    BoundedServer,
    Incoming,
    TooLarge,
    linger,
)

logger = logging.getLogger(__name__)

_JSON = "application/json; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_API = "/api/v1"
_MODELS = f"{_API}/models"
_INDEX = """splitlearn-manager

/metrics            Prometheus metrics
/healthz            200 while the process and its loop are alive
/readyz             200 once the first convergence is done
/api/v1/node        the node: its directory, what is wrong there, how changes are noticed
/api/v1/models      all models
/api/v1/models/ID   one model; /explain why it is where it is; /history its versions
/api/v1/events      what happened lately; ?after=N what happened since, ?model_id=ID to one model
"""

_SERVER = re.compile("https?://[^/?]*", re.IGNORECASE)
_WRITE_S = 10.0
_DIGITS = 20
"""So many digits are read of a number: with as many it is larger than any that means something."""


class Rendering(Protocol):
    """What renders the metrics: a body and its content type."""

    def render(self) -> tuple[bytes, str]: ...


class States(Protocol):
    """What is told below /api/v1, as data for JSON. All may be called by several threads at a time."""

    def node(self) -> Mapping[str, object]: ...

    def models(self) -> Sequence[Mapping[str, object]]: ...

    def describe(self, model_id: str) -> Mapping[str, object] | None: ...

    def explain(self, model_id: str) -> Mapping[str, object] | None: ...

    def history(self, model_id: str) -> Mapping[str, object] | None: ...

    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[Sequence[Mapping[str, object]], int]: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """What is asked for each path. All may be called by several threads at a time."""

    metrics: Rendering
    healthz: Callable[[], tuple[bool, Mapping[str, object]]]
    readyz: Callable[[], tuple[bool, Mapping[str, object]]]
    states: States


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, content type and body of a response."""

    status: HTTPStatus
    content_type: str
    body: bytes


def answer(path: str, query: str, sources: Sources) -> Answer:
    """What a GET of this path, with this query, gives. Raises whatever the source raises."""
    if path == "/":
        return Answer(HTTPStatus.OK, _TEXT, _INDEX.encode())
    if path == "/metrics":
        body, content_type = sources.metrics.render()
        return Answer(HTTPStatus.OK, content_type, body)
    if path == "/healthz":
        return _judged(sources.healthz())
    if path == "/readyz":
        return _judged(sources.readyz())
    if path == f"{_API}/node":
        return _json(HTTPStatus.OK, sources.states.node())
    if path == f"{_API}/events":
        return _events(query, sources.states)
    if path in (_MODELS, _MODELS + "/"):
        return _json(HTTPStatus.OK, {"models": list(sources.states.models())})
    if path.startswith(_MODELS + "/"):
        return _of_model(path, sources.states)
    return _nothing_at(path)


def _of_model(path: str, states: States) -> Answer:
    name, _, view = path.removeprefix(_MODELS + "/").partition("/")
    views = {"": states.describe, "explain": states.explain, "history": states.history}
    if view not in views:
        return _nothing_at(path)
    found = views[view](unquote(name))
    if found is None:
        message = f"no model is called {unquote(name)!r}; {_MODELS} lists all"
        return _error(HTTPStatus.NOT_FOUND, message)
    return _json(HTTPStatus.OK, found)


def _events(query: str, states: States) -> Answer:
    asked = parse_qs(query)
    asked_for = asked.get("after", ["0"])[-1]
    after = _whole_number(asked_for)
    if after is None:
        return _error(HTTPStatus.BAD_REQUEST, f"after: expected a number, got {asked_for!r}")
    events, last = states.events(after, asked.get("model_id", [None])[-1])
    return _json(HTTPStatus.OK, {"events": list(events), "next": last})


def _path_and_query(target: str) -> tuple[str, str]:
    """What a request line asks for; with a server before it, as proxies are asked (RFC 9112, 3.2.2)."""
    target = target.partition("#")[0]
    server = _SERVER.match(target)
    if server is not None:
        target = "/" + target[server.end() :].removeprefix("/")
    path, _, query = target.partition("?")
    return path, query


def _whole_number(text: str) -> int | None:
    """A number that a client wrote; None if it is none.

    Python refuses to read thousands of digits, and takes others for digits that it cannot read.
    """
    if not (text.isascii() and text.isdigit()):
        return None
    return int(text.lstrip("0")[:_DIGITS] or "0")


def _nothing_at(path: str) -> Answer:
    return _error(HTTPStatus.NOT_FOUND, f"nothing is at {path}; / lists what there is")


def _judged(judgement: tuple[bool, Mapping[str, object]]) -> Answer:
    ok, details = judgement
    return _json(HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE, details)


def _error(status: HTTPStatus, message: str) -> Answer:
    return _json(status, {"error": message})


def _json(status: HTTPStatus, value: Mapping[str, object]) -> Answer:
    # Enumerations, paths and the like that a source may hold are shown as their text.
    return Answer(status, _JSON, json.dumps(value, default=str).encode() + b"\n")


class _Handler(BaseHTTPRequestHandler):
    """One connection: requests one after another until the client or a deadline ends it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._incoming = Incoming(self.connection, self.server.request_s)
        self.rfile = io.BufferedReader(self._incoming)
        # A response is put together here and sent in one piece, by `_send`.
        self.wfile = self._response = io.BytesIO()

    def handle_one_request(self) -> None:
        self._incoming.begin()
        try:
            super().handle_one_request()
        except TooLarge:
            self.request_version = self.protocol_version
            self.requestline = self.command = ""  # it may not have been read so far
            self.close_connection = True
            self._send(
                _error(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"a request may have {MAX_REQUEST_BYTES} bytes",
                )
            )
            linger(self.connection)

    def do_GET(self) -> None:
        self._discard_body()
        path, query = _path_and_query(self.path)
        try:
            found = answer(path, query, self.server.sources)
        except Exception:
            logger.exception("path=%r its source failed", path)
            found = _error(
                HTTPStatus.INTERNAL_SERVER_ERROR, "this failed; the server's log says how"
            )
        self._send(found)

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the base class for what it cannot read, and for methods that are not here."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._discard_body()
            self._send(
                _error(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not offered, only GET")
            )
            return
        self.request_version = self.protocol_version  # else garbage gets no status line
        status = HTTPStatus(code)
        self._send(_error(status, message or status.phrase))
        linger(self.connection)

    def handle_expect_100(self) -> bool:
        return True  # no body is wanted, so none is asked for

    def version_string(self) -> str:
        return "splitlearn-manager"

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("client=%s %r", self.client_address[0], format % args)

    def _discard_body(self) -> None:
        """Reads a body that came with the request, so that the next request is found after it."""
        lengths = self.headers.get_all("Content-Length", ["0"])
        length = _whole_number(lengths[0])
        if "Expect" in self.headers or "Transfer-Encoding" in self.headers or length is None:
            self.close_connection = True
        elif len(lengths) > 1 or self.headers.defects:
            # Where its body ends may be read otherwise by whoever stands between: nothing is read after it.
            self.close_connection = True
        elif length > MAX_REQUEST_BYTES:
            raise TooLarge
        else:
            self.rfile.read(length)

    def _send(self, found: Answer) -> None:
        self.send_response(found.status)
        self.send_header("Content-Type", found.content_type)
        self.send_header("Content-Length", str(len(found.body)))
        self.send_header("Cache-Control", "no-store")
        if found.status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.body)
        response = self._response.getvalue()
        self.wfile = self._response = io.BytesIO()
        self.connection.settimeout(_WRITE_S)
        self.connection.sendall(response)


class _Server(BoundedServer):
    """The server of these handlers: it carries what they ask."""

    def __init__(self, host: str, port: int, sources: Sources, request_s: float) -> None:
        self.sources = sources
        self.request_s = request_s
        super().__init__(host, port, _Handler)


class MonitoringServer:
    """Serves metrics, health and model states over HTTP, from `start` until `stop`.

    Args:
        host, port: where to listen; port 0 for any free one. An IPv6 address is fine.
        metrics: renders `/metrics`.
        healthz, readyz: whether it is so, and details that fit JSON.
        states: what is told of the node and of its models.
        request_s: seconds a client has to send a request, and may be silent between two.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        metrics: Rendering,
        healthz: Callable[[], tuple[bool, Mapping[str, object]]],
        readyz: Callable[[], tuple[bool, Mapping[str, object]]],
        states: States,
        request_s: float = 10.0,
    ) -> None:
        self._host = host
        self._port = port
        self._sources = Sources(metrics, healthz, readyz, states)
        self._request_s = request_s
        self._server: _Server | None = None
        self._acceptor: Acceptor | None = None

    @property
    def port(self) -> int:
        """The port that is listened on; before `start`, the one that was asked for."""
        return self._server.server_port if self._server else self._port

    def start(self) -> None:
        """Listens. Raises ServerError, naming `metrics_port`, if it cannot; RuntimeError if it does."""
        if self._server is not None:
            raise RuntimeError("the monitoring server is running already")
        try:
            self._server = _Server(self._host, self._port, self._sources, self._request_s)
        except (OSError, OverflowError) as error:
            raise ServerError(_cannot_listen(self._host, self._port, error)) from error
        self._acceptor = Acceptor(self._server, "monitoring-http")

    def stop(self) -> None:
        """Ends every connection and frees the port; without effect if it is not running."""
        server, acceptor = self._server, self._acceptor
        self._server = self._acceptor = None
        if server is None or acceptor is None:
            return
        acceptor.end()
        server.server_close()
        server.end_connections()


def _cannot_listen(host: str, port: int, error: OSError | OverflowError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return (
            f"metrics_port: port {port} on {host} is in use by another process; "
            "choose another metrics_port, or 0 for any free one"
        )
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, socket.gaierror) or getattr(error, "errno", 0) == errno.EADDRNOTAVAIL:
        return f"host: expected a name or address of this machine, got {host!r}: {why}"
    return f"metrics_port: cannot listen on port {port} of {host}: {why}"
