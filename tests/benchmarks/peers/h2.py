"""gRPC over a socket, with as little of HTTP/2 as its servers need: one call at a time on a connection.

gRPC's client for Python takes several times as long for a request as a socket does, and would be measured
with each server that speaks gRPC. Sources: RFC 9113 (frames, flow control), RFC 7541 (headers), and gRPC's
"gRPC over HTTP2".
"""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
TABLE_SIZE, INITIAL_WINDOW, MOST_OF_A_FRAME = 1, 4, 5
FIRST_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
_GIVE_BACK_AT = 2**30
_LARGEST_FRAME = 2**20
_OK = b"grpc-status\x010"
"""As the server writes it that may not refer to earlier headers."""


class Refused(Exception):
    """A call that was not answered."""


class Connection:
    """See the module's text."""

    def __init__(self, address: str, timeout_s: float) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._authority = address.encode()
        self._stream = -1
        self._initial = self._connection_window = FIRST_WINDOW
        self._stream_window = 0
        self._most = 16_384
        self._read, self._at = b"", 0
        self._received = self._received_of_stream = 0
        self._chunks: list[bytes] = []
        self._have = 0
        self._trailers: bytes | None = None
        settings = struct.pack(
            ">HIHIHI",
            *(TABLE_SIZE, 0),
            *(INITIAL_WINDOW, LARGEST_WINDOW),
            *(MOST_OF_A_FRAME, _LARGEST_FRAME),
        )
        window = struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)
        self._out = PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, window)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def call(self, path: str, message: bytes) -> bytes:
        """A unary call. Raises Refused."""
        self.ask(path, message)
        return self.answer()

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def ask(self, path: str, message: bytes) -> None:
        """Begin a unary call; `answer` ends it."""
        self.begin(path)
        self.send(message, last=True)

    def answer(self) -> bytes:
        """Wait for the answer to a unary call. Raises Refused."""
        answer = self.receive()
        while self._trailers is None:
            self._take_frame()
        self._check_status()
        return answer

    def begin(self, path: str) -> None:
        """The headers of a call; they travel with its first message."""
        self._stream += 2
        self._stream_window = self._initial
        self._chunks, self._have, self._trailers = [], 0, None
        self._received_of_stream = 0
        headers = call_headers(path, self._authority)
        self._out += frame(HEADERS, END_HEADERS, self._stream, headers)

    def send(self, message: bytes, *, last: bool) -> None:
        """A message of the call that has begun."""
        data = memoryview(struct.pack(">BI", 0, len(message)) + message)
        parts = [self._out]
        self._out = b""
        while data:
            size = min(len(data), self._most, self._stream_window, self._connection_window)
            if size <= 0:
                self._socket.sendall(b"".join(parts))
                parts = []
                self._take_frame()
                continue
            ends = END_STREAM if last and size == len(data) else 0
            parts += (head(size, DATA, ends, self._stream), data[:size])
            data = data[size:]
            self._stream_window -= size
            self._connection_window -= size
        self._socket.sendall(b"".join(parts))

    def receive(self) -> bytes:
        """The next message of the answer. Raises Refused if there is none."""
        while True:
            if self._have >= 5:
                if len(self._chunks[0]) < 5:
                    self._chunks = [b"".join(self._chunks)]
                end = 5 + int.from_bytes(self._chunks[0][1:5], "big")
                if self._have >= end:
                    whole = b"".join(self._chunks)
                    self._chunks = [whole[end:]] if len(whole) > end else []
                    self._have -= end
                    return whole[5:end]
            if self._trailers is not None:
                self._check_status()
                raise Refused("the call ended without a message")
            self._take_frame()

    def _check_status(self) -> None:
        if self._trailers is not None and _OK not in self._trailers:
            _, _, message = self._trailers.partition(b"grpc-message")
            # Behind a byte with its length; other headers may follow.
            said = message[1 : 1 + message[0]] if message else self._trailers
            raise Refused(said.decode("latin-1"))

    def _take_frame(self) -> None:
        kind, flags, stream, payload = self._next_frame()
        if kind == DATA and stream == self._stream:
            if payload:
                self._chunks.append(payload)
            self._have += len(payload)
            self._received += len(payload)
            self._received_of_stream += len(payload)
            if self._received > _GIVE_BACK_AT:
                self._give_back()
            if flags & END_STREAM:
                self._trailers = b""
        elif kind == HEADERS and stream == self._stream:
            if flags & END_STREAM:
                self._trailers = payload
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                self._set(*struct.unpack_from(">HI", payload, at))
            self._socket.sendall(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW:
            (more,) = struct.unpack(">I", payload)
            if stream == 0:
                self._connection_window += more
            elif stream == self._stream:
                self._stream_window += more
        elif kind in (RESET, GO_AWAY):
            raise Refused(f"the server has ended the call: {payload!r}")

    def _set(self, name: int, value: int) -> None:
        if name == INITIAL_WINDOW:
            self._stream_window += value - self._initial
            self._initial = value
        elif name == MOST_OF_A_FRAME:
            self._most = value

    def _give_back(self) -> None:
        sizes = {0: self._received, self._stream: self._received_of_stream}
        self._received = self._received_of_stream = 0
        frames = [frame(WINDOW, 0, of, struct.pack(">I", size)) for of, size in sizes.items()]
        self._socket.sendall(b"".join(frames))

    def _next_frame(self) -> tuple[int, int, int, bytes]:
        self._fill(9)
        size = int.from_bytes(self._read[self._at : self._at + 3], "big")
        kind, flags, stream = struct.unpack_from(">BBI", self._read, self._at + 3)
        self._fill(9 + size)
        begin = self._at + 9
        self._at = begin + size
        return kind, flags, stream & LARGEST_WINDOW, self._read[begin : self._at]

    def _fill(self, size: int) -> None:
        have = len(self._read) - self._at
        if have >= size:
            return
        parts = [self._read[self._at :]]
        while have < size:
            parts.append(self._socket.recv(1 << 18))
            have += len(parts[-1])
            if not parts[-1]:
                raise Refused("the server has closed the connection")
        self._read, self._at = b"".join(parts), 0


def call_headers(path: str, authority: bytes, timeout: bytes = b"60S") -> bytes:
    """Of a call, without a table of earlier ones."""
    return b"".join(
        (
            b"\x83\x86",  # POST, http
            b"\x04" + text(path.encode()),
            b"\x01" + text(authority),
            b"\x00" + text(b"te") + text(b"trailers"),
            b"\x00" + text(b"content-type") + text(b"application/grpc"),
            b"\x00" + text(b"grpc-timeout") + text(timeout),
        )
    )


def head(size: int, kind: int, flags: int, stream: int) -> bytes:
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return head(len(payload), kind, flags, stream) + payload


def text(said: bytes) -> bytes:
    """A header's name or value, of less than 127 bytes."""
    assert len(said) < 127, said
    return bytes([len(said)]) + said
