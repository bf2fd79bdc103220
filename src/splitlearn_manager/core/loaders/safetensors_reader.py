"""Reads safetensors files into memory of our own, one tensor at a time.

A mapped file that somebody truncates ends the whole process with SIGBUS, and one that is rewritten in place
mixes two versions of the weights. So nothing is mapped here: each tensor is allocated, and its bytes are
read straight into it, which takes 1.0 × the weights in memory and no more.

The header is not believed: offsets must lie inside the file, in order, without overlap or gap, and agree
with dtype and shape.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

import torch

from splitlearn_manager.core.loaders.file_format import corrupt
from splitlearn_manager.core.loaders.own_memory import StoredTensor, read_tensor
from splitlearn_manager.errors import InvalidModel

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format itself sets."""

_LENGTH_BYTES = 8
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: where its bytes are, counted from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        LoadError: the file is cut off or damaged (reason `CorruptCheckpoint`).
        InvalidModel: it is complete, and its header is not one of this format.
    """
    with path.open("rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_size < _LENGTH_BYTES or _LENGTH_BYTES + length > file_size:
            raise corrupt(path, f"ends inside its header (it has {file_size:,} bytes)")
        if length > MAX_HEADER_BYTES:
            raise InvalidModel(f"{path.name} claims a header of {length:,} bytes")
        text = file.read(length)
    data_start = _LENGTH_BYTES + length
    try:
        header = json.loads(text)
    except ValueError as error:
        raise InvalidModel(f"{path.name} has a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidModel(f"{path.name} has a header that is no map of tensors")
    entries = [
        _entry(path, name, value, data_start)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_layout(path, entries, data_start, file_size)
    return tuple(entries)


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    wrong = InvalidModel(f"{path.name}: the header's entry for tensor {name!r} is malformed")
    if not isinstance(value, dict):
        raise wrong
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong
    torch_name = _DTYPES.get(str(value.get("dtype")))
    dtype = getattr(torch, torch_name, None) if torch_name else None
    if not isinstance(dtype, torch.dtype):
        raise InvalidModel(
            f"{path.name}: tensor {name!r} has dtype {value.get('dtype')!r}, which is not known"
        )
    begin, end = offsets
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise InvalidModel(
            f"{path.name}: tensor {name!r} of shape {shape} needs {size:,} bytes, "
            f"its entry spans {end - begin:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, size)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, file_size: int) -> None:
    expected = data_start
    for entry in entries:
        if entry.start != expected:
            what = "overlaps the one before it" if entry.start < expected else "leaves a gap"
            raise InvalidModel(f"{path.name}: tensor {entry.name!r} {what}")
        expected += entry.size
    if expected > file_size:
        raise corrupt(path, f"is cut off: it has {file_size:,} of {expected:,} bytes")
    if expected < file_size:
        raise InvalidModel(f"{path.name} has {file_size - expected:,} bytes after its last tensor")


class SafetensorsFile:
    """A file that is open for reading, until `close`.

    Attributes:
        tensors: by name, in the order of their bytes.

    Raises:
        LoadError, InvalidModel: as `read_header`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        entries = read_header(path)
        self._file = path.open("rb", buffering=0)
        self.tensors = {
            entry.name: StoredTensor(entry.dtype, entry.shape, _Part(path, self._file, entry))
            for entry in entries
        }

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read any more."""
        self._file.close()


class _Part:
    """The bytes of one tensor; a `ByteSource`."""

    def __init__(self, path: Path, file: io.FileIO, entry: TensorEntry) -> None:
        self._path = path
        self._file = file
        self._entry = entry

    def read(self, target: memoryview, start: int) -> None:
        self._file.seek(self._entry.start + start)
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise corrupt(
                    self._path, f"became shorter while tensor {self._entry.name!r} was read"
                )
            done += count

    def ensure_intact(self) -> None:
        """The format has no checksums."""


def read_all(
    paths: Iterable[Path], read: Callable[[StoredTensor], torch.Tensor] = read_tensor
) -> dict[str, torch.Tensor]:
    """The tensors of several files as one state dict.

    Args:
        read: gives a stored tensor its memory; on the CPU, as it is stored, unless said otherwise.

    Raises:
        InvalidModel: two files hold a tensor of the same name; or as `read_header`.
    """
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        with SafetensorsFile(path) as file:
            for name, stored in file.tensors.items():
                if name in found:
                    raise InvalidModel(f"{path.name}: tensor {name!r} is in another file as well")
                found[name] = read(stored)
    return found
