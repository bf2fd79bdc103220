"""Reads a directory in the Hugging Face layout: what its config.json asks for, and its weights.

It decides which class of transformers stands for the model, refuses what an untrusted directory may not have
(Python code of its own, code to be fetched from the hub), and reads the weights as a state dict in memory of
our own. It builds nothing.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from splitlearn_manager.core.loaders.file_format import archive_members, corrupt
from splitlearn_manager.core.loaders.own_memory import StoredTensor, in_memory
from splitlearn_manager.core.loaders.safetensors_reader import read_all
from splitlearn_manager.core.loaders.torch_archive import TorchArchive
from splitlearn_manager.errors import (
    InvalidModel,
    LoadError,
    UntrustedCheckpoint,
    WeightsNotFound,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
_INDEX = ".index.json"
_IMPLEMENTATION_KEYS = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
    }
)


def read_json(path: Path) -> dict[str, object]:
    """A JSON file that holds a map.

    Raises:
        WeightsNotFound: there is no such file.
        LoadError: it is cut off or damaged (reason `CorruptCheckpoint`).
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsNotFound(f"{path} is missing") from None
    except OSError as error:
        raise WeightsNotFound(
            f"{path} cannot be read: {error.strerror}", reason="WeightsUnreadable"
        ) from error
    except ValueError as error:
        raise corrupt(path, f"is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path}: expected a map, got a {type(value).__name__}")
    return value


def read_config(directory: Path, *, trusted: bool) -> PreTrainedConfig:
    """The model's configuration; unless `trusted`, one that runs nobody's code.

    Raises:
        UntrustedCheckpoint: it names code of its own, or code on the hub, and `trusted` is not set.
        InvalidModel: transformers does not know such a model.
        LoadError: config.json is cut off or damaged (reason `CorruptCheckpoint`).
    """
    from transformers import AutoConfig

    text = read_json(directory / "config.json")
    if not trusted:
        _refuse_code(directory, text)
    try:
        config = AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trusted
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(
            f"{directory / 'config.json'}: transformers cannot read it: {first_line(error)}"
        ) from error
    return config  # type: ignore[no-any-return]


def _refuse_code(directory: Path, text: Mapping[str, object]) -> None:
    way_out = "if you trust its author, write `trusted: true` for this model"
    if text.get("auto_map"):
        raise UntrustedCheckpoint(
            f"{directory / 'config.json'} has an auto_map: the model is Python code of its own; {way_out}"
        )
    for key, value in _strings(text):
        if key in _IMPLEMENTATION_KEYS and "/" in value:
            raise UntrustedCheckpoint(
                f"{directory / 'config.json'}: {key} names code on the hub ({value}); {way_out}"
            )


def _strings(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in nested maps and lists, each with the key nearest to it that is of a map."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, key if key in _IMPLEMENTATION_KEYS else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def model_class(
    directory: Path, config: PreTrainedConfig, auto_class: str | None, *, trusted: bool
) -> type[PreTrainedModel]:
    """The class that the weights are for: by `auto_class`, else by `architectures` in config.json.

    Raises:
        InvalidModel: there is no such class, or it is not made for this kind of model.
    """
    import transformers

    auto_map: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    names = [auto_class] if auto_class else [n for n in auto_map if n.startswith("AutoModel")]
    remote = next((auto_map[name] for name in names if name in auto_map), None)
    if trusted and remote is not None:
        return _remote_class(directory, remote)
    if auto_class is None:
        for architecture in getattr(config, "architectures", None) or ():
            cls = getattr(transformers, str(architecture), None)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                return cls
    name = auto_class or "AutoModel"
    mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
    if mapping is None:
        raise InvalidModel(f"config.auto_class: transformers has no class {name}")
    if type(config) not in mapping:
        raise InvalidModel(f"{name} knows no model of the type {config.model_type!r}")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _remote_class(directory: Path, reference: str) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
    except BaseException as error:
        raise LoadError(
            f"{directory}: {reference} raised {type(error).__name__}: {first_line(error)}"
        ) from error


def read_weights(
    directory: Path, read: Callable[[StoredTensor], torch.Tensor], *, trusted: bool
) -> dict[str, torch.Tensor]:
    """The weights as a state dict.

    Args:
        read: gives a stored tensor its memory.

    Raises:
        WeightsNotFound: there are none (yet), or a part of them is missing.
        LoadError: a file is cut off or damaged (reason `CorruptCheckpoint`).
        UntrustedCheckpoint: a pytorch_model.bin holds something other than weights, and `trusted` is not set.
    """
    if files := _weights_files(directory, SAFETENSORS):
        return read_all(files, read)
    if files := _weights_files(directory, TORCH_BIN):
        weights: dict[str, torch.Tensor] = {}
        for path in files:
            weights |= read_torch_weights(path, read, trusted=trusted)
        return weights
    raise WeightsNotFound(f"{directory} has no {SAFETENSORS} and no {TORCH_BIN}")


def _weights_files(directory: Path, name: str) -> list[Path]:
    single, index = directory / name, directory / f"{name}{_INDEX}"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict):
        raise InvalidModel(f"{index} has no weight_map")
    names = sorted({str(part) for part in mapping.values()})
    for part in names:
        if Path(part).name != part:
            raise InvalidModel(f"{index} names {part!r}, which is not a file beside it")
        if not (directory / part).is_file():
            raise WeightsNotFound(f"{directory / part} is missing, which {index.name} names")
    return [directory / part for part in names]


def read_torch_weights(
    path: Path, read: Callable[[StoredTensor], torch.Tensor], *, trusted: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote; unless `trusted`, read without running any code."""
    try:
        weights = _read_archive(path, read)
        if weights is not None:
            return weights
        loaded = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=False)
    except pickle.UnpicklingError as error:
        raise UntrustedCheckpoint(
            f"{path.name} holds something other than weights, which could be code to run "
            f"({refused_global(error)}); save the model as safetensors, or write `trusted: true` for it "
            "if you trust its author"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise corrupt(path, f"is cut off or damaged ({first_line(error)})") from error
    if not isinstance(loaded, dict):
        raise InvalidModel(f"{path.name} holds a {type(loaded).__name__}; expected a state dict")
    found: dict[str, torch.Tensor] = {}
    while loaded:
        name, value = loaded.popitem()
        if isinstance(value, torch.Tensor):
            found[str(name)] = read(in_memory(value))
    return found


def _read_archive(
    path: Path, read: Callable[[StoredTensor], torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The tensors of an archive that holds nothing else, each storage read once; None for any other file."""
    if not zipfile.is_zipfile(path) or torch.serialization.get_unsafe_globals_in_checkpoint(path):
        return None
    archive_members(path)
    with TorchArchive(path) as archive:
        tensors = archive.state_dict()
        if tensors is None:
            return None
        made: dict[int, torch.Tensor] = {}
        for stored in tensors.values():
            if id(stored) not in made:
                made[id(stored)] = read(stored)
        return {name: made[id(stored)] for name, stored in tensors.items()}


def refused_global(error: Exception) -> str:
    """The name that torch's message says it refused, else what it says was wrong."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return found[1]
    found = re.search(r"WeightsUnpickler error: *(.+)", text)
    return found[1] if found else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
