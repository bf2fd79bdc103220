"""Finds and calls factories: the functions in users' own modules that build an `nn.Module`.

A module beside the YAML file or in the working directory is run afresh for each load, in a package of its
own that nobody else can see (`SourceTree`). So a changed file takes effect, two directories may have modules
of the same name, and what a module imports from its own directory is loaded afresh too, from that directory.
No compiled files are written or read: they are told apart by whole seconds, and so would miss a quick change.
An installed module is imported as usual.

Whatever the user's code raises, an exit of the interpreter included, ends this load and nothing else; the
error says what was raised, and in which line of the user's code.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from splitlearn_manager.core.loaders.building import BUILD_GATE
from splitlearn_manager.core.loaders.source_tree import SourceTree
from splitlearn_manager.errors import InvalidModel, LoadError


@dataclass(frozen=True)
class FactoryCall:
    """A factory and how it is called.

    Attributes:
        module, attribute: `module:attribute` as the config names it.
        module_file: its file; None for a module without one.
        roots: directories whose modules are run afresh, in the order of the search.
        kwargs: keyword arguments; `device` is added if the factory has a parameter of that name.
    """

    module: str
    attribute: str
    module_file: Path | None
    roots: tuple[Path, ...]
    kwargs: Mapping[str, object]
    device: str

    @property
    def name(self) -> str:
        return f"{self.module}:{self.attribute}"


@dataclass(frozen=True)
class Built:
    """What a factory gave. `release` forgets the user's modules; call it once the model is gone."""

    module: nn.Module
    release: Callable[[], None]


def build(call: FactoryCall, around: AbstractContextManager[object] | None = None) -> Built:
    """Call the factory.

    Args:
        around: entered while the factory runs; not while its module is imported.

    Raises:
        LoadError: the user's code raised; trying again may help.
        InvalidModel: there is no such factory, it cannot be called like that, or it does not return
            an nn.Module.
    """
    tree = _source_tree(call)
    release = tree.forget if tree is not None else _nothing
    try:
        with BUILD_GATE.factory():
            module = _import(call, tree)
            factory = _factory(call, module)
            arguments = _arguments(call, factory)
            with around or nullcontext():
                built = factory(**arguments)
        if not isinstance(built, nn.Module):
            raise InvalidModel(
                f"{call.name} returned {_described(built)}; a factory must return a torch.nn.Module"
            )
    except LoadError:
        release()
        raise
    except BaseException as error:
        release()
        raise LoadError(f"{call.name} raised {user_error(error, call)}") from error
    return Built(built, release)


def user_error(error: BaseException, call: FactoryCall) -> str:
    """`TypeError: message (file.py:12)`, the line being the innermost one of the user's own code."""
    text = str(error).strip()
    what = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _is_own(Path(f.filename), call.roots)]
    if call.module_file is not None:
        own = own or [f for f in frames if f.filename == str(call.module_file)]
    return f"{what} ({own[-1].filename}:{own[-1].lineno})" if own else what


def _is_own(file: Path, roots: tuple[Path, ...]) -> bool:
    """Whether a frame's file is the user's: a virtual environment below a root is not, nor are we."""
    if file.is_relative_to(Path(__file__).parents[2]) or "site-packages" in file.parts:
        return False
    return any(file.is_relative_to(root) for root in roots)


def _source_tree(call: FactoryCall) -> SourceTree | None:
    """The tree that the module is run in, or None for an installed one."""
    if call.module_file is None:
        return None
    parts = call.module.split(".")
    for root in call.roots:
        below = root.joinpath(*parts)
        if call.module_file in (below / "__init__.py", below.with_name(below.name + ".py")):
            return SourceTree(root)
    return None


def _import(call: FactoryCall, tree: SourceTree | None) -> ModuleType:
    if tree is not None:
        return tree.load(call.module)
    importlib.invalidate_caches()
    return importlib.import_module(call.module)


def _factory(call: FactoryCall, module: ModuleType) -> Callable[..., object]:
    factory = getattr(module, call.attribute, None)
    if callable(factory):
        return factory  # type: ignore[no-any-return]
    if factory is not None:
        raise InvalidModel(f"{call.name} is {_described(factory)}, which cannot be called")
    names = sorted(
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and _defined_in(value, module)
    )
    has = f"it has {', '.join(names[:8])}" if names else "it defines no function or class"
    raise InvalidModel(f"module {call.module} has no {call.attribute!r}; {has}")


def _defined_in(value: object, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _arguments(call: FactoryCall, factory: Callable[..., object]) -> dict[str, object]:
    arguments = dict(call.kwargs)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return arguments
    if "device" in signature.parameters and "device" not in arguments:
        arguments["device"] = call.device
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InvalidModel(
            f"{call.name}{signature} cannot be called with config.kwargs {sorted(call.kwargs)}: {error}"
        ) from error
    return arguments


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _nothing() -> None:
    """An installed module stays imported."""
