"""Unary gRPC calls that are begun at any time, many at once on one connection; `h2` has the sources.

begin ─► headers and message, as one piece of bytes, as soon as the connection's window lets them go
a thread reads ─► told of each call's status, as it ends
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

from peers.h2 import call_headers, frame, head

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_TABLE_SIZE, _INITIAL_WINDOW, _MOST_OF_A_FRAME = 1, 4, 5
_FIRST_WINDOW = 65_535
_LARGEST_WINDOW = 2**31 - 1
_STATUS = b"grpc-status"
_AT_ONCE = 2**18

RESET = -1
"""The status of a call that ended without one."""


class Pipelined:
    """See the module's text.

    Args:
        ended: told the number of a call and its status, by the thread that reads.
    """

    def __init__(
        self, address: str, path: str, message: bytes, ended: Callable[[int, int], None]
    ) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = call_headers(path, address.encode(), timeout=b"10S")
        self._message = struct.pack(">BI", 0, len(message)) + message
        self._ended = ended
        self._window, self._most = _FIRST_WINDOW, 16_384
        self._changed = threading.Condition()
        self._ready = threading.Event()
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, _LARGEST_WINDOW)
        more = struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW)
        self._socket.sendall(
            _PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW, 0, 0, more)
        )
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(10), "the server sent no settings"

    def begin(self, number: int) -> None:
        """Send the call of that number, from 0 on."""
        stream, size = 2 * number + 1, len(self._message)
        with self._changed:
            assert self._changed.wait_for(lambda: self._window >= size, 60), "no window"
            self._window -= size
        parts = [frame(_HEADERS, _END_HEADERS, stream, self._headers)]
        for at in range(0, size, self._most):
            piece = self._message[at : at + self._most]
            ends = _END_STREAM if at + self._most >= size else 0
            parts += (head(len(piece), _DATA, ends, stream), piece)
        self._socket.sendall(b"".join(parts))

    def _read(self) -> None:
        read = b""
        skip = 0
        while part := self._socket.recv(_AT_ONCE):
            if skip >= len(part):
                skip -= len(part)
                continue
            read, at = read + part[skip:], 0
            skip = 0
            while len(read) - at >= 9:
                size = int.from_bytes(read[at : at + 3], "big")
                kind, flags, stream = struct.unpack_from(">BBI", read, at + 3)
                end = at + 9 + size
                if kind == _DATA:
                    # Of the answers only their ends count.
                    skip = max(0, end - len(read))
                elif end > len(read):
                    break
                else:
                    self._take(kind, flags, stream & _LARGEST_WINDOW, read[at + 9 : end])
                at = min(end, len(read))
            read = read[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            at = payload.index(_STATUS) + len(_STATUS)
            self._ended(stream // 2, int(payload[at + 1 : at + 1 + payload[at]]))
        elif kind == _RESET:
            self._ended(stream // 2, RESET)
        elif kind == _SETTINGS and not flags & _ACK:
            for place in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, place)
                if name == _MOST_OF_A_FRAME:
                    self._most = value
                elif name == _INITIAL_WINDOW:
                    assert value >= len(self._message), "a call needs more than its first window"
            self._socket.sendall(frame(_SETTINGS, _ACK, 0, b""))
            self._ready.set()
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW and stream == 0:
            with self._changed:
                self._window += int.from_bytes(payload, "big")
                self._changed.notify()
        elif kind == _GO_AWAY:
            raise ConnectionError(f"the server has left: {payload!r}")
