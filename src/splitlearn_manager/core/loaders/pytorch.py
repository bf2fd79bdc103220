"""Loads PyTorch files, told apart by their content: never by their name.

    module saved whole    its layers are torch.nn's own: rebuilt without running anything (module_builder)
    state dict            read in torch's mode that runs no code, into the module of `config.factory`
    safetensors           the same, read by our own reader
    TorchScript           its source is searched first (torchscript)
    torch.export          a program: only with `trusted: true`

With `trusted: true` a file that has more than that is unpickled as torch.save wrote it, whatever code that
runs (trusted_archive). All reading is into memory of our own; nothing is mapped.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from splitlearn_manager.core.loaders.file_format import FileFormat, corrupt, detect
from splitlearn_manager.core.loaders.hf_directory import first_line, refused_global
from splitlearn_manager.core.loaders.module_builder import read_module
from splitlearn_manager.core.loaders.module_records import MalformedPickle, RefusedGlobals
from splitlearn_manager.core.loaders.own_memory import StoredTensor, in_memory
from splitlearn_manager.core.loaders.safetensors_reader import SafetensorsFile
from splitlearn_manager.core.loaders.slots import Destination
from splitlearn_manager.core.loaders.state_dict import fill, needs_factory, unwrap
from splitlearn_manager.core.loaders.torch_archive import TorchArchive
from splitlearn_manager.core.loaders.torchscript import load_torchscript
from splitlearn_manager.core.loaders.trusted_archive import can_unpickle, unpickle
from splitlearn_manager.core.loaders.user_code import Built, FactoryCall
from splitlearn_manager.errors import InvalidModel, UntrustedCheckpoint
from splitlearn_manager.runtime.base import nothing_to_release

_TRUST = "write `trusted: true` for this model if you trust its author"
_SAVE = "save `model.state_dict()` and name the function that builds the module under `config: factory:`"
_OF_A_SCRIPT = "code of the script or notebook that saved it, which no other program can find"
_MAIN = "__main__"
_MAX_NAMES = 5


@dataclass(frozen=True)
class PytorchFile:
    """What is to be loaded: the file, whether it may run code, and the factory for a state dict.

    Weights are read to `destination` where the file's form permits it; the caller converts and moves
    the rest.
    """

    path: Path
    trusted: bool
    factory: FactoryCall | None
    destination: Destination = field(default_factory=Destination)


def load_pytorch(file: PytorchFile) -> Built:
    """The module of a file; the caller moves it to its device.

    Raises:
        WeightsNotFound: there is no such file.
        LoadError: it is cut off or damaged (reason `CorruptCheckpoint`), or the factory raised.
        InvalidModel: it holds no model that can be read, or weights that do not fit.
        UntrustedCheckpoint: loading would run code from it, and `trusted` is not set.
    """
    match detect(file.path):
        case FileFormat.SAFETENSORS:
            return _from_safetensors(file)
        case FileFormat.TORCHSCRIPT:
            return _whole(load_torchscript(file.path, trusted=file.trusted))
        case FileFormat.EXPORTED:
            return _whole(_load_exported(file))
        case FileFormat.TORCH_ZIP | FileFormat.TORCH_LEGACY | FileFormat.TORCH_TAR as kind:
            return _from_torch_save(file, kind)


def _whole(module: nn.Module) -> Built:
    return Built(module, nothing_to_release)


def _from_safetensors(file: PytorchFile) -> Built:
    if file.factory is None:
        raise needs_factory(file.path)
    with SafetensorsFile(file.path) as opened:
        return fill(file.path, file.factory, lambda: opened.tensors, file.destination)


def _from_torch_save(file: PytorchFile, kind: FileFormat) -> Built:
    if kind is FileFormat.TORCH_ZIP:
        if _names_layers(file) and (module := _read_module(file)) is not None:
            return _whole(module)
        if (built := _from_archive(file)) is not None:
            return built
    elif kind is FileFormat.TORCH_TAR and not file.trusted:
        raise _refusal(file.path, ("it is of a format that only plain unpickling can read",))
    loaded = _unpickle(file.path, weights_only=not file.trusted)
    if isinstance(loaded, nn.Module):
        return _whole(loaded)
    unwrap(file.path, loaded)
    if file.factory is None:
        raise needs_factory(file.path)
    found = [loaded]
    del loaded
    return fill(file.path, file.factory, lambda: _read_by_torch(file, found), file.destination)


def _from_archive(file: PytorchFile) -> Built | None:
    """A state dict, read from the archive tensor by tensor; None if torch has to read what is in it."""
    with TorchArchive(file.path) as archive:
        tensors = archive.state_dict()
        if tensors is None:
            return None
        if file.factory is None:
            raise needs_factory(file.path)
        return fill(file.path, file.factory, lambda: tensors, file.destination)


def _read_by_torch(file: PytorchFile, found: list[object]) -> dict[str, StoredTensor]:
    """The state dict of a file of another form, in memory; read anew for a second attempt."""
    loaded = found.pop() if found else _unpickle(file.path, weights_only=not file.trusted)
    return {name: in_memory(tensor) for name, tensor in unwrap(file.path, loaded).items()}


def _names_layers(file: PytorchFile) -> bool:
    """Whether the file's pickle names more than tensors: then it is a module, or something refused."""
    path = file.path
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except pickle.UnpicklingError as error:
        if file.trusted:
            return True
        raise _refusal(path, (f"its pickle cannot be checked: {first_line(error)}",)) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise corrupt(path, f"is cut off or damaged ({first_line(error)})") from error


def _read_module(file: PytorchFile) -> nn.Module | None:
    """The module, if it is made of torch's own layers; None if it is not and may be unpickled."""
    path = file.path
    try:
        return read_module(path, file.destination)
    except RefusedGlobals as error:
        if file.trusted:
            return None
        raise _refusal(path, error.names) from error
    except MalformedPickle as error:
        if file.trusted:
            return None
        raise InvalidModel(f"{path.name} is no module that can be rebuilt: {error}") from error


def _unpickle(path: Path, *, weights_only: bool) -> object:
    try:
        return _unpickled(path, weights_only)
    except pickle.UnpicklingError as error:
        if weights_only:
            raise _refusal(path, (refused_global(error),)) from error
        raise corrupt(path, f"is cut off or damaged ({first_line(error)})") from error
    except (ImportError, AttributeError) as error:
        raise _needs_code(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise corrupt(path, f"is cut off or damaged ({first_line(error)})") from error


def _unpickled(path: Path, weights_only: bool) -> object:
    if not weights_only and detect(path) is FileFormat.TORCH_ZIP:
        with TorchArchive(path) as archive:
            if can_unpickle(archive):
                return unpickle(archive)
    loaded: object = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=False)
    return loaded


def _needs_code(path: Path, error: ImportError | AttributeError) -> InvalidModel:
    """The error for a trusted file whose classes are not there."""
    # This process has a module of that name too, as `python -m …` names it: not that of the file.
    if f"{_MAIN}'" in str(error):
        return InvalidModel(f"{path.name} needs {_OF_A_SCRIPT}; {_SAVE}")
    return InvalidModel(
        f"{path.name} needs code that is not installed: {type(error).__name__}: {first_line(error)}; "
        f"install it, add its directory to the PYTHONPATH of the node, or {_SAVE}"
    )


def _refusal(path: Path, names: tuple[str, ...]) -> UntrustedCheckpoint:
    rest = len(names) - _MAX_NAMES
    listed = ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
    would = f"{path.name} would run code while it is loaded ({listed})"
    if any(name.startswith(f"{_MAIN}.") for name in names):
        return UntrustedCheckpoint(f"{would}: {_OF_A_SCRIPT}; {_SAVE}")
    return UntrustedCheckpoint(f"{would}. Either {_TRUST}, or {_SAVE}")


def _load_exported(file: PytorchFile) -> nn.Module:
    if not file.trusted:
        # torch.export.load unpickles example inputs without restriction, evaluates the text of
        # shape expressions, and looks up by name the functions that the graph calls.
        raise UntrustedCheckpoint(
            f"{file.path.name} is a program of torch.export, and loading one can run code that it carries. "
            f"Either {_TRUST}, or {_SAVE}"
        )
    with file.path.open("rb") as opened:
        try:
            program = torch.export.load(opened)
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise InvalidModel(
                f"{file.path.name}: torch cannot load this program: {first_line(error)}"
            ) from error
    if file.destination.device != "cpu":
        program = move_to_device_pass(program, file.destination.device)
    return _Program(program.module(), program.example_inputs)


class _Program(nn.Module):
    """A program of torch.export, whose graph has one mode and refuses to be told another."""

    def __init__(
        self, graph: nn.Module, examples: tuple[tuple[object, ...], object] | None
    ) -> None:
        super().__init__()
        self.graph = graph
        first = examples[0][0] if examples and examples[0] else None
        self.example_shapes = (tuple(first.shape),) if isinstance(first, torch.Tensor) else ()

    def forward(self, *args: object, **kwargs: object) -> object:
        """As the program was exported."""
        return self.graph(*args, **kwargs)

    def train(self, mode: bool = True) -> _Program:
        """Nothing changes."""
        return self
