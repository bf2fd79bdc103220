"""What a torch archive says of the size of its weights; no tensor is read, and nothing of it is run.

torch.save, torch.jit.save and torch.export.save write zip archives: a member for each storage, and small
members that describe them. So the sizes are in the zip's directory, and of what dtype a storage is in the
pickle that refers to it:

    torch.save        NAME/data.pkl and NAME/data/0, NAME/data/1, …
    torch.jit.save    the same, and NAME/constants.pkl with NAME/constants/0, …
    torch.export      NAME/data/weights/weight_0, … and a JSON file that names their dtypes

The pickle is read by an unpickler that runs nothing (`archive_pickle`). A storage that several tensors share
counts once.
"""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.archive_pickle import (
    PickleReader,
    StorageReference,
    TensorReference,
    UnknownStorage,
    state_dict_in,
)
from splitlearn_manager.config.files import FileSystem

MAX_DESCRIPTION_BYTES = 64 * 2**20
"""The largest pickle or JSON of an archive that is read for its size."""

_READ_BY_TORCH = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_FLOATING = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2}
"""Bytes of an element, by what the class of its storage is called in a pickle."""
_EXPORTED_FLOATING = {8: 8, 7: 4, 6: 2, 13: 2}
"""The same by the numbers of torch.export's schema: double, float, half, bfloat16."""


def archive_bytes(path: Path, element_bytes: int | None, fs: FileSystem) -> int | None:
    """Bytes that the weights in an archive take once loaded; None if it is no archive that can be read.

    Args:
        element_bytes: what an element of a floating-point weight takes after conversion; None: kept as
            stored.

    Raises:
        OSError: nothing is at `path`, or it cannot be read.
    """
    with fs.open(str(path)) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return sum(s.bytes_as(element_bytes) for s in _storages(_Archive(archive)))
        except _UNREADABLE:
            return None


class _NotUnderstood(Exception):
    """The archive is none of those that are known, or damaged."""


_UNREADABLE = (
    _NotUnderstood,
    UnknownStorage,
    zipfile.BadZipFile,
    zlib.error,  # a compressed member
    pickle.UnpicklingError,
    NotImplementedError,
    RuntimeError,  # an encrypted member
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    MemoryError,
    RecursionError,
    OverflowError,
)


@dataclass(frozen=True)
class _Storage:
    """Attributes: size in bytes as stored; bytes of an element if it is of floating point, else 0."""

    size: int
    floating: int

    def bytes_as(self, element_bytes: int | None) -> int:
        if element_bytes is None or not self.floating:
            return self.size
        return self.size // self.floating * element_bytes


class _Archive:
    """A zip archive without the folder that all of its members are in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        members = archive.infolist()
        # torch reads no other kinds, and their decoders tell damage as an OSError, as disks do.
        if any(m.compress_type not in _READ_BY_TORCH for m in members):
            raise _NotUnderstood
        self._folder = members[0].filename.partition("/")[0] + "/" if members else ""
        self.sizes = {m.filename.removeprefix(self._folder): m.file_size for m in members}

    def read(self, name: str) -> bytes:
        if self.sizes.get(name, MAX_DESCRIPTION_BYTES) >= MAX_DESCRIPTION_BYTES:
            raise _NotUnderstood(name)
        return self._archive.read(self._folder + name)


def _storages(archive: _Archive) -> Iterable[_Storage]:
    if "constants.pkl" in archive.sizes:
        return (
            *_of_pickle(archive, "data.pkl", "data/"),
            *_of_pickle(archive, "constants.pkl", "constants/"),
        )
    if "data.pkl" in archive.sizes:
        return _of_pickle(archive, "data.pkl", "data/")
    return _of_export(archive)


# torch.export.


def _of_export(archive: _Archive) -> Iterable[_Storage]:
    found: dict[str, _Storage] = {}
    for folder, config in (
        ("data/weights/", "model_weights_config.json"),
        ("data/constants/", "model_constants_config.json"),
    ):
        for name, size in archive.sizes.items():
            if name.startswith(folder) and not name.endswith(".json"):
                found[name] = _Storage(size, 0)
        if folder + config not in archive.sizes:
            continue
        for entry in json.loads(archive.read(folder + config))["config"].values():
            name = folder + entry["path_name"]
            if name in found and not entry["use_pickle"]:
                dtype = entry["tensor_meta"]["dtype"]
                found[name] = _Storage(archive.sizes[name], _EXPORTED_FLOATING.get(dtype, 0))
    if not found:
        raise _NotUnderstood
    return found.values()


# Pickles.


def _of_pickle(archive: _Archive, name: str, folder: str) -> Iterable[_Storage]:
    reader = PickleReader(archive.read(name))
    loaded = reader.load()
    chosen = state_dict_in(loaded, lambda value: isinstance(value, TensorReference))
    used: Iterable[StorageReference] = reader.storages.values()
    if chosen is not None:
        used = {tensor.storage.key: tensor.storage for tensor in chosen.values()}.values()
    for storage in used:
        size = archive.sizes[folder + storage.key]
        yield _Storage(size, _FLOATING.get(storage.kind.removesuffix("Storage"), 0))
