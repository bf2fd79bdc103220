"""Reads the pickle of a torch archive for the tensors that it describes; nothing of it is run.

The unpickler knows dicts and tensors; every other name in a pickle stands for a thing that takes whatever
is done to it and does nothing. No tensor's data is read: a tensor is told by the key of its storage and its
place there.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_STATE_DICTS = ("state_dict", "model_state_dict", "model")


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


class UnknownStorage(Exception):
    """The pickle refers to data in a way that torch.save does not."""


@dataclass(frozen=True)
class StorageReference:
    """A storage that a pickle refers to.

    Attributes:
        key: names its member in the archive.
        kind: the class of the storage, `FloatStorage` say; empty where that is not known.
        numel: its elements of that kind; -1 where that is not known.
    """

    key: str
    kind: str
    numel: int = -1


@dataclass(frozen=True)
class TensorReference:
    """A tensor: a strided part of a storage. Offset and strides count elements.

    `place` is (offset, size, stride); None for a tensor that is more than numbers in such a place
    (quantized, conjugated, of a dtype that its storage does not name).
    """

    storage: StorageReference
    place: tuple[int, tuple[int, ...], tuple[int, ...]] | None


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
    """`_rebuild_tensor(storage, offset, size, stride)` and, further, `requires_grad, hooks, metadata`."""
    if not isinstance(storage, StorageReference):
        return _Anything()
    match rest:
        case (int(offset), tuple(size), tuple(stride), *more) if not any(more[1:]):
            if len(size) == len(stride) and all(_is_size(n) for n in (offset, *size, *stride)):
                return TensorReference(storage, (offset, size, stride))
    return TensorReference(storage, None)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _special_tensor(storage: object, *rest: object) -> object:
    """A tensor whose storage and place are not all that it is."""
    if not isinstance(storage, StorageReference):
        return _Anything()
    return TensorReference(storage, None)


def _parameter(data: object, *rest: object) -> object:
    return data


_KNOWN: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _special_tensor,
    ("torch._utils", "_rebuild_qtensor"): _special_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


_NUMBERED = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def _check_memory(data: bytes) -> None:
    """Python's unpickler keeps a list as long as the largest number that a pickle gives to an object: of a
    hundred bytes that may be gigabytes. No pickle needs a larger one than it has bytes."""
    try:
        for opcode, number, _ in pickletools.genops(data):
            if opcode.name in _NUMBERED and not 0 <= int(number or 0) < len(data):
                raise pickle.UnpicklingError(f"an object has the number {number}")
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None


class PickleReader(pickle.Unpickler):
    """Reads a pickle for the storages that it refers to.

    Attributes:
        storages: by their key.

    Raises:
        pickle.UnpicklingError: it is none, or asks for more memory than what it describes takes.
    """

    def __init__(self, data: bytes) -> None:
        _check_memory(data)
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, StorageReference] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        return _KNOWN.get((module, name), _Anything)

    def persistent_load(self, pid: Any) -> object:
        kind, storage, key, _, numel = (*pid, None, None)[:5]
        if kind != "storage" or not isinstance(key, str):
            raise UnknownStorage
        name = storage if isinstance(storage, str) else ""
        count = numel if type(numel) is int else -1
        return self.storages.setdefault(key, StorageReference(key, name, count))
