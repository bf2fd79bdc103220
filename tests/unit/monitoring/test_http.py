"""The monitoring server, asked over real connections on loopback."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitlearn_manager.errors import ServerError
from splitlearn_manager.monitoring import MetricsCollector, MonitoringServer
from splitlearn_manager.monitoring.connections import MAX_CONNECTIONS

DEADLINE_S = 20.0


@dataclass
class Node:
    """What the server asks, and may be told to answer otherwise."""

    metrics: MetricsCollector = field(default_factory=MetricsCollector)
    alive: bool = True
    ready: bool = True
    states: dict[str, dict[str, object]] = field(
        default_factory=lambda: {"a": {"model_id": "a", "phase": "Ready"}}
    )
    hold: threading.Event | None = None
    holding: threading.Event = field(default_factory=threading.Event)

    def healthz(self) -> tuple[bool, Mapping[str, object]]:
        return self.alive, {"status": "healthy" if self.alive else "unhealthy"}

    def readyz(self) -> tuple[bool, Mapping[str, object]]:
        return self.ready, {"ready": self.ready}

    def models(self) -> list[Mapping[str, object]]:
        if self.hold is not None:
            self.holding.set()
            self.hold.wait(DEADLINE_S)
        return list(self.states.values())

    def describe(self, model_id: str) -> Mapping[str, object] | None:
        return self.states.get(model_id)

    def node(self) -> Mapping[str, object]:
        return {"directory": "/desired"}

    def explain(self, model_id: str) -> Mapping[str, object] | None:
        return {"model_id": model_id, "summary": "is served"} if model_id in self.states else None

    def history(self, model_id: str) -> Mapping[str, object] | None:
        return {"model_id": model_id, "history": []} if model_id in self.states else None

    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[list[Mapping[str, object]], int]:
        happened: list[dict[str, Any]] = [
            {"serial": n, "model_id": "ab"[n % 2]} for n in range(1, 5)
        ]
        return [e for e in happened if e["serial"] > after and model_id in (None, e["model_id"])], 4

    def server(
        self, port: int = 0, *, host: str = "127.0.0.1", request_s: float = 10.0
    ) -> MonitoringServer:
        return MonitoringServer(
            host,
            port,
            metrics=self.metrics,
            healthz=self.healthz,
            readyz=self.readyz,
            states=self,
            request_s=request_s,
        )


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> object:
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        return json.loads(self.body)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def server(node: Node) -> Iterator[MonitoringServer]:
    server = node.server()
    server.start()
    yield server
    server.stop()


def ask(
    server: MonitoringServer, path: str, method: str = "GET", body: bytes | None = None
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    try:
        return ask_on(connection, path, method, body)
    finally:
        connection.close()


def ask_on(
    connection: http.client.HTTPConnection,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
) -> Reply:
    connection.request(method, path, body)
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, response.read())


def talk(server: MonitoringServer, sent: bytes) -> bytes:
    """All that comes back for these bytes until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


# What is where.


def test_metrics_are_scraped_in_prometheus_format(server: MonitoringServer, node: Node) -> None:
    node.metrics.record_load("a", "success")

    reply = ask(server, "/metrics")

    assert reply.status == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }
    assert samples["model_load_total"] == 1


@pytest.mark.parametrize(("alive", "status"), [(True, 200), (False, 503)])
def test_healthz_follows_the_loop(
    server: MonitoringServer, node: Node, alive: bool, status: int
) -> None:
    node.alive = alive

    reply = ask(server, "/healthz")

    assert (reply.status, reply.json()) == (
        status,
        {"status": "healthy" if alive else "unhealthy"},
    )


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_readyz_follows_the_first_convergence(
    server: MonitoringServer, node: Node, ready: bool, status: int
) -> None:
    node.ready = ready

    reply = ask(server, "/readyz")

    assert (reply.status, reply.json()) == (status, {"ready": ready})


@pytest.mark.parametrize("path", ["/api/v1/models", "/api/v1/models/", "/api/v1/models?x=1"])
def test_all_models_are_listed(server: MonitoringServer, path: str) -> None:
    assert ask(server, path).json() == {"models": [{"model_id": "a", "phase": "Ready"}]}


def test_one_model_is_shown(server: MonitoringServer, node: Node) -> None:
    node.states["my model"] = {"model_id": "my model"}

    assert ask(server, "/api/v1/models/a").json() == {"model_id": "a", "phase": "Ready"}
    assert ask(server, "/api/v1/models/my%20model").json() == {"model_id": "my model"}


def test_an_unknown_model_is_404_with_its_name(server: MonitoringServer) -> None:
    reply = ask(server, "/api/v1/models/nope")

    assert (reply.status, reply.json()) == (
        404,
        {"error": "no model is called 'nope'; /api/v1/models lists all"},
    )


def test_the_node_is_shown(server: MonitoringServer) -> None:
    assert ask(server, "/api/v1/node").json() == {"directory": "/desired"}


@pytest.mark.parametrize("view", ["explain", "history"])
def test_a_model_is_explained_and_its_versions_are_told(
    server: MonitoringServer, node: Node, view: str
) -> None:
    expected = node.explain("a") if view == "explain" else node.history("a")
    assert ask(server, f"/api/v1/models/a/{view}").json() == expected
    assert ask(server, f"/api/v1/models/nope/{view}").status == 404


@pytest.mark.parametrize(
    ("query", "serials"),
    [("", [1, 2, 3, 4]), ("?after=2", [3, 4]), ("?after=1&model_id=a", [2, 4]), ("?after=9", [])],
)
def test_events_after_a_serial_are_told_of_one_model_or_of_all(
    server: MonitoringServer, query: str, serials: list[int]
) -> None:
    told = ask(server, f"/api/v1/events{query}").json()
    assert isinstance(told, dict)
    assert ([event["serial"] for event in told["events"]], told["next"]) == (serials, 4)


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "%C2%B2"])
def test_a_serial_that_is_no_number_is_refused(server: MonitoringServer, after: str) -> None:
    reply = ask(server, f"/api/v1/events?after={after}")
    assert reply.status == 400
    assert "after: expected a number" in str(reply.json())


def test_a_serial_of_thousands_of_digits_is_one_that_was_never_given_out(
    server: MonitoringServer,
) -> None:
    reply = ask(server, f"/api/v1/events?after={'9' * 5000}")
    assert (reply.status, reply.json()) == (200, {"events": [], "next": 4})


def test_the_index_names_every_path(server: MonitoringServer) -> None:
    reply = ask(server, "/")

    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    api = (b"/api/v1/node", b"/api/v1/models", b"/api/v1/models/ID", b"/api/v1/events")
    for path in (b"/metrics", b"/healthz", b"/readyz", *api):
        assert path in reply.body


@pytest.mark.parametrize(
    "path",
    ["/nope", "/metrics/x", "/api", "/api/v1/modelsx", "/api/v1/models/a/b", "/../etc/passwd"],
)
def test_another_path_is_404(server: MonitoringServer, path: str) -> None:
    reply = ask(server, path)

    assert (reply.status, reply.json()) == (
        404,
        {"error": f"nothing is at {path}; / lists what there is"},
    )


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/v1/models", "/nope"])
def test_head_gives_the_headers_of_get_and_no_body(server: MonitoringServer, path: str) -> None:
    got, head = ask(server, path), ask(server, path, "HEAD")

    assert head.body == b""
    assert head.status == got.status
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("http://node:8000/api/v1/events?after=4", {"events": [], "next": 4}),
        ("HTTPS://[::1]/api/v1/node", {"directory": "/desired"}),
        ("http://node/nope", {"error": "nothing is at /nope; / lists what there is"}),
        ("http:/nope", {"error": "nothing is at http:/nope; / lists what there is"}),
    ],
)
def test_a_server_before_the_path_is_left_out(
    server: MonitoringServer, target: str, body: object
) -> None:
    assert ask(server, target).json() == body
    assert ask(server, "http://node:8000").headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
def test_other_methods_are_405(server: MonitoringServer, method: str) -> None:
    reply = ask(server, "/metrics", method, b"some body" if method != "BREW" else None)

    assert reply.status == 405
    assert reply.headers["allow"] == "GET, HEAD"
    assert reply.json() == {"error": f"{method} is not offered, only GET"}


# What goes wrong.


def test_a_source_that_raises_is_500_without_details(
    server: MonitoringServer, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    del node.states

    reply = ask(server, "/api/v1/models")

    assert (reply.status, reply.json()) == (
        500,
        {"error": "this failed; the server's log says how"},
    )
    assert "AttributeError" in caplog.text
    assert ask(server, "/healthz").status == 200


def test_values_that_json_does_not_know_are_shown_as_text(
    server: MonitoringServer, node: Node
) -> None:
    node.states["a"] = {"error": ServerError("gone")}

    assert ask(server, "/api/v1/models/a").json() == {"error": "gone"}


def test_requests_are_not_logged_above_debug(
    server: MonitoringServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "splitlearn_manager"):
        ask(server, "/metrics")
        ask(server, "/nope")

    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_a_busy_port_is_refused_with_its_number_and_key(server: MonitoringServer) -> None:
    with pytest.raises(ServerError) as caught:
        Node().server(server.port).start()

    assert caught.value.message == (
        f"metrics_port: port {server.port} on 127.0.0.1 is in use by another process; "
        "choose another metrics_port, or 0 for any free one"
    )
    assert caught.value.reason == "ServerFailed"


def test_a_port_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(
        ServerError, match=r"metrics_port: cannot listen on port 70000 of 127\.0\.0\.1"
    ):
        Node().server(70000).start()


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_named_as_such(host: str) -> None:
    """Seen to be blamed on metrics_port."""
    with pytest.raises(ServerError, match=f"host: expected a name or address .*, got '{host}'"):
        Node().server(0, host=host).start()


# Connections.


def test_a_connection_serves_many_requests(server: MonitoringServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    connection.connect()
    first = connection.sock
    try:
        for path in ("/metrics", "/nope", "/healthz"):
            ask_on(connection, path)
        ask_on(connection, "/healthz", body=b"a body that a GET has no use for")
        assert ask_on(connection, "/readyz").status == 200
        assert connection.sock is first
    finally:
        connection.close()


def test_a_client_of_http_1_0_gets_its_answer_and_an_end(server: MonitoringServer) -> None:
    reply = talk(server, b"GET /readyz HTTP/1.0\r\n\r\n")

    assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in reply
    assert reply.endswith(b'{"ready": true}\n')


def test_requests_sent_together_are_all_answered(server: MonitoringServer) -> None:
    reply = talk(
        server,
        b"GET /readyz HTTP/1.1\r\n\r\nHEAD / HTTP/1.1\r\n\r\n"
        b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    )

    assert reply.count(b"HTTP/1.1 200 OK\r\n") == 3


def test_a_hanging_source_blocks_nobody_else(server: MonitoringServer, node: Node) -> None:
    node.hold = threading.Event()
    replies: list[Reply] = []
    slow = threading.Thread(target=lambda: replies.append(ask(server, "/api/v1/models")))
    slow.start()
    try:
        assert node.holding.wait(DEADLINE_S)
        assert ask(server, "/metrics").status == 200
        assert replies == []
    finally:
        node.hold.set()
        slow.join()
    assert replies[0].status == 200


def test_silent_clients_block_nobody_however_many(node: Node) -> None:
    server = node.server(request_s=3600.0)
    server.start()
    silent = [
        socket.create_connection(("127.0.0.1", server.port), DEADLINE_S)
        for _ in range(MAX_CONNECTIONS + 10)
    ]
    try:
        silent[0].settimeout(DEADLINE_S)
        assert silent[0].recv(1) == b""
        assert ask(server, "/healthz").status == 200
    finally:
        for connection in silent:
            connection.close()
        server.stop()


def test_without_file_descriptors_whoever_comes_is_looked_for_after_pauses(
    server: MonitoringServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    accept, wait = socketserver.TCPServer.get_request, threading.Condition.wait

    def accepted(self: socketserver.TCPServer) -> tuple[Any, Any]:
        if happened.count("full") == 3:
            return accept(self)
        happened.append("full")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def waited(self: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "monitoring-http":
            happened.append("pause")
        return wait(self, timeout)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", accepted)
    monkeypatch.setattr(threading.Condition, "wait", waited)
    assert ask(server, "/healthz").status == 200
    assert happened[:6] == ["full", "pause"] * 3


def test_a_client_that_dribbles_is_cut_off_at_the_deadline(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    server = node.server(request_s=0.3)
    server.start()
    cut_off = threading.Event()
    try:
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as connection:

            def dribble() -> None:
                while not cut_off.wait(0.02):
                    try:
                        connection.sendall(b"G")
                    except OSError:
                        return

            sender = threading.Thread(target=dribble)
            sender.start()
            try:
                assert receive(connection) == b""
            finally:
                cut_off.set()
                sender.join()
    finally:
        server.stop()
    assert caplog.records == []


def receive(connection: socket.socket) -> bytes:
    """What comes next; nothing also when the connection was reset."""
    try:
        return connection.recv(1)
    except ConnectionError:
        return b""


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
    ids=["header", "path", "body", "body that is larger than Python reads"],
)
def test_a_large_request_is_refused_and_the_client_is_told(
    server: MonitoringServer, sent: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk

    assert received.startswith(b"HTTP/1.1 431 ")
    assert b"a request may have 16384 bytes" in received


def test_a_length_that_is_none_ends_the_connection_after_the_answer(
    server: MonitoringServer, caplog: pytest.LogCaptureFixture
) -> None:
    received = talk(server, b"GET /healthz HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


@pytest.mark.parametrize(
    "header",
    [b"Content-Length: 0\r\nContent-Length: 40\r\n", b"Content-Length : 40\r\n"],
    ids=["two lengths", "a length with a space in its name"],
)
def test_nothing_is_read_after_a_request_whose_end_is_doubtful(
    server: MonitoringServer, header: bytes
) -> None:
    hidden = b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n"
    received = talk(server, b"GET /healthz HTTP/1.1\r\n" + header + b"\r\n" + hidden)
    assert received.count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("sent", [b"garbage\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_is_refused_in_json(server: MonitoringServer, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = connection.recv(65536)

    assert received.split()[1] in (b"400", b"505")
    assert b"application/json" in received


# Start and stop.


def test_stopping_ends_connections_threads_and_the_port(node: Node) -> None:
    server = node.server()
    before = set(threading.enumerate())
    server.start()
    port = server.port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    ask_on(connection, "/healthz")

    server.stop()
    server.stop()

    assert connection.sock.recv(1) == b""
    connection.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    again = node.server(port)
    again.start()
    again.stop()


def test_a_server_is_started_once_at_a_time(server: MonitoringServer) -> None:
    with pytest.raises(RuntimeError, match="running already"):
        server.start()
    assert ask(server, "/healthz").status == 200


def test_an_ipv6_address_is_served(node: Node) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    server = node.server(host="::1")
    server.start()
    try:
        connection = http.client.HTTPConnection("::1", server.port, timeout=DEADLINE_S)
        assert ask_on(connection, "/readyz").status == 200
        connection.close()
    finally:
        server.stop()
