"""Fills a module, built by the user's factory, with the weights of a file that holds nothing else.

The names must match exactly, and so must the shapes: a module with some weights left at random would serve
wrong answers. Of tied weights one name is enough: safetensors writes no more. The module's own dtypes hold,
unless the config asks for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.config.archive_pickle import state_dict_in
from splitlearn_manager.core.loaders.own_memory import StoredTensor, read_tensor
from splitlearn_manager.core.loaders.slots import (
    Destination,
    SlotsAliased,
    direct_slots,
    fill_at,
    fill_in_place,
    mismatch,
)
from splitlearn_manager.core.loaders.unfilled import Unfilled
from splitlearn_manager.core.loaders.user_code import Built, FactoryCall, build
from splitlearn_manager.errors import InvalidModel, LoadError

_BATCH_BYTES = 4 * 2**20
_LISTED = 5
_WRAPPERS = {"module.": "(Distributed)DataParallel model", "_orig_mod.": "compiled model"}


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
    weights: Callable[[], Mapping[str, StoredTensor]],
    destination: Destination,
) -> Built:
    """Build the module and read the weights into it.

    They are read to where they are to be, as what they are to be, one at a time: besides the module there is
    never more in memory than a few MB. A factory is called twice where its module cannot be built without
    values (see `unfilled`); then, and with modules that have ways of loading of their own, what is left to
    convert or to move is the caller's.

    Args:
        weights: the tensors of the file; asked again for a second attempt.

    Raises:
        InvalidModel: names or shapes differ from the module's; compared before any weights are read.
        LoadError: the factory raised, or reading failed.
    """
    built = _built_without_values(call)
    if built is not None:
        try:
            tensors = weights()
            _check_fit(path, call, built.module, tensors)
            fill_at(built.module, direct_slots(built.module) or (), tensors, destination)
            return built
        except SlotsAliased:
            built.release()
        except BaseException:
            built.release()
            raise
    built = build(call)
    try:
        tensors = weights()
        _check_fit(path, call, built.module, tensors)
        slots = direct_slots(built.module)
        if slots is not None:
            fill_in_place(slots, tensors)
        else:
            for batch in _batches(tensors):
                _copy(path, built.module, batch)
    except BaseException:
        built.release()
        raise
    return built


def _built_without_values(call: FactoryCall) -> Built | None:
    """The module without values for all that will be filled; None if it must be built in the usual way."""
    unfilled = Unfilled()
    try:
        built = build(call, unfilled)
    except LoadError:
        if unfilled.skipped:
            return None
        raise
    slots = direct_slots(built.module)
    if slots is not None and unfilled.covers(slot.tensor for slot in slots):
        return built
    built.release()
    return None


def _check_fit(
    path: Path, call: FactoryCall, module: nn.Module, tensors: Mapping[str, StoredTensor]
) -> None:
    slots, found = direct_slots(module) or (), set(tensors)
    tied = {name for slot in slots if not found.isdisjoint(slot.names) for name in slot.names}
    _check_names(path, call, set(module.state_dict()) - (tied - found), found)
    if problem := mismatch(slots, tensors):
        raise InvalidModel(f"{path.name}: {problem}")


def _check_names(path: Path, call: FactoryCall, wanted: set[str], found: set[str]) -> None:
    if wanted == found:
        return
    parts = []
    if wanted - found:
        parts.append(f"missing: {_some(wanted - found)}")
    if found - wanted:
        parts.append(f"unexpected: {_some(found - wanted)}")
    raise InvalidModel(
        f"{path.name} does not fit the module of {call.name} ({'; '.join(parts)}){_wrapped(wanted, found)}"
    )


def _wrapped(wanted: set[str], found: set[str]) -> str:
    """What helps where the weights are right, and were saved through a wrapper that renames them."""
    for prefix, wrapper in _WRAPPERS.items():
        if {name.removeprefix(prefix) for name in found} == wanted:
            attribute = prefix.removesuffix(".")
            return f"; it was saved from a {wrapper}: save `model.{attribute}.state_dict()`"
    return ""


def _some(names: set[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(sorted(names)[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _batches(tensors: Mapping[str, StoredTensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Groups, because each call of load_state_dict walks the whole module."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, stored in tensors.items():
        batch[name] = read_tensor(stored)
        size += batch[name].nbytes
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
