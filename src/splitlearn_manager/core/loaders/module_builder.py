"""Makes modules of the records that `module_records` has read, and checks each record while it does so.

A record may be anything that the file's author wished, so nothing of it is believed: a tensor must lie inside
its storage, a storage must be as long as its member in the archive, a module must consist of parameters,
buffers, modules and plain values. What could change how a module *behaves* is refused: hooks, and attributes
that would take the place of a method (`forward` above all).

Modules are made without calling their constructors, as unpickling does; tensors get memory of their own.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.core.loaders.file_format import archive_members, corrupt
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
_MAX_PICKLE_BYTES = 256 * 2**20


def read_module(path: Path) -> nn.Module:
    """The module that torch.save wrote whole to `path`, on the CPU.

    Raises:
        RefusedGlobals: it has classes or functions other than torch's own layers.
        MalformedPickle: it is no module, or not one that torch.save writes.
        LoadError: the archive is cut off or damaged (reason `CorruptCheckpoint`).
    """
    members = archive_members(path)
    root = next(name for name in members if name.endswith("/data.pkl")).rpartition("/")[0]
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(f"{root}/data.pkl").file_size > _MAX_PICKLE_BYTES:
                raise MalformedPickle("its description is larger than any module needs")
            record = read_records(archive.read(f"{root}/data.pkl"))
            if not isinstance(record, ModuleRecord):
                raise MalformedPickle(f"it holds {_kind(record)}, not a module")
            if f"{root}/byteorder" in members and archive.read(f"{root}/byteorder") != b"little":
                raise MalformedPickle("it was written on a big-endian machine")
            return _Builder(archive, root).module(record)
    except RecursionError as error:
        raise MalformedPickle("its modules are nested without end") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError) as error:
        raise corrupt(path, f"is cut off or damaged ({error})") from error


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, list(value)[:5]))}"
    return f"a {type(value).__name__.removesuffix('Record').lower()}"


class _Builder:
    """Makes each record once, so that what is shared in the file is shared in memory."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive = archive
        self._root = root
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
        size = record.numel * record.dtype.itemsize
        raw = self._storages.get(record.key)
        if raw is None:
            name = f"{self._root}/data/{record.key}"
            if name not in self._archive.namelist():
                raise MalformedPickle(f"its member {name} is missing")
            if self._archive.getinfo(name).file_size != size:
                raise MalformedPickle(f"its member {name} is not as long as its tensors say")
            raw = torch.empty(size, dtype=torch.uint8)
            if size:
                _read_into(self._archive, name, memoryview(raw.numpy().data))
            self._storages[record.key] = raw
        if raw.numel() != size:
            raise MalformedPickle("two tensors disagree about their common data")
        return raw.view(record.dtype)


def _read_into(archive: zipfile.ZipFile, name: str, target: memoryview) -> None:
    with archive.open(name) as member:
        done = 0
        while done < len(target):
            chunk = member.read(min(len(target) - done, 16 * 2**20))
            if not chunk:
                raise EOFError(f"{name} ends too early")
            target[done : done + len(chunk)] = chunk
            done += len(chunk)
        # Reading on to the end makes zipfile compare the checksum.
        member.read(1)


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
