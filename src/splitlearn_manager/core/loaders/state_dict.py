"""Fills a module, built by the user's factory, with the weights of a file that holds nothing else.

The names must match exactly, and so must the shapes: a module with some weights left at random would serve
wrong answers. Every weight is copied into the module as the factory made it, so the module's own dtypes hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.config.archive_size import state_dict_in
from splitlearn_manager.core.loaders.user_code import Built, FactoryCall, build
from splitlearn_manager.errors import InvalidModel

_BATCH_BYTES = 64 * 2**20
_LISTED = 5


def unwrap(path: Path, loaded: object) -> Mapping[str, torch.Tensor]:
    """The state dict in what a file holds: the whole of it, or its entry `state_dict` or the like.

    Raises:
        InvalidModel: there is none.
    """
    found = state_dict_in(loaded, lambda value: isinstance(value, torch.Tensor))
    if found is not None:
        return found
    if isinstance(loaded, Mapping):
        keys = ", ".join(repr(key) for key in list(loaded)[:_LISTED])
        raise InvalidModel(
            f"{path.name} holds a dict (with the keys {keys}) in which no state dict is found; "
            "save `model.state_dict()`"
        )
    raise InvalidModel(
        f"{path.name} holds a {type(loaded).__name__}; expected a module or a state dict"
    )


def needs_factory(path: Path) -> InvalidModel:
    """The error for a state dict without a factory."""
    return InvalidModel(
        f"{path.name} holds weights without the module they belong to; name the function that builds it, "
        "`factory: package.module:function` under `config:`"
    )


def fill(
    path: Path,
    call: FactoryCall,
    names: Iterable[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Built:
    """Build the module and copy `tensors` into it, a few at a time.

    Args:
        names: of all tensors; compared before any is read.
        tensors: read while they are copied, so that the weights are not in memory twice.

    Raises:
        InvalidModel: names or shapes differ from the module's.
        LoadError: the factory raised, or reading failed.
    """
    built = build(call)
    try:
        _check_names(path, call, set(built.module.state_dict()), set(names))
        for batch in _batches(tensors):
            _copy(path, built.module, batch)
    except BaseException:
        built.release()
        raise
    return built


def _check_names(path: Path, call: FactoryCall, wanted: set[str], found: set[str]) -> None:
    if wanted == found:
        return
    parts = []
    if wanted - found:
        parts.append(f"missing: {_some(wanted - found)}")
    if found - wanted:
        parts.append(f"unexpected: {_some(found - wanted)}")
    raise InvalidModel(f"{path.name} does not fit the module of {call.name} ({'; '.join(parts)})")


def _some(names: set[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(sorted(names)[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _batches(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Groups, because each call of load_state_dict walks the whole module."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        batch[name] = tensor
        size += tensor.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _copy(path: Path, module: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    try:
        module.load_state_dict(batch, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = next((line for line in lines if "mismatch" in line), lines[-1])
        raise InvalidModel(f"{path.name}: {detail}") from error
