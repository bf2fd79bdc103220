"""A caller that speaks HTTP/2 by the library `h2`, which is nobody's of those who are tested."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict

import h2.config
import h2.connection
import h2.events

PATIENCE_S = 20.0
CALL = (
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def message(data: bytes, compressed: int = 0) -> bytes:
    """As it travels in a call."""
    return struct.pack(">BI", compressed, len(data)) + data


class Caller:
    """A connection, and what has arrived on it.

    Attributes:
        data, headers, trailers, resets: by the number of the call.
        gone_away: the code with which the server has left; None while it has not.
        closed: whether the connection has ended.
    """

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        config = h2.config.H2Configuration(header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.data: dict[int, bytes] = defaultdict(bytes)
        self.headers: dict[int, dict[str, str]] = {}
        self.trailers: dict[int, dict[str, str]] = {}
        self.resets: dict[int, int] = {}
        self.ended: set[int] = set()
        self.pongs: list[bytes] = []
        self.gone_away: int | None = None
        self.closed = False
        self.reads = True
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def flush(self, piece: int | None = None) -> None:
        """Send what is to be sent; with `piece`, so many bytes at a time."""
        data = self.h2.data_to_send()
        size = piece or max(1, len(data))
        for at in range(0, len(data), size):
            self.socket.sendall(data[at : at + size])

    def begin(self, path: str, *more: tuple[str, str], ends: bool = False) -> int:
        """Send the headers of a call; its number."""
        number = self.h2.get_next_available_stream_id()
        headers = [*CALL, (":path", path), *more]
        headers.sort(key=lambda field: not field[0].startswith(":"))
        self.h2.send_headers(number, headers, end_stream=ends)
        self.flush()
        return number

    def send(self, number: int, data: bytes, *, ends: bool = True, pad: int | None = None) -> None:
        """Send data of a call, as far as the server takes it, then the rest as it takes more."""
        while True:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            part = data[: max(0, room - (0 if pad is None else pad + 1))]
            if part or not data:
                data = data[len(part) :]
                self.h2.send_data(number, part, end_stream=ends and not data, pad_length=pad)
                self.flush()
            if not data:
                return
            if not part:
                self.read()

    def call(self, path: str, data: bytes, *more: tuple[str, str]) -> bytes:
        """A call with one message each way; the answer's data."""
        number = self.begin(path, *more)
        self.send(number, message(data))
        self.wait_for_end(number)
        return self.data[number]

    def wait_for_end(self, number: int) -> dict[str, str]:
        """Wait until a call has ended; its trailers."""
        while number not in self.ended and not self.closed:
            self.read()
        return self.trailers.get(number, {})

    def wait_until_closed(self) -> None:
        while not self.closed:
            self.read()

    def raw(self, data: bytes) -> None:
        """Send bytes that `h2` knows nothing of."""
        self.socket.sendall(data)

    def read(self) -> None:
        """Take what has arrived; waits until something has."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.h2.receive_data(data):
            self._take(event)
        if not self.closed:
            self.flush()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived):
            self.data[event.stream_id] += event.data
            if self.reads:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.ResponseReceived):
            self.headers[event.stream_id] = dict(event.headers)
            # An answer without a message says all in its first headers.
            self.trailers.setdefault(event.stream_id, dict(event.headers))
        elif isinstance(event, h2.events.TrailersReceived):
            self.trailers[event.stream_id] = dict(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.resets[event.stream_id] = event.error_code
            self.ended.add(event.stream_id)
        elif isinstance(event, h2.events.PingAckReceived):
            self.pongs.append(event.ping_data)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.gone_away = event.error_code
