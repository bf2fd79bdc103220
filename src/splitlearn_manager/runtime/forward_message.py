"""A forward as a message: one tensor, from the beginning of an area on, to a worker and back.

It is the message that each batch takes, and as JSON it would take longer than all the rest of its way:

    byte 0      FORWARD, which no JSON begins with
    byte 1      flags: the message brings a new area; the forward waits for its turn
    byte 2      the dtype's number in `DTYPES`
    byte 3      how many sizes follow, 8 bytes each, little-endian

What cannot be told in it travels as JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

FORWARD = 1

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
_AREA, _TURN = 1, 2
_HEAD = struct.Struct("<BBBB")
_MOST_SIZES = 255


@dataclass(frozen=True, slots=True)
class ForwardMessage:
    """What such a message says.

    Attributes:
        brings_area: a new area comes with it; the tensor lies there.
        turn: one forward at a time; an answer has no turn.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    brings_area: bool
    turn: bool

    def written(self) -> bytes:
        """As it travels."""
        return written(self.dtype, self.shape, brings_area=self.brings_area, turn=self.turn)


def can_be_told(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether there is such a message for a tensor."""
    return dtype in _NUMBERS and len(shape) <= _MOST_SIZES


@lru_cache(maxsize=256)
def written(
    dtype: torch.dtype, shape: tuple[int, ...], *, brings_area: bool, turn: bool = False
) -> bytes:
    """The message's bytes."""
    flags = (_AREA if brings_area else 0) | (_TURN if turn else 0)
    head = _HEAD.pack(FORWARD, flags, _NUMBERS[dtype], len(shape))
    return head + struct.pack(f"<{len(shape)}q", *shape)


@lru_cache(maxsize=256)
def read(data: bytes) -> ForwardMessage:
    """What a message says. Raises ValueError if it is none; what it says of sizes is not to be trusted."""
    try:
        kind, flags, number, count = _HEAD.unpack_from(data)
        shape = struct.unpack(f"<{count}q", data[_HEAD.size :])
        dtype = DTYPES[number]
    except (struct.error, IndexError) as error:
        raise ValueError("a message that is no forward") from error
    if kind != FORWARD:
        raise ValueError(f"a message of kind {kind}")
    return ForwardMessage(dtype, shape, bool(flags & _AREA), bool(flags & _TURN))
