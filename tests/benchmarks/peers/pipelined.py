"""Unary gRPC calls that are begun at any time, many at once on one connection; `h2` has the sources.

begin ─► headers and message, as one piece of bytes, as soon as the connection's window lets them go
a thread reads ─► told of each call's status, as it ends
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

from peers.h2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    GO_AWAY,
    HEADERS,
    INITIAL_WINDOW,
    LARGEST_WINDOW,
    MOST_OF_A_FRAME,
    PING,
    PREFACE,
    RESET,
    SETTINGS,
    TABLE_SIZE,
    WINDOW,
    call_headers,
    frame,
    head,
)

_STATUS = b"grpc-status"
_AT_ONCE = 2**18

WITHOUT_STATUS = -1
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
        self._window, self._most = FIRST_WINDOW, 16_384
        self._changed = threading.Condition()
        self._ready = threading.Event()
        settings = struct.pack(">HIHI", TABLE_SIZE, 0, INITIAL_WINDOW, LARGEST_WINDOW)
        more = struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, more))
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(10), "the server sent no settings"

    def begin(self, number: int) -> None:
        """Send the call of that number, from 0 on."""
        stream, size = 2 * number + 1, len(self._message)
        with self._changed:
            assert self._changed.wait_for(lambda: self._window >= size, 60), "no window"
            self._window -= size
        parts = [frame(HEADERS, END_HEADERS, stream, self._headers)]
        for at in range(0, size, self._most):
            piece = self._message[at : at + self._most]
            ends = END_STREAM if at + self._most >= size else 0
            parts += (head(len(piece), DATA, ends, stream), piece)
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
                if kind == DATA:
                    # Of the answers only their ends count.
                    skip = max(0, end - len(read))
                elif end > len(read):
                    break
                else:
                    self._take(kind, flags, stream & LARGEST_WINDOW, read[at + 9 : end])
                at = min(end, len(read))
            read = read[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS and flags & END_STREAM:
            at = payload.index(_STATUS) + len(_STATUS)
            self._ended(stream // 2, int(payload[at + 1 : at + 1 + payload[at]]))
        elif kind == RESET:
            self._ended(stream // 2, WITHOUT_STATUS)
        elif kind == SETTINGS and not flags & ACK:
            for place in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, place)
                if name == MOST_OF_A_FRAME:
                    self._most = value
                elif name == INITIAL_WINDOW:
                    assert value >= len(self._message), "a call needs more than its first window"
            self._socket.sendall(frame(SETTINGS, ACK, 0, b""))
            self._ready.set()
        elif kind == PING and not flags & ACK:
            self._socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW and stream == 0:
            with self._changed:
                self._window += int.from_bytes(payload, "big")
                self._changed.notify()
        elif kind == GO_AWAY:
            raise ConnectionError(f"the server has left: {payload!r}")
