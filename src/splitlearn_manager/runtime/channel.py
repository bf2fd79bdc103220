"""Messages between the node and its workers: JSON with file descriptors, over a Unix socket.

A message is its length, the number of descriptors that it brings (4 and 2 bytes, little-endian), and a JSON
object, or bytes that do not begin as one (`runtime.forward_message`). Descriptors travel with its first byte;
what the kernel gives at once may be several messages and the descriptors of a later one.
JSON, because a worker runs code of a model's author: what it sends is read as data and can name nothing.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

MOST_DESCRIPTORS = 200
"""The kernel takes 253 at a time."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_HEAD = struct.Struct("<IH")
_MOST_BYTES = 64 * 2**20
_AT_ONCE = 16 * 2**10
_OBJECT = b"{"
_SPACE = socket.CMSG_LEN(MOST_DESCRIPTORS * array.array("i").itemsize)
_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_AT_ONCE_FLAGS = _FLAGS | socket.MSG_DONTWAIT


class Closed(Exception):
    """The other end is gone."""


class DescriptorsLost(Closed):
    """This process has no descriptors left for those that came with a message; the other end lives."""


class Channel:
    """One end. Each direction is for one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.settimeout(None)
        self._readable: select.poll | None = None
        self._buffer = memoryview(bytearray(_AT_ONCE))
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

    def hang_up(self) -> None:
        """Nothing more is sent or received; a thread that waits for a message is told so."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: Message | bytes, descriptors: Sequence[int] = ()) -> None:
        """Bytes must not begin as a JSON object. Raises Closed."""
        data = message if isinstance(message, bytes) else _ENCODER.encode(message).encode()
        packet = _HEAD.pack(len(data), len(descriptors)) + data
        try:
            sent = 0
            if descriptors:
                sent = socket.send_fds(self._socket, [packet], list(descriptors))
            if sent < len(packet):
                self._socket.sendall(packet[sent:] if sent else packet)
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float | None = None) -> tuple[Message, list[int]]:
        """The next message, an object, and the descriptors that came with it, the caller's to close.

        Raises:
            Closed: no whole message comes any more; DescriptorsLost if that is for want of our own means.
            TimeoutError: none came in time; what has come of it is kept.
        """
        message, descriptors = self.receive_any(timeout_s)
        if isinstance(message, bytes):
            for descriptor in descriptors:
                os.close(descriptor)
            self._drop_descriptors()
            raise Closed("a message that is no object")
        return message, descriptors

    def receive_any(self, timeout_s: float | None = None) -> tuple[Message | bytes, list[int]]:
        """As `receive`, for a message that may be bytes."""
        try:
            while (end := self._whole_bytes()) is None:
                if timeout_s:
                    self._wait(timeout_s)
                self._read += self._some(_AT_ONCE_FLAGS if timeout_s == 0 else _FLAGS)
            return self._message(end)
        except BlockingIOError:
            raise TimeoutError from None
        except TimeoutError:
            raise
        except Closed:
            self._drop_descriptors()
            raise
        except (OSError, ValueError) as error:
            self._drop_descriptors()
            raise Closed from error

    def _wait(self, timeout_s: float) -> None:
        if self._readable is None:
            self._readable = select.poll()
            self._readable.register(self._socket, select.POLLIN)
        if not self._readable.poll(timeout_s * 1000):
            raise TimeoutError

    def _some(self, how: int) -> memoryview:
        size, ancillary, flags, _ = self._socket.recvmsg_into([self._buffer], _SPACE, how)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(payload[: len(payload) // found.itemsize * found.itemsize])
                self._descriptors.extend(found)
        if flags & socket.MSG_CTRUNC:
            raise DescriptorsLost("there are no file descriptors left")
        if not size:
            raise Closed
        return self._buffer[:size]

    def _whole_bytes(self) -> int | None:
        """How many bytes the next message takes; None if they have not all been read."""
        if len(self._read) < _HEAD.size:
            return None
        length, _ = _HEAD.unpack_from(self._read)
        if length > _MOST_BYTES:
            raise ValueError("a message of no sensible length")
        end: int = _HEAD.size + length
        return end if len(self._read) >= end else None

    def _message(self, end: int) -> tuple[Message | bytes, list[int]]:
        _, count = _HEAD.unpack_from(self._read)
        if count > len(self._descriptors):
            raise ValueError("a message without its descriptors")
        data = bytes(self._read[_HEAD.size : end])
        del self._read[:end]
        message: Message | bytes = json.loads(data) if data[:1] == _OBJECT else data
        return message, [self._descriptors.popleft() for _ in range(count)]

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())


def pair() -> tuple[Channel, socket.socket]:
    """A channel for this process, and the other end for another."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(mine), other
