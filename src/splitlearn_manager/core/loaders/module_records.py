"""Reads the pickle inside a torch.save archive into inert records, and runs nothing while it does so.

A pickle is a program: it names functions and has them called. This reader has a small table of the names
that it knows. Of the classes of `torch.nn` it makes records (`ModuleRecord`), never instances; the few
functions that describe tensors make records too (`TensorRecord`, `StorageRecord`); no other call exists.
A name that is not in the table ends the reading with `RefusedGlobals`.

torch's own `weights_only` mode is not used for whole modules, because there the classes of `torch.nn` would
have to be allowed for the whole process, and a file could then call them, and set attributes of them, with
any arguments. It is used for state dicts, which need no such names (see `pytorch.py`).

What the records say is checked and made into modules by `module_builder`.
"""

from __future__ import annotations

import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from splitlearn_manager.core.loaders.torch_archive import STORAGE_DTYPES

_ACTIVATIONS = (
    "relu",
    "relu6",
    "gelu",
    "silu",
    "mish",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "softplus",
    "softsign",
    "logsigmoid",
    "tanh",
    "sigmoid",
    "tanhshrink",
)


class RefusedGlobals(Exception):
    """The pickle names something that it may not; `names` are dotted."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class MalformedPickle(Exception):
    """The pickle is no module that torch.save has written; the message says why."""


@dataclass(frozen=True, eq=False)
class ClassName:
    """A class of torch.nn, named by the pickle."""

    cls: type[nn.Module]


@dataclass(frozen=True, eq=False)
class FunctionName:
    """An activation function, named by the pickle; modules hold it as an attribute."""

    function: Callable[..., object]


@dataclass(frozen=True, eq=False)
class DtypeName:
    """A dtype, named by itself or as the class of a storage."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class _Maker:
    """One of the calls that exist: it makes a record or an empty container of its arguments."""

    make: Callable[..., object]


@dataclass(frozen=True, eq=False)
class StorageRecord:
    """`numel` elements of `dtype` in the archive's member `data/KEY`."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A strided view of a storage; offset and strides count elements."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


@dataclass(frozen=True, eq=False)
class ParameterRecord:
    """An `nn.Parameter`."""

    data: TensorRecord
    requires_grad: bool


@dataclass(eq=False)
class ModuleRecord:
    """A module: its class, and its `__dict__` with records for what is not plain data."""

    cls: type[nn.Module]
    state: dict[str, object] = field(default_factory=dict)


def read_records(pickled: bytes) -> object:
    """The outermost record (or plain value) of a pickle.

    Raises:
        RefusedGlobals: it names something outside the table.
        MalformedPickle: it is cut off, or does what no pickle of a module does.
    """
    table = known_globals()
    machine = _Machine(table)
    try:
        operations = [(op.name, argument) for op, argument, _ in pickletools.genops(pickled)]
        named = {_dotted(str(argument)) for name, argument in operations if name == "GLOBAL"}
        if refused := named - table.keys():
            raise RefusedGlobals(tuple(sorted(refused)))
        for name, argument in operations:
            machine.step(name, argument)
        return machine.result()
    except (RefusedGlobals, MalformedPickle):
        raise
    except Exception as error:
        # A stack machine meets operands of the wrong kind in many ways; all mean the same here.
        raise MalformedPickle(f"{type(error).__name__}: {error}") from error


def known_globals() -> Mapping[str, object]:
    """The table: every dotted name that a module's pickle may contain, and what it stands for."""
    table: dict[str, object] = {
        "collections.OrderedDict": _Maker(_ordered_dict),
        "builtins.set": _Maker(_set),
        "torch.Size": _Maker(_size),
        "torch._utils._rebuild_tensor_v2": _Maker(_tensor),
        "torch._utils._rebuild_parameter": _Maker(_parameter),
    }
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            table[f"torch.{name}"] = DtypeName(value)
            table[str(value)] = DtypeName(value)
    for name, dtype in STORAGE_DTYPES.items():
        table[f"torch.{name}Storage"] = DtypeName(dtype)
    for name in _ACTIVATIONS:
        function = getattr(torch.nn.functional, name)
        table[f"{function.__module__}.{function.__qualname__}"] = FunctionName(function)
        table[f"torch.nn.functional.{name}"] = FunctionName(function)
    table["torch._C._nn.gelu"] = FunctionName(torch.nn.functional.gelu)
    table |= {f"{cls.__module__}.{cls.__qualname__}": ClassName(cls) for cls in module_classes()}
    return table


def module_classes() -> tuple[type[nn.Module], ...]:
    """The layers that torch itself defines, without the lazy ones, whose class changes when they run.

    While torch traces a module it makes classes of its own that go by the names of its layers.
    """
    found: dict[type[nn.Module], None] = {}
    pending: list[type[nn.Module]] = [nn.Module]
    while pending:
        cls = pending.pop()
        if (
            cls not in found
            and cls.__module__.startswith("torch.nn.modules.")
            and _is_at_its_name(cls)
        ):
            found[cls] = None
            pending.extend(cls.__subclasses__())
    return tuple(cls for cls in found if "Lazy" not in cls.__name__)


def _is_at_its_name(cls: type) -> bool:
    return getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls


def _ordered_dict() -> OrderedDict[object, object]:
    # Never with arguments: torch.save fills it item by item.
    return OrderedDict()


def _set(items: list[object]) -> set[object]:
    if not all(isinstance(item, str) for item in items):
        raise MalformedPickle("a set of something other than names")
    return set(items)


def _size(items: tuple[int, ...]) -> tuple[int, ...]:
    return torch.Size(_sizes(items))


def _sizes(value: object) -> tuple[int, ...]:
    if isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value):
        return value
    raise MalformedPickle("a size, stride or offset that is no whole number ≥ 0")


def _tensor(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object,
    backward_hooks: object,
    metadata: object = None,
) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or backward_hooks or metadata:
        raise MalformedPickle("a tensor with something other than data")
    sizes, strides = _sizes(size), _sizes(stride)
    if len(sizes) != len(strides):
        raise MalformedPickle("a tensor with more sizes than strides")
    return TensorRecord(storage, _sizes((offset,))[0], sizes, strides, requires_grad is True)


def _parameter(data: object, requires_grad: object, backward_hooks: object) -> ParameterRecord:
    if not isinstance(data, TensorRecord) or backward_hooks:
        raise MalformedPickle("a parameter with something other than data")
    return ParameterRecord(data, requires_grad is True)


class _Machine:
    """The stack machine of pickle protocol 2, with the operations that torch.save writes.

    Python's own machines are not used: there, a file can call what it has got hold of.
    """

    def __init__(self, table: Mapping[str, object]) -> None:
        self._table = table
        self._stack: list[object] = []
        self._outer: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def result(self) -> object:
        if len(self._stack) != 1 or self._outer:
            raise MalformedPickle("values are left over at its end")
        return self._stack[0]

    def step(self, operation: str, argument: object) -> None:
        """Carry out one operation; `argument` is what stands behind it in the file."""
        match operation:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self._stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                self._stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "GLOBAL":
                self._stack.append(self._table[_dotted(str(argument))])
            case "BINPERSID":
                self._stack.append(_storage(self._stack.pop()))
            case "NEWOBJ" | "REDUCE" | "BUILD":
                self._make(operation)
            case _:
                self._collect(operation)

    def _collect(self, operation: str) -> None:
        stack = self._stack
        match operation:
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"T": (), "L": [], "D": {}, "S": set()}[operation[6]])
            case "TUPLE":
                self._stack = self._outer.pop()
                self._stack.append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "APPENDS":
                self._stack = self._outer.pop()
                _extend(self._stack[-1], stack)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                self._stack = self._outer.pop()
                _update(self._stack[-1], stack)
            case _:
                raise MalformedPickle(f"the operation {operation}, which torch.save does not write")

    def _make(self, operation: str) -> None:
        argument, subject = self._stack.pop(), self._stack.pop()
        match operation, subject, argument:
            case "NEWOBJ", ClassName(cls), ():
                self._stack.append(ModuleRecord(cls))
            case "REDUCE", _Maker(make), tuple():
                self._stack.append(make(*argument))
            case "BUILD", ModuleRecord(_, state), dict() if not state:
                if not all(isinstance(key, str) for key in argument):
                    raise MalformedPickle("a module has an attribute whose name is no text")
                state.update(argument)
                self._stack.append(subject)
            case _:
                raise MalformedPickle("an object that is made in another way than a module is")


def _dotted(module_and_name: str) -> str:
    module, _, name = module_and_name.partition(" ")
    # Protocol 2 writes the Python 2 name of this module.
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


def _extend(target: object, items: list[object]) -> None:
    if type(target) is not list:
        raise MalformedPickle("items for something other than a list")
    target.extend(items)


def _update(target: object, keys_and_values: list[object]) -> None:
    if not isinstance(target, dict) or len(keys_and_values) % 2:
        raise MalformedPickle("items for something other than a dict")
    target.update(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))


def _storage(pid: object) -> StorageRecord:
    match pid:
        case ("storage", DtypeName(dtype), str(key), str(), int(numel)) if numel >= 0:
            return StorageRecord(dtype, key, numel)
    raise MalformedPickle("a reference to something other than a tensor's data")
