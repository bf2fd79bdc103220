"""Connections that cannot take the server down: bounded in number, in bytes, and in time.

A client that sends nothing, or a byte now and then, holds a thread until its request's deadline. If
more clients come than there are threads to give, the oldest connection is cut to let the newest in:
those that are honest are done within milliseconds, so the oldest is idle or hangs.

Knows nothing of paths and answers; those are in `http`.
"""

from __future__ import annotations

import io
import logging
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 16 * 1024

# How long, and for how much, a refused client may go on sending before the connection is cut.
_LINGER_S = 1.0
_LINGER_BYTES = 2**20
_STOP_WAIT_S = 5.0
_FULL_PAUSE_S = 0.1


class TooLarge(Exception):
    """The request is larger than is read."""


class Incoming(io.RawIOBase):
    """What a client sends, up to a size and a moment, both set anew for each request.

    A time-out of the socket alone would start again with every byte of a client that dribbles.
    """

    def __init__(self, connection: socket.socket, request_s: float) -> None:
        self._connection = connection
        self._request_s = request_s
        self.begin()

    def begin(self) -> None:
        self._deadline_s = time.monotonic() + self._request_s
        self._left = MAX_REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._left <= 0:
            raise TooLarge
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left_s)
        received = self._connection.recv_into(buffer)
        self._left -= received
        return received


def linger(connection: socket.socket) -> None:
    """Lets a client that is still sending read why it was refused, before the connection ends.

    Closing with unread input would reset the connection, and the answer with it.
    """
    connection.shutdown(socket.SHUT_WR)
    deadline_s, taken = time.monotonic() + _LINGER_S, 0
    while (left_s := deadline_s - time.monotonic()) > 0 and taken < _LINGER_BYTES:
        connection.settimeout(left_s)
        received = len(connection.recv(65536))
        if not received:
            return
        taken += received


class BoundedServer(ThreadingHTTPServer):
    """Accepts connections, keeps count of them, and can end them all."""

    daemon_threads = True
    block_on_close = False  # `end_connections` waits, and not for ever
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self._changed = threading.Condition()
        self._open: dict[socket.socket, None] = {}
        self._threads_running = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for the host's full name: that may take long.
        socketserver.TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError:
            # Out of file descriptors: whoever comes stays at the door, and would be seen at once again.
            with self._changed:
                self._changed.wait(_FULL_PAUSE_S)
            raise

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        assert isinstance(request, socket.socket)
        with self._changed:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                _cut(oldest)
            self._open[request] = None
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        with self._changed:
            self._threads_running += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._threads_running -= 1
                self._changed.notify_all()

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket)
        with self._changed:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        if isinstance(sys.exception(), OSError):
            logger.debug("client=%s the connection ended early", client_address, exc_info=True)
        else:
            logger.exception("client=%s a connection failed", client_address)

    def end_connections(self) -> None:
        """Cuts every connection and waits until their threads have ended."""
        with self._changed:
            for connection in self._open:
                _cut(connection)
            self._changed.wait_for(
                lambda: not self._open and not self._threads_running, _STOP_WAIT_S
            )


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("a connection had ended already: %s", error)
