"""Unpickles an archive of torch.save whose author is trusted, its weights straight into memory of our own.

The pickle may name any class and run any code, as `torch.load(weights_only=False)` lets it. What differs from
that is where storages come from: they are read by `TorchArchive`, into memory that is quick to fill, with
their checksums compared; tensors of all devices come to the CPU.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from splitlearn_manager.core.loaders.own_memory import StoredTensor, read_tensor
from splitlearn_manager.core.loaders.torch_archive import STORAGE_DTYPES, TorchArchive

_MOVED = {"torch.tensor": "torch._tensor"}
"""Modules of torch that old files name, and where their contents are now."""


def can_unpickle(archive: TorchArchive) -> bool:
    """Whether it is of the form that `unpickle` reads; torch reads others."""
    return archive.size("data.pkl") is not None and archive.is_little_endian


def unpickle(archive: TorchArchive) -> object:
    """What torch.save was given.

    Raises:
        LoadError: the archive is cut off or damaged (reason `CorruptCheckpoint`).
        Exception: whatever unpickling raises: a class that cannot be imported, say.
    """
    return _Unpickler(archive).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: TorchArchive) -> None:
        super().__init__(io.BytesIO(archive.read("data.pkl")), encoding="utf-8")
        self._archive = archive
        self._storages: dict[str, torch.storage.TypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (dtype := STORAGE_DTYPES.get(name.removesuffix("Storage"))):
            # Not the class of that name, which is deprecated and says so when it is used.
            return dtype
        return super().find_class(_MOVED.get(module, module), name)

    def persistent_load(self, saved: Any) -> torch.storage.TypedStorage:
        what, kind, key, _, numel = saved
        if what != "storage":
            raise pickle.UnpicklingError(f"it refers to a {what!r} outside of the pickle")
        if key not in self._storages:
            self._storages[key] = self._read(key, _dtype(kind), numel)
        return self._storages[key]

    def _read(self, key: str, dtype: torch.dtype, numel: int) -> torch.storage.TypedStorage:
        source = self._archive.storage(key)
        size = numel * dtype.itemsize
        if source is None or source.size < size:
            raise pickle.UnpicklingError(f"its member data/{key} is missing or too short")
        untyped = read_tensor(StoredTensor(torch.uint8, (size,), source)).untyped_storage()
        return torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=untyped, dtype=dtype, _internal=True
        )


def _dtype(kind: Any) -> torch.dtype:
    """The dtype of a kind of storage: what `find_class` gives, or a class that is not among the usual."""
    if kind is torch.UntypedStorage:
        return torch.uint8
    dtype: torch.dtype = kind if isinstance(kind, torch.dtype) else kind.dtype
    return dtype
