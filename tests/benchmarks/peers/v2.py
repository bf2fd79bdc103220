"""The open inference protocol ("v2"), which MLServer and Triton speak: one tensor in, one out, as bytes.

Over HTTP a request is a JSON header with the tensor's bytes behind it. Over gRPC it is a ModelInferRequest
with the bytes in `raw_input_contents`; the few fields that are needed are written here, so that callers need
no generated code of the servers' packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import wire

METHOD = "/inference.GRPCInferenceService/ModelInfer"
_HEADER_SIZE = b"inference-header-content-length:"


def http_request(path: str, tensor: torch.Tensor) -> bytes:
    """A POST that asks for the answer as bytes too."""
    data = _bytes_of(tensor)
    asked = {
        "inputs": [
            {
                "name": "input",
                "datatype": "FP32",
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(data)},
            }
        ],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    header = json.dumps(asked).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(header) + len(data)}\r\n\r\n"
    )
    return head.encode() + header + data


def http_answer(head: bytes, body: bytes) -> torch.Tensor:
    """The tensor of an answer's head and body."""
    (size,) = (
        int(line[len(_HEADER_SIZE) :])
        for line in head.lower().split(b"\r\n")
        if line.startswith(_HEADER_SIZE)
    )
    (output,) = json.loads(body[:size])["outputs"]
    return _tensor(body[size:], output["shape"])


def grpc_request(name: str, tensor: torch.Tensor) -> bytes:
    """A ModelInferRequest for numbers of FP32."""
    return _request(name, "FP32", tensor.shape, _bytes_of(tensor))


def grpc_answer(message: bytes) -> torch.Tensor:
    """The tensor of a ModelInferResponse."""
    found = dict(_fields(message))
    return _tensor(found[6], _numbers(dict(_fields(found[5]))[3]))


def grpc_request_in_bytes(name: str, tensor: torch.Tensor) -> bytes:
    """A ModelInferRequest whose tensor is one element of BYTES, packed as `wire` packs it."""
    packed = wire.packed(tensor)
    return _request(name, "BYTES", (1,), len(packed).to_bytes(4, "little") + packed)


def grpc_answer_in_bytes(message: bytes) -> torch.Tensor:
    """The tensor of an answer of one element of BYTES."""
    return wire.unpacked(dict(_fields(message))[6][4:])


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _tensor(data: bytes, shape: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").copy().reshape(tuple(shape)))


def _request(name: str, datatype: str, shape: Iterable[int], data: bytes) -> bytes:
    sizes = b"".join(_varint(size) for size in shape)
    tensor = _field(1, b"input") + _field(2, datatype.encode()) + _field(3, sizes)
    return _field(1, name.encode()) + _field(5, tensor) + _field(7, data)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each; these messages have none of another kind."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        assert key & 7 == 2, "a field that is no text, bytes or message"
        size, at = _read_varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _numbers(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        number, at = _read_varint(packed, at)
        yield number


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
