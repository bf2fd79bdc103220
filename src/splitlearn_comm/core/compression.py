"""How a tensor's bytes are made smaller on the wire: zlib, as clients of 1.0 know it, and Zstandard.

Expanding never makes more than it was told to expect, whatever the sender's data claims of itself.
"""

from __future__ import annotations

import zlib
from typing import Protocol

from splitlearn_comm.core.errors import InvalidRequest

_MOST_WINDOW_BYTES = 1 << 27
"""Zstandard data that needs a larger window is refused: the window is memory, and the sender's claim."""


class TooMuch(Exception):
    """The data expands to more than expected."""


class Compression(Protocol):
    """One way; holds no state, and may be shared by threads."""

    @property
    def name(self) -> str:
        """What the wire calls it."""
        ...

    def compress(self, raw: memoryview) -> bytes:
        """The bytes to send."""
        ...

    def expand(self, data: bytes | memoryview, expected: int) -> bytes:
        """What was compressed, if it is no more than `expected` bytes.

        Raises:
            TooMuch: if it is more.
            InvalidRequest: if `data` is not what `compress` makes, is cut short, or goes on behind its end.
        """
        ...


class Zlib:
    """See https://www.rfc-editor.org/rfc/rfc1950.

    Args:
        level: 0 (store) to 9 (smallest).

    Raises:
        ValueError: for any other level.
    """

    name = "zlib"

    def __init__(self, level: int = 6) -> None:
        if not 0 <= level <= 9:
            raise ValueError(f"level: expected 0 to 9, got {level}")
        self.level = level

    def compress(self, raw: memoryview) -> bytes:
        return zlib.compress(raw, self.level)

    def expand(self, data: bytes | memoryview, expected: int) -> bytes:
        inflater = zlib.decompressobj()
        try:
            # One byte more than expected tells an exact fit from an overflow; 0 would mean no limit.
            raw = inflater.decompress(data, expected + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the tensor's bytes are not zlib data: {error}") from error
        if len(raw) > expected:
            raise TooMuch
        if not inflater.eof:
            raise InvalidRequest(
                f"the compressed tensor is cut short: {len(raw)} of {expected} bytes"
            )
        if inflater.unused_data:
            behind = len(inflater.unused_data)
            raise InvalidRequest(f"{behind} bytes follow the end of the compressed tensor")
        return raw


class Zstd:
    """See https://www.rfc-editor.org/rfc/rfc8878. Faster than zlib at the same size.

    Args:
        level: 1 (fastest) to 19 (smallest).

    Raises:
        ValueError: for any other level.
    """

    name = "zstd"

    def __init__(self, level: int = 1) -> None:
        if not 1 <= level <= 19:
            raise ValueError(f"level: expected 1 to 19, got {level}")
        self.level = level

    def compress(self, raw: memoryview) -> bytes:
        import zstandard

        return zstandard.ZstdCompressor(level=self.level).compress(raw)

    def expand(self, data: bytes | memoryview, expected: int) -> bytes:
        import zstandard

        try:
            frame = zstandard.get_frame_parameters(data)
            size = expected + 1
            if frame.content_size != zstandard.CONTENTSIZE_UNKNOWN:
                size = frame.content_size
            # Room is made for what the data says of itself.
            if size > expected + 1:
                raise TooMuch
            if frame.window_size > max(_MOST_WINDOW_BYTES, expected):
                raise InvalidRequest(
                    f"the compressed tensor needs a window of {frame.window_size} bytes; "
                    f"at most {_MOST_WINDOW_BYTES} are accepted"
                )
            inflater = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
            raw = inflater.decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise InvalidRequest(f"the tensor's bytes are not Zstandard data: {error}") from error
        if len(raw) > expected:
            raise TooMuch
        return raw


COMPRESSIONS: dict[str, Compression] = {"zlib": Zlib(), "zstd": Zstd()}
"""Those that a request may announce, by the names that the wire has for them."""
