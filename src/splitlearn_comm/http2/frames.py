"""The numbers and layouts of HTTP/2 (RFC 9113, sections 4, 6 and 7)."""

from __future__ import annotations

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9

# Kinds of frames.
DATA: Final = 0
HEADERS: Final = 1
RESET: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GO_AWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# Flags.
END_STREAM: Final = 1
ACK: Final = 1
END_HEADERS: Final = 4
PADDED: Final = 8
PRIORITY: Final = 32

# Settings.
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW: Final = 4
MAX_FRAME: Final = 5
MAX_HEADERS: Final = 6

# Errors.
NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

FIRST_WINDOW: Final = 65_535
"""What a stream and a connection may send before anything was agreed, in bytes."""
LARGEST_WINDOW: Final = 2**31 - 1
LEAST_MAX_FRAME: Final = 16_384
LARGEST_MAX_FRAME: Final = 2**24 - 1
SETTING_BYTES: Final = 6

_REST = struct.Struct(">BBI")
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")
_TWO_NUMBERS = struct.Struct(">II")

rest_of_head = _REST.unpack_from
"""(kind, flags, stream) from byte 3 of a frame's head."""
setting_at = _SETTING.unpack_from
"""(name, value)"""
number_at = _NUMBER.unpack_from


class ConnectionFault(Exception):
    """The other end breaks the rules in a way that ends the connection.

    Args:
        code: as RFC 9113 numbers errors.
        why: for a person.
    """

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


def head(size: int, kind: int, flags: int, stream: int) -> bytes:
    """The head of a frame with a payload of `size` bytes."""
    return size.to_bytes(3, "big") + _REST.pack(kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return head(len(payload), kind, flags, stream) + payload


def headers(flags: int, stream: int, block: bytes) -> bytes:
    """A block of headers, in as many frames as everybody takes."""
    if len(block) <= LEAST_MAX_FRAME:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    out = frame(HEADERS, flags, stream, block[:LEAST_MAX_FRAME])
    for at in range(LEAST_MAX_FRAME, len(block), LEAST_MAX_FRAME):
        ends = END_HEADERS if at + LEAST_MAX_FRAME >= len(block) else 0
        out += frame(CONTINUATION, ends, stream, block[at : at + LEAST_MAX_FRAME])
    return out


def settings(values: dict[int, int]) -> bytes:
    """A frame of settings."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in values.items()))


def reset(stream: int, code: int) -> bytes:
    """A frame that ends a stream."""
    return frame(RESET, 0, stream, _NUMBER.pack(code))


def window_update(stream: int, more: int) -> bytes:
    """A frame that lets the other end send `more` bytes, on a stream or (0) on the connection."""
    return frame(WINDOW_UPDATE, 0, stream, _NUMBER.pack(more))


def go_away(last_stream: int, code: int, why: str) -> bytes:
    """A frame after which no new stream is taken; those up to `last_stream` are answered."""
    return frame(GO_AWAY, 0, 0, _TWO_NUMBERS.pack(last_stream, code) + why.encode()[:200])
