"""Reads safetensors files into memory of our own, one tensor at a time.

A mapped file that somebody truncates ends the whole process with SIGBUS, and one that is rewritten in place
mixes two versions of the weights. So nothing is mapped here: each tensor is allocated, and its bytes are
read straight into it, which takes 1.0 × the weights in memory and no more.

The header is not believed: offsets must lie inside the file, in order, without overlap or gap, and agree
with dtype and shape. Tensors are read on the CPU; where they go then is the caller's business.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from splitlearn_manager.core.loaders.file_format import corrupt
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


def read_tensors(
    path: Path,
    dtype: torch.dtype | None = None,
    entries: tuple[TensorEntry, ...] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) in the order of the file; contiguous CPU tensors with memory of their own.

    Args:
        dtype: convert floating-point tensors to it, each one as it is read.
        entries: read these instead of all that `read_header` finds.

    Raises:
        as `read_header`.
    """
    entries = read_header(path) if entries is None else entries
    with path.open("rb", buffering=0) as file:
        for entry in entries:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            file.seek(entry.start)
            _fill(path, file, tensor, entry)
            convert = dtype is not None and tensor.is_floating_point() and dtype.is_floating_point
            yield entry.name, tensor.to(dtype) if convert else tensor


def read_all(paths: Iterable[Path], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors of several files as one state dict.

    Raises:
        InvalidModel: two files hold a tensor of the same name; or as `read_header`.
    """
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in read_tensors(path, dtype):
            if name in found:
                raise InvalidModel(f"{path.name}: tensor {name!r} is in another file as well")
            found[name] = tensor
    return found


def _fill(path: Path, file: io.FileIO, tensor: torch.Tensor, entry: TensorEntry) -> None:
    if not entry.size:
        return
    # A view of the tensor's own bytes: `readinto` writes there without a copy in between.
    target = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < entry.size:
        count = file.readinto(target[done:])
        if not count:
            raise corrupt(path, f"became shorter while tensor {entry.name!r} was read")
        done += count
