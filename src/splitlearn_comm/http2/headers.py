"""The headers of calls and of answers, as "gRPC over HTTP2" lays them out.

Headers that arrive are decoded by the library `hpack`. A caller sends the same block of bytes again and
again; one that leaves the decoder as it was means the same the next time, and is not decoded twice. Headers
that leave refer to no earlier ones, so that any thread may write them.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias
from urllib.parse import quote

import grpc
import hpack

from splitlearn_comm.http2 import frames

Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"

MAX_HEADERS_BYTES = 16 * 1024
"""Of one call, as RFC 7541 counts them."""
ENCODINGS = ("identity", "deflate", "gzip")
"""How messages may be compressed that arrive."""

_REMEMBERED = 64
_NOT_METADATA = {"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding"}
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Printable ASCII but for the percent sign stays as it is in a message.
_READABLE = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
_STATUS_200 = b"\x88"
_GRPC = b"application/grpc"


@dataclass(frozen=True, slots=True)
class CallHead:
    """What the headers of a call say.

    Attributes:
        method: as `/service/method`.
        timeout_s: seconds that the caller waits, counted from the headers' arrival; None without a limit.
        encoding: how its messages are compressed, where they say that they are.
        metadata: what the caller adds; keys that end in `-bin` have bytes.
        fault: why these are no headers of a call; empty if they are.
        http_status: what to answer where there is a fault.
    """

    method: str
    timeout_s: float | None
    encoding: str
    metadata: Metadata
    fault: str = ""
    http_status: int = 200


class HeaderReader:
    """Reads the headers that arrive on one connection."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADERS_BYTES)
        self._known: dict[bytes, CallHead] = {}

    def read(self, block: bytes) -> CallHead:
        """What a block of headers says.

        Raises:
            ConnectionFault: if it cannot be decoded; then no later one can either.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table
        entries = table.dynamic_entries
        before = len(entries), table.maxsize, entries[0] if entries else None
        try:
            found = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError:
            why = f"headers of more than {MAX_HEADERS_BYTES} bytes"
            raise frames.ConnectionFault(frames.ENHANCE_YOUR_CALM, why) from None
        except (hpack.HPACKError, IndexError, UnicodeDecodeError):
            why = "headers that cannot be decoded"
            raise frames.ConnectionFault(frames.COMPRESSION_ERROR, why) from None
        head = _head([(bytes(name), bytes(value)) for name, value in found])
        # An entry is added at the front, as an object of its own.
        first = entries[0] if entries else None
        if (len(entries), table.maxsize) != before[:2] or first is not before[2]:
            self._known.clear()
        elif len(self._known) < _REMEMBERED:
            self._known[block] = head
        return head


def _head(found: list[tuple[bytes, bytes]]) -> CallHead:
    fields = dict(found)
    method = fields.get(b":path", b"").decode("latin-1")
    timeout = fields.get(b"grpc-timeout")
    timeout_s, fault, status = None, "", 200
    if fields.get(b":method") != b"POST":
        fault, status = "calls are made by POST", 405
    elif not fields.get(b"content-type", b"").startswith(_GRPC):
        fault, status = "the content-type of a call is application/grpc", 415
    elif timeout is not None:
        match = _TIMEOUT.fullmatch(timeout)
        if match is None:
            fault, status = "grpc-timeout: expected up to 8 digits and one of H, M, S, m, u, n", 400
        else:
            timeout_s = int(match[1]) * _SECONDS[match[2]]
    try:
        metadata = tuple(_metadata(found))
    except (binascii.Error, UnicodeDecodeError):
        metadata, fault, status = (), "a header ending in -bin is no base64", 400
    encoding = fields.get(b"grpc-encoding", b"identity").decode("latin-1")
    return CallHead(method, timeout_s, encoding, metadata, fault, status)


def _metadata(found: list[tuple[bytes, bytes]]) -> list[tuple[str, str | bytes]]:
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in found:
        key = name.decode("latin-1")
        if key.startswith(":") or key in _NOT_METADATA:
            continue
        if key.endswith("-bin"):
            for part in value.split(b","):
                padded = part.strip() + b"=" * (-len(part.strip()) % 4)
                metadata.append((key, base64.b64decode(padded, validate=True)))
        else:
            metadata.append((key, value.decode("latin-1")))
    return metadata


# What leaves.


def answer_head(metadata: Metadata = ()) -> bytes:
    """The block of headers that begins an answer."""
    return _ANSWER_HEAD + _fields(metadata) if metadata else _ANSWER_HEAD


def trailers(status: grpc.StatusCode, details: str, metadata: Metadata = ()) -> bytes:
    """The block of headers that ends an answer."""
    # The hash of a member of an enum is computed in Python, that of its number is not.
    return _trailers(0 if status is grpc.StatusCode.OK else status.value[0], details, metadata)


@lru_cache(maxsize=1024)
def _trailers(status: int, details: str, metadata: Metadata) -> bytes:
    block = _literal(b"grpc-status", str(status).encode())
    if details:
        block += _literal(b"grpc-message", quote(details, safe=_READABLE).encode())
    return block + _fields(metadata)


def no_call_head(http_status: int) -> bytes:
    """The block of headers that begins the answer to what is no call."""
    return _literal(b":status", str(http_status).encode()) + _literal(b"content-type", _GRPC)


def _fields(metadata: Metadata) -> bytes:
    return b"".join(
        _literal(
            key.encode("ascii"),
            base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode(),
        )
        for key, value in metadata
    )


def _literal(name: bytes, value: bytes) -> bytes:
    """A field that refers to no table and is not added to one (RFC 7541, 6.2.2)."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """The length of a string that is not coded by Huffman's code (RFC 7541, 5.1 and 5.2)."""
    size = len(text)
    if size < 127:
        return bytes((size,))
    out = bytearray((127,))
    size -= 127
    while size >= 128:
        out.append(size % 128 + 128)
        size //= 128
    out.append(size)
    return bytes(out)


_ANSWER_HEAD = (
    _STATUS_200
    + _literal(b"content-type", _GRPC)
    + _literal(b"grpc-accept-encoding", ",".join(ENCODINGS).encode())
)
