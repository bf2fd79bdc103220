"""Messages between the node and its workers: JSON with file descriptors, over a Unix socket.

A message is its length (4 bytes, little-endian) and a JSON object. Descriptors travel with its first byte.
JSON, because a worker runs code of a model's author: what it sends is read as data and can name nothing.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

MOST_DESCRIPTORS = 200
"""The kernel takes 253 at a time."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_LENGTH = struct.Struct("<I")
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

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def close(self) -> None:
        """A second call does nothing."""
        self._socket.close()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Raises Closed."""
        data = _ENCODER.encode(message).encode()
        packet = _LENGTH.pack(len(data)) + data
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
        descriptors: list[int] = []
        try:
            self._wait_at_most(timeout_s)
            while (message := self._whole()) is None:
                self._read += self._some(descriptors)
        except TimeoutError:
            _close(descriptors)
            raise
        except (OSError, ValueError, Closed) as error:
            _close(descriptors)
            raise Closed from error
        return message, descriptors

    def _wait_at_most(self, timeout_s: float | None) -> None:
        # Another time-out costs a call of the system, which most messages need not make.
        if timeout_s != self._waits_s:
            self._socket.settimeout(timeout_s)
            self._waits_s = timeout_s

    def _some(self, descriptors: list[int]) -> bytes:
        size = array.array("i").itemsize
        space = socket.CMSG_LEN(MOST_DESCRIPTORS * size)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        data, ancillary, _, _ = self._socket.recvmsg(_AT_ONCE, space, flags)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(payload[: len(payload) // size * size])
                descriptors += found
        if not data:
            raise Closed
        return data

    def _whole(self) -> Message | None:
        if len(self._read) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._read)
        if length > _MOST_BYTES:
            raise ValueError("a message of no sensible length")
        end = _LENGTH.size + length
        if len(self._read) < end:
            return None
        message = json.loads(bytes(self._read[_LENGTH.size : end]))
        del self._read[:end]
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message


def pair() -> tuple[Channel, socket.socket]:
    """A channel for this process, and the other end for another."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(mine), other


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
