"""Messages that carry a tensor, taken apart and put together without copying the tensor more than needed.

Every message of the wire that carries one has its bytes in field 1 (`data`), and the protocol buffers' own
encoders write that field first. So the tensor's bytes can be viewed where they arrived, and written once
next to the rest of the message. Messages that are laid out otherwise are read as any other, with copies.

The encoding is described at https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, TypeVar

Bytes: TypeAlias = "bytes | memoryview"

_DATA_TAG = 0x0A
"""Field 1, a string of bytes."""

BIG_BYTES = 64 * 1024
"""From that size on a copy costs more than taking a message apart by hand."""


class CarriesData(Protocol):
    """A message class whose field 1 is `data`."""

    data: bytes

    def ParseFromString(self, serialized: bytes) -> int: ...


M = TypeVar("M", bound=CarriesData)


def read(message: M, frame: Bytes) -> tuple[M, Bytes]:
    """Parse `frame` into `message`, which is empty; give it and the bytes of its `data`.

    Those of a large frame are a view into it, and are missing in the message.

    Raises:
        google.protobuf.message.DecodeError: if `frame` is no such message.
    """
    taken = take_apart(frame)
    if taken is None:
        message.ParseFromString(bytes(frame))
        return message, message.data
    first, rest = taken
    message.ParseFromString(rest)
    # A field that comes twice counts as it came last.
    return message, message.data or first


def take_apart(frame: Bytes) -> tuple[memoryview, bytes] | None:
    """The contents of field 1, a string of bytes or a message, as a view; and all that follows it.

    None for a frame that is not worth it, or does not begin with field 1: it is to be read as a whole.
    """
    if len(frame) < BIG_BYTES or frame[0] != _DATA_TAG:
        return None
    size, begin = _varint(frame, 1)
    end = begin + size
    return (memoryview(frame)[begin:end], bytes(frame[end:])) if end <= len(frame) else None


def parts(data: Bytes, *rest: bytes) -> tuple[Bytes, ...]:
    """What a message of `data` in field 1 and other fields, as encoded in `rest`, consists of."""
    return (_data_tag(len(data)), data, *rest) if len(data) else rest


def write(data: Bytes, *rest: bytes) -> bytes:
    """A message of `data` in field 1 and other fields as they are encoded in `rest`."""
    return b"".join(parts(data, *rest))


def enclosed(message: tuple[Bytes, ...], *rest: bytes) -> tuple[Bytes, ...]:
    """What a message with another one, given in parts, in field 1 consists of."""
    return _data_tag(sum(map(len, message))), *message, *rest


def nested(number: int, message: bytes) -> bytes:
    """An encoded message as field `number` (1 to 15) of another."""
    return bytes([number << 3 | 2]) + _as_varint(len(message)) + message


def _data_tag(size: int) -> bytes:
    return b"\x0a" + _as_varint(size)


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(frame: Bytes, at: int) -> tuple[int, int]:
    """The value at `at`, and where the next one begins. One that never ends is too large to be a size."""
    value = 0
    for place, byte in enumerate(frame[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return len(frame), at
