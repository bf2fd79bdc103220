"""How much memory weights will take, told from headers and sizes of files; no tensor is ever read.

safetensors (one file, or the shards of an index)   exact: the header names each tensor's bytes
torch.save, torch.jit.save, torch.export.save       exact: the archive names each storage's (`archive_size`)
a checkpoint index                                  exact: the total that it states
any other file                                      a guess: its size × 1.2
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.archive_size import archive_bytes
from splitlearn_manager.config.files import FileSystem
from splitlearn_manager.config.installed import is_file

MB = 2**20
GUESS_FACTOR = 1.2
"""A checkpoint of another format: what unpacking it takes beyond its size."""
MAX_HEADER_BYTES = 100 * MB
"""The format's own limit for the header of a safetensors file."""
_MAX_STATED_BYTES = 2**60
"""Whoever states more is damaged: JSON has integers that are no float's."""

_FLOATING_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
_ZIP = b"PK\x03\x04"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Estimate:
    """What a model's weights will take.

    Attributes:
        weights_mb: MB (2^20 bytes); None where only loading can tell.
        how: what the figure rests on, for people.
    """

    weights_mb: float | None
    how: str


def stated_size(path: Path, dtype: str | None, fs: FileSystem) -> Estimate | None:
    """The exact size, where the files state it: safetensors headers, archives, a checkpoint index.

    Args:
        path: a file, or a directory as Hugging Face lays it out.
        dtype: what floating-point weights are converted to (`config.dtype`); None: kept as stored.

    Returns:
        None where nothing states a size, or what does is damaged.

    Raises:
        OSError: nothing is at `path`, or it cannot be read.
    """
    if not fs.stat(str(path)).is_dir:
        if fs.read(str(path), len(_ZIP)) == _ZIP:
            return _size_of_archive(path, dtype, fs)
        return _sum_of_headers([path], dtype, fs)
    for name in _INDEXES:
        index = path / name
        if is_file(index, fs):
            return _size_of_index(index, dtype, fs)
    if is_file(path / "model.safetensors", fs):
        return _sum_of_headers([path / "model.safetensors"], dtype, fs)
    if is_file(path / "pytorch_model.bin", fs):
        return _size_of_archive(path / "pytorch_model.bin", dtype, fs)
    return None


def guessed_size(sizes: Iterable[int]) -> Estimate:
    """The size of files (in bytes) of which nothing more is known."""
    return Estimate(sum(sizes) * GUESS_FACTOR / MB, f"file size × {GUESS_FACTOR}")


def _size_of_index(index: Path, dtype: str | None, fs: FileSystem) -> Estimate | None:
    """From the headers of the shards, which know the dtypes; else from the total in the index."""
    content = _json(fs.read(str(index), MAX_HEADER_BYTES))
    shards = content.get("weight_map")
    if isinstance(shards, dict) and index.name.startswith("model.safetensors"):
        names = sorted({str(name) for name in shards.values()})
        files = [index.parent / name for name in names]
        if all(is_file(file, fs) for file in files):
            exact = _sum_of_headers(files, dtype, fs)
            if exact is not None:
                return exact
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if (
        isinstance(total, int | float)
        and not isinstance(total, bool)
        and 0 <= total < _MAX_STATED_BYTES
    ):
        return Estimate(total / MB, "checkpoint index")
    return None


def _size_of_archive(file: Path, dtype: str | None, fs: FileSystem) -> Estimate | None:
    size = archive_bytes(file, _DTYPE_BYTES[dtype] if dtype else None, fs)
    return Estimate(size / MB, "archive index" + _converted(dtype)) if size is not None else None


def _converted(dtype: str | None) -> str:
    return f", converted to {dtype}" if dtype else ""


def _sum_of_headers(files: list[Path], dtype: str | None, fs: FileSystem) -> Estimate | None:
    total = 0
    for file in files:
        size = _header_bytes(file, dtype, fs)
        if size is None:
            return None
        total += size
    how = "safetensors header" if len(files) == 1 else f"safetensors headers of {len(files)} shards"
    return Estimate(total / MB, how + _converted(dtype))


def _header_bytes(file: Path, dtype: str | None, fs: FileSystem) -> int | None:
    """Bytes of all tensors of a safetensors file once converted; None if the header is damaged."""
    start = fs.read(str(file), 8)
    if len(start) < 8:
        return None
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        return None
    tensors = _json(fs.read(str(file), 8 + length)[8:])
    tensors.pop("__metadata__", None)
    if not tensors:
        return None
    sizes = [_tensor_bytes(tensor, dtype) for tensor in tensors.values()]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _tensor_bytes(tensor: object, dtype: str | None) -> int | None:
    match tensor:
        case {"dtype": str(stored), "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end < _MAX_STATED_BYTES
        ):
            size = end - begin
            if dtype is not None and stored in _FLOATING_BYTES:
                size = size // _FLOATING_BYTES[stored] * _DTYPE_BYTES[dtype]
            return size
    return None


def _json(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, or an empty one if there is none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
