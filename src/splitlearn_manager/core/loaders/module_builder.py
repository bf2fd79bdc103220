"""Makes modules of the records that `module_records` has read, and checks each record while it does so.

A record may be anything that the file's author wished, so nothing of it is believed: a tensor must lie inside
its storage, a storage must be as long as its member in the archive, a module must consist of parameters,
buffers, modules and plain values. What could change how a module *behaves* is refused: hooks, and attributes
that would take the place of a method (`forward` above all).

Modules are made without calling their constructors, as unpickling does; tensors get memory of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.core.loaders.module_records import (
    ClassName,
    DtypeName,
    FunctionName,
    MalformedPickle,
    ModuleRecord,
    ParameterRecord,
    StorageRecord,
    TensorRecord,
    read_records,
)
from splitlearn_manager.core.loaders.own_memory import StoredTensor, read_tensor
from splitlearn_manager.core.loaders.slots import Destination
from splitlearn_manager.core.loaders.storage_uses import StorageUses
from splitlearn_manager.core.loaders.torch_archive import MAX_PICKLE_BYTES, TorchArchive

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def read_module(path: Path, destination: Destination | None = None) -> nn.Module:
    """The module that torch.save wrote whole to `path`.

    Args:
        destination: where its weights are to be, and as what; on the CPU, as they are stored, if None.
            What other tensors it has are on the CPU, as they are stored.

    Raises:
        RefusedGlobals: it has classes or functions other than torch's own layers.
        MalformedPickle: it is no module, or not one that torch.save writes.
        LoadError: the archive is cut off or damaged (reason `CorruptCheckpoint`).
    """
    try:
        with TorchArchive(path) as archive:
            if (archive.size("data.pkl") or 0) > MAX_PICKLE_BYTES:
                raise MalformedPickle("its description is larger than any module needs")
            record = read_records(archive.read("data.pkl"))
            if not isinstance(record, ModuleRecord):
                raise MalformedPickle(f"it holds {_kind(record)}, not a module")
            if not archive.is_little_endian:
                raise MalformedPickle("it was written on a big-endian machine")
            uses = StorageUses(record)
            return _Builder(archive, uses, destination or Destination()).module(record)
    except RecursionError as error:
        raise MalformedPickle("its modules are nested without end") from error


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, list(value)[:5]))}"
    return f"a {type(value).__name__.removesuffix('Record').lower()}"


class _Builder:
    """Makes each record once, so that what is shared in the file is shared in memory."""

    def __init__(self, archive: TorchArchive, uses: StorageUses, destination: Destination) -> None:
        self._archive = archive
        self._uses = uses
        self._destination = destination
        self._made: dict[object, object] = {}
        self._open: set[ModuleRecord] = set()
        self._storages: dict[str, torch.Tensor] = {}

    def module(self, record: ModuleRecord) -> nn.Module:
        made = self._made.get(record)
        if isinstance(made, nn.Module):
            return made
        if record in self._open:
            raise MalformedPickle("a module contains itself")
        _check_state(record)
        self._open.add(record)
        module = record.cls.__new__(record.cls)
        state = {key: self._value(value) for key, value in record.state.items()}
        _check_parts(record.cls, state)
        state |= {key: OrderedDict() for key in _HOOKS}
        module.__setstate__(state)  # type: ignore[no-untyped-call]
        self._made[record] = module
        return module

    def _value(self, value: object) -> object:
        match value:
            case None | bool() | int() | float() | str():
                return value
            case ModuleRecord():
                return self.module(value)
            case ParameterRecord() | TensorRecord():
                return self._tensor(value)
            case DtypeName(dtype):
                return dtype
            case FunctionName(function):
                return function
            case OrderedDict():
                return OrderedDict(self._items(value))
            case dict():
                return dict(self._items(value))
            case list():
                return [self._value(item) for item in value]
            case tuple():
                # torch.Size is a tuple and stays one of its kind.
                made = tuple(self._value(item) for item in value)
                return type(value)(made) if type(value) is not tuple else made
            case set():
                return set(value)
        what = "a class" if isinstance(value, ClassName) else f"a {type(value).__name__}"
        raise MalformedPickle(f"a module has {what} among its attributes")

    def _items(self, mapping: Mapping[object, object]) -> list[tuple[object, object]]:
        return [(self._value(key), self._value(value)) for key, value in mapping.items()]

    def _tensor(self, record: TensorRecord | ParameterRecord) -> torch.Tensor:
        made = self._made.get(record)
        if isinstance(made, torch.Tensor):
            return made
        if isinstance(record, ParameterRecord):
            floating = record.data.storage.dtype.is_floating_point
            tensor: torch.Tensor = torch.nn.Parameter(
                self._tensor(record.data).detach(), record.requires_grad and floating
            )
        else:
            storage = self._storage(record.storage)
            reach = 1 + sum((n - 1) * s for n, s in zip(record.size, record.stride, strict=True))
            if 0 not in record.size and record.offset + reach > storage.numel():
                raise MalformedPickle("a tensor reaches beyond its data")
            tensor = storage.as_strided(record.size, record.stride, record.offset)
        self._made[record] = tensor
        return tensor

    def _storage(self, record: StorageRecord) -> torch.Tensor:
        made = self._storages.get(record.key)
        if made is None:
            source = self._archive.storage(record.key)
            if source is None:
                raise MalformedPickle(f"its member data/{record.key} is missing")
            if source.size != record.numel * record.dtype.itemsize:
                raise MalformedPickle(
                    f"its member data/{record.key} is not as long as its tensors say"
                )
            stored = StoredTensor(record.dtype, (record.numel,), source)
            made = self._storages[record.key] = self._placed(record.key, stored)
        if self._uses.of_one_form(record.key):
            return made
        if made.nbytes != record.numel * record.dtype.itemsize:
            raise MalformedPickle("two tensors disagree about their common data")
        return made.view(record.dtype)

    def _placed(self, key: str, stored: StoredTensor) -> torch.Tensor:
        """The storage where it is to be; what is more than weights stays on the CPU, as it is stored."""
        if not self._uses.weights_alone(key):
            return read_tensor(stored)
        destination = self._destination
        shape = self._uses.parameter_alone(key)
        if shape is not None and destination.borrower is not None:
            dtype = destination.dtype if stored.dtype.is_floating_point else None
            shaped = stored.with_shape(shape)
            twin = destination.borrower.equal_to(shaped, dtype or stored.dtype)
            if twin is not None:
                return twin.view(-1)
        return read_tensor(stored, destination.dtype, destination.device)


def _check_state(record: ModuleRecord) -> None:
    name = record.cls.__name__
    for key, value in record.state.items():
        if key in _HOOKS:
            if not isinstance(value, dict) or value:
                raise MalformedPickle(f"a {name} carries hooks ({key})")
        elif key.startswith("__"):
            raise MalformedPickle(f"a {name} would replace its {key}")
        elif callable(inherited := getattr(record.cls, key, None)) or hasattr(inherited, "__get__"):
            raise MalformedPickle(f"a {name} would replace its method {key}")
        elif key == "_compiled_call_impl" and value is not None:
            raise MalformedPickle(f"a {name} is compiled; save it before torch.compile")


def _check_parts(cls: type[nn.Module], state: Mapping[str, object]) -> None:
    kinds = {"_parameters": nn.Parameter, "_buffers": torch.Tensor, "_modules": nn.Module}
    for key, kind in kinds.items():
        parts = state.get(key)
        if not isinstance(parts, dict):
            raise MalformedPickle(f"a {cls.__name__} has no {key}")
        for name, part in parts.items():
            if not isinstance(name, str) or not isinstance(part, kind | type(None)):
                raise MalformedPickle(f"a {cls.__name__} has something else among its {key}")
    for name in {*state["_parameters"], *state["_buffers"], *state["_modules"]}:  # type: ignore[misc]
        if hasattr(cls, name):
            raise MalformedPickle(f"a {cls.__name__} would replace its {name}")
