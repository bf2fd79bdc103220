"""What a torch archive says of the size of its weights; no tensor is read, and nothing of it is run.

torch.save, torch.jit.save and torch.export.save write zip archives: a member for each storage, and small
members that describe them. So the sizes are in the zip's directory, and of what dtype a storage is in the
pickle that refers to it:

    torch.save        NAME/data.pkl and NAME/data/0, NAME/data/1, …
    torch.jit.save    the same, and NAME/constants.pkl with NAME/constants/0, …
    torch.export      NAME/data/weights/weight_0, … and a JSON file that names their dtypes

The pickle is read by an unpickler that knows dicts and tensors; every other name in it stands for a thing
that takes whatever is done to it and does nothing. A storage that several tensors share counts once.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from splitlearn_manager.config.files import FileSystem

MAX_DESCRIPTION_BYTES = 64 * 2**20
"""The largest pickle or JSON of an archive that is read for its size."""

_STATE_DICTS = ("state_dict", "model_state_dict", "model")
_FLOATING = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2}
"""Bytes of an element, by what the class of its storage is called in a pickle."""
_EXPORTED_FLOATING = {8: 8, 7: 4, 6: 2, 13: 2}
"""The same by the numbers of torch.export's schema: double, float, half, bfloat16."""

V = TypeVar("V")


def state_dict_in(loaded: object, is_tensor: Callable[[object], bool]) -> Mapping[str, Any] | None:
    """The state dict in what a checkpoint holds: the whole of it, or its entry `state_dict` or the like."""
    if not isinstance(loaded, Mapping):
        return None
    for candidate in (loaded, *(loaded.get(name) for name in _STATE_DICTS)):
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(key, str) and is_tensor(value) for key, value in candidate.items())
        ):
            return candidate
    return None


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
    zipfile.BadZipFile,
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
    reader = _Reader(archive.read(name))
    loaded = reader.load()
    chosen = state_dict_in(loaded, lambda value: isinstance(value, _Tensor))
    used: Iterable[_Reference] = reader.storages.values()
    if chosen is not None:
        used = {tensor.storage.key: tensor.storage for tensor in chosen.values()}.values()
    for storage in used:
        size = archive.sizes[folder + storage.key]
        yield _Storage(size, _FLOATING.get(storage.kind.removesuffix("Storage"), 0))


@dataclass(frozen=True)
class _Reference:
    """A storage that a pickle refers to."""

    key: str
    kind: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Reference


class _Anything:
    """Stands for whatever the pickle names, and takes whatever is done to it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __new__(cls, *args: object, **kwargs: object) -> _Anything:
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> _Anything:
        return _Anything()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        pass

    def extend(self, values: object) -> None:
        pass

    def add(self, value: object) -> None:
        pass


def _tensor(storage: object, *rest: object) -> object:
    return _Tensor(storage) if isinstance(storage, _Reference) else _Anything()


def _parameter(data: object, *rest: object) -> object:
    return data


_KNOWN: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_qtensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


class _Reader(pickle.Unpickler):
    """Reads a pickle for the storages that it refers to.

    Attributes:
        storages: by their key.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, _Reference] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        return _KNOWN.get((module, name), _Anything)

    def persistent_load(self, pid: Any) -> object:
        kind, storage, key = pid[:3]
        if kind != "storage" or not isinstance(key, str):
            raise _NotUnderstood
        name = storage if isinstance(storage, str) else ""
        return self.storages.setdefault(key, _Reference(key, name))
