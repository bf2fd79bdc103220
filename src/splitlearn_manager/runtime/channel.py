"""Messages between the node and its workers: JSON with file descriptors, over a Unix socket.

A message is its length, the number of descriptors that it brings (4 and 2 bytes, little-endian), and a JSON
object. Descriptors travel with its first byte; what the kernel gives at once may be several messages and the
descriptors of a later one.
JSON, because a worker runs code of a model's author: what it sends is read as data and can name nothing.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

MOST_DESCRIPTORS = 200
"""The kernel takes 253 at a time."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_HEAD = struct.Struct("<IH")
_MOST_BYTES = 64 * 2**20
_AT_ONCE = 64 * 2**10


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end. Each direction is for one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._waits_s: float | None = None
        end.settimeout(None)
        self._read = bytearray()
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    @property
    def has_message(self) -> bool:
        """Whether a whole message has been read already: no selector tells of it."""
        return self._whole_bytes() is not None

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()
        self._drop_descriptors()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Raises Closed."""
        data = _ENCODER.encode(message).encode()
        packet = _HEAD.pack(len(data), len(descriptors)) + data
        try:
            self._wait_at_most(None)
            sent = 0
            if descriptors:
                sent = socket.send_fds(self._socket, [packet], list(descriptors))
            if sent < len(packet):
                self._socket.sendall(packet[sent:])
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float | None = None) -> tuple[Message, list[int]]:
        """The next message and the descriptors that came with it, which are the caller's to close.

        Raises:
            Closed: no whole message comes any more.
            TimeoutError: none came in time; what has come of it is kept.
        """
        try:
            self._wait_at_most(timeout_s)
            while (end := self._whole_bytes()) is None:
                self._read += self._some()
            return self._message(end)
        except TimeoutError:
            raise
        except (OSError, ValueError, Closed) as error:
            self._drop_descriptors()
            raise Closed from error

    def _wait_at_most(self, timeout_s: float | None) -> None:
        # Another time-out costs a call of the system, which most messages need not make.
        if timeout_s != self._waits_s:
            self._socket.settimeout(timeout_s)
            self._waits_s = timeout_s

    def _some(self) -> bytes:
        size = array.array("i").itemsize
        space = socket.CMSG_LEN(MOST_DESCRIPTORS * size)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        data, ancillary, _, _ = self._socket.recvmsg(_AT_ONCE, space, flags)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(payload[: len(payload) // size * size])
                self._descriptors.extend(found)
        if not data:
            raise Closed
        return data

    def _whole_bytes(self) -> int | None:
        """How many bytes the next message takes; None if they have not all been read."""
        if len(self._read) < _HEAD.size:
            return None
        length, _ = _HEAD.unpack_from(self._read)
        if length > _MOST_BYTES:
            raise ValueError("a message of no sensible length")
        end: int = _HEAD.size + length
        return end if len(self._read) >= end else None

    def _message(self, end: int) -> tuple[Message, list[int]]:
        _, count = _HEAD.unpack_from(self._read)
        if count > len(self._descriptors):
            raise ValueError("a message without its descriptors")
        message = json.loads(bytes(self._read[_HEAD.size : end]))
        del self._read[:end]
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message, [self._descriptors.popleft() for _ in range(count)]

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())


def pair() -> tuple[Channel, socket.socket]:
    """A channel for this process, and the other end for another."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(mine), other
