"""The messages within a call: each with a byte that says whether it is compressed, and its size before it.

A compressed one stays as it came until it is wanted, see `Assembly.plain`: it may be a thousandth of what it
becomes. Nor is it unpacked where everybody waits for that, unless it is small, see `Assembly.plain_if_small`.

A message that comes in one piece is copied once out of the buffer that all connections read into. For a
longer one memory is taken when its size is known and allowed, and it is filled as the pieces come.
"""

from __future__ import annotations

import struct
import zlib

import grpc
import numpy as np

from splitlearn_comm.core.frames import Bytes

PREFIX_BYTES = 5
_PREFIX = struct.Struct(">BI")
_GZIP = 16 + zlib.MAX_WBITS
_SMALL_BYTES = 16 * 1024
_SMALL_PLAIN_BYTES = 64 * 1024
_WINDOW_BITS = {"gzip": _GZIP, "deflate": zlib.MAX_WBITS}


class MessageFault(Exception):
    """A message that cannot be taken.

    Args:
        status: that its call ends with.
        details: for the caller.
    """

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


class Compressed:
    """A message as it came."""

    __slots__ = ("data",)

    def __init__(self, data: Bytes) -> None:
        self.data = data


def prefix(size: int) -> bytes:
    """What precedes a message of `size` bytes that is not compressed."""
    return _PREFIX.pack(0, size)


class Assembly:
    """Puts the messages of one call together.

    Args:
        max_bytes: of one message, compressed or not.
        encoding: by which those are compressed that say so.
    """

    __slots__ = ("_compressed", "_encoding", "_filled", "_head", "_max_bytes", "_target")

    def __init__(self, max_bytes: int, encoding: str) -> None:
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._head = b""
        self._target: memoryview | None = None
        self._filled = 0
        self._compressed = False

    @property
    def missing(self) -> int:
        """Bytes that the message lacks whose size is known."""
        return 0 if self._target is None else len(self._target) - self._filled

    @property
    def is_within(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._target is not None or bool(self._head)

    def room(self) -> memoryview | None:
        """Where the missing bytes go; whoever writes there calls `filled`."""
        return None if self._target is None else self._target[self._filled :]

    def filled(self, size: int) -> Bytes | Compressed | None:
        """So many bytes were written to `room`; the message, if that was all of it."""
        assert self._target is not None
        self._filled += size
        if self._filled < len(self._target):
            return None
        message, self._target = self._target, None
        return Compressed(message) if self._compressed else message

    def feed(self, piece: memoryview) -> list[Bytes | Compressed]:
        """Take what has arrived; the messages that it completes.

        Raises:
            MessageFault: if one is too large, or compressed in a way that nobody announced.
        """
        messages: list[Bytes | Compressed] = []
        while True:
            if self._target is None:
                if self._head:
                    lacks = PREFIX_BYTES - len(self._head)
                    self._head += piece[:lacks]
                    piece = piece[lacks:]
                    if len(self._head) < PREFIX_BYTES:
                        return messages
                    compressed, size = _PREFIX.unpack(self._head)
                    self._head = b""
                elif len(piece) < PREFIX_BYTES:
                    self._head = bytes(piece)
                    return messages
                else:
                    compressed, size = _PREFIX.unpack_from(piece)
                    piece = piece[PREFIX_BYTES:]
                self._check(compressed, size)
                if len(piece) >= size:
                    message = bytes(piece[:size])
                    messages.append(Compressed(message) if compressed else message)
                    piece = piece[size:]
                    continue
                # The system gives the memory as it is written to, not before.
                self._target = np.empty(size, np.uint8).data
                self._filled = 0
            taken = min(len(piece), self.missing)
            self._target[self._filled : self._filled + taken] = piece[:taken]
            piece = piece[taken:]
            whole = self.filled(taken)
            if whole is not None:
                messages.append(whole)
            if not piece:
                return messages

    def plain_if_small(self, message: Compressed) -> Bytes | None:
        """What was compressed, if there is little of it and nothing wrong with it: None, soon, if not."""
        if len(message.data) > _SMALL_BYTES:
            return None
        unpacking = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            plain = unpacking.decompress(message.data, _SMALL_PLAIN_BYTES)
        except zlib.error:
            return None
        return plain if unpacking.eof and len(plain) <= self._max_bytes else None

    def plain(self, message: Compressed) -> Bytes:
        """What was compressed; on any thread.

        Raises:
            MessageFault: if it was not, or is too large.
        """
        unpacking = zlib.decompressobj(_WINDOW_BITS[self._encoding])
        try:
            plain = unpacking.decompress(message.data, self._max_bytes + 1)
        except zlib.error as error:
            text = f"a message is not compressed by {self._encoding}: {error}"
            raise MessageFault(grpc.StatusCode.INTERNAL, text) from None
        if len(plain) > self._max_bytes:
            raise self._too_large(f"more than {self._max_bytes}")
        if len(message.data) and not unpacking.eof:
            # What there is of it would pass for the whole message.
            text = f"a message that is compressed by {self._encoding} ends too early"
            raise MessageFault(grpc.StatusCode.INTERNAL, text)
        return plain

    def _check(self, compressed: int, size: int) -> None:
        if size > self._max_bytes:
            raise self._too_large(f"{size}")
        if compressed > 1:
            text = f"a message begins with {compressed}, and not with 0 or 1"
            raise MessageFault(grpc.StatusCode.INTERNAL, text)
        if compressed and self._encoding not in _WINDOW_BITS:
            known = ", ".join(_WINDOW_BITS)
            text = (
                f"grpc-encoding: a message is compressed by {self._encoding!r}; known are {known}"
            )
            raise MessageFault(grpc.StatusCode.UNIMPLEMENTED, text)
        self._compressed = bool(compressed)

    def _too_large(self, size: str) -> MessageFault:
        text = f"a message of {size} bytes; the most that is taken is {self._max_bytes}"
        return MessageFault(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
