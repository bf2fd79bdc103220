"""The places of a module's weights, and how each is filled from a file.

A slot is one parameter or buffer, under all the names that it has: tied weights are one slot. Weights are
written into the memory that the module has for them. Where they are to have another dtype or device than the
module made, or another model in memory has the same ones, the slot gets other memory first; the parameter
stays the same object, so that all who refer to it see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from splitlearn_manager.core.loaders.own_memory import (
    InMemory,
    StoredTensor,
    empty,
    expect_writes,
    fill,
    watch_storage,
)
from splitlearn_manager.core.loaders.sharing import Borrower, never_writes


class SlotsAliased(Exception):
    """The module has further views of its weights, which would not see the new memory."""


@dataclass(frozen=True)
class Destination:
    """Where weights are to be, and as what.

    Attributes:
        dtype: of floating-point weights; None: as the module has them.
        borrower: finds what others have in memory already; None: nothing is shared.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    borrower: Borrower | None = None


@dataclass(frozen=True)
class Slot:
    """Attributes: the parameter or buffer, and its names in the state dict."""

    tensor: torch.Tensor
    names: tuple[str, ...]


def direct_slots(module: nn.Module) -> tuple[Slot, ...] | None:
    """All that is in the module's state dict, as slots; None if modules have ways of loading of their own."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        if not _loads_plainly(part):
            return None
        kept = (name for name in part._buffers if name not in part._non_persistent_buffers_set)
        for name in (*part._parameters, *kept):
            tensor = part._parameters.get(name, part._buffers.get(name))
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_meta or tensor.layout is not torch.strided:
                return None
            names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
            tensors[id(tensor)] = tensor
    return tuple(Slot(tensors[key], tuple(names[key])) for key in tensors)


_PLAIN = (torch.Tensor, nn.Parameter, *((nn.Buffer,) if hasattr(nn, "Buffer") else ()))
_LOADING_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_LOADING_METHODS = (
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)


def _loads_plainly(part: nn.Module) -> bool:
    if any(getattr(part, hooks, None) for hooks in _LOADING_HOOKS):
        return False
    # Batch norm's own way only adds what checkpoints of old lack, and ours must have every name.
    plain: type[nn.Module] = _NORM if isinstance(part, _NORM) else nn.Module
    return all(
        getattr(type(part), method) in (getattr(nn.Module, method), getattr(plain, method))
        for method in _LOADING_METHODS
    )


_NORM = nn.modules.batchnorm._NormBase


def mismatch(slots: Iterable[Slot], tensors: Mapping[str, StoredTensor]) -> str | None:
    """What is wrong if a stored tensor has not its slot's shape, in torch's words."""
    for slot in slots:
        for name in (name for name in slot.names if name in tensors):
            found, wanted = tensors[name].shape, tuple(slot.tensor.shape)
            if found != wanted and not (found == (1,) and wanted == ()):
                return (
                    f"size mismatch for {name}: the file has {list(found)}, "
                    f"the module {list(wanted)}"
                )
    return None


def fill_in_place(slots: Iterable[Slot], tensors: Mapping[str, StoredTensor]) -> None:
    """Write the weights where the module has them, as what it has them."""
    order = _order(tensors)
    for slot in slots:
        fill(slot.tensor, _stored(slot, tensors, order))


def fill_at(
    module: nn.Module,
    slots: Iterable[Slot],
    tensors: Mapping[str, StoredTensor],
    destination: Destination,
) -> None:
    """Write the weights where they are to be, as what they are to be; the rest of the module stays.

    Raises:
        SlotsAliased: the module cannot be filled like that, and is of no use any more.
        LoadError: reading failed.
    """
    slots, order = tuple(slots), _order(tensors)
    borrower = destination.borrower if never_writes(module) else None
    of_storage = Counter(_storage(slot.tensor).data_ptr() for slot in slots)
    replaced: list[Callable[[], bool]] = []
    for slot in slots:
        stored, tensor = _stored(slot, tensors, order), slot.tensor
        dtype = _final_dtype(tensor, destination)
        via = tensor.dtype if tensor.dtype is not dtype else None
        alone = of_storage[_storage(tensor).data_ptr()] == 1
        twin = None
        if borrower and alone and isinstance(tensor, nn.Parameter) and tensor.is_contiguous():
            twin = borrower.equal_to(stored, dtype, via)
        if twin is not None:
            replaced.append(_replace(tensor, twin))
        elif alone and (read := _read_already(stored, tensor, dtype, destination)) is not None:
            replaced.append(_replace(tensor, read))
        elif alone and (dtype is not tensor.dtype or _elsewhere(tensor, destination)):
            new = empty(tensor.shape, dtype, destination.device)
            replaced.append(_replace(tensor, new))
            fill(tensor, stored, via)
        else:
            expect_writes(tensor)
            fill(tensor, stored)
    if not all(is_freed() for is_freed in replaced):
        raise SlotsAliased


def _order(tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    return {name: place for place, name in enumerate(tensors)}


def _stored(
    slot: Slot, tensors: Mapping[str, StoredTensor], order: Mapping[str, int]
) -> StoredTensor:
    # Of tied weights that a file has several times, the last one counts; it need not have all names.
    last = max((name for name in slot.names if name in order), key=order.__getitem__)
    return tensors[last].with_shape(tuple(slot.tensor.shape))


def _read_already(
    stored: StoredTensor, tensor: torch.Tensor, dtype: torch.dtype, destination: Destination
) -> torch.Tensor | None:
    """What torch has read is used as it is, if nothing of it has to change."""
    if not isinstance(stored.source, InMemory) or _elsewhere(tensor, destination):
        return None
    if not (stored.dtype is tensor.dtype is dtype) or not tensor.is_contiguous():
        return None
    return stored.source.take().view(tensor.shape)


def _final_dtype(tensor: torch.Tensor, destination: Destination) -> torch.dtype:
    converts = destination.dtype is not None and tensor.is_floating_point()
    return destination.dtype if converts and destination.dtype else tensor.dtype


def _elsewhere(tensor: torch.Tensor, destination: Destination) -> bool:
    wanted = torch.device(destination.device)
    return (tensor.device.type, tensor.device.index or 0) != (wanted.type, wanted.index or 0)


def _replace(tensor: torch.Tensor, new: torch.Tensor) -> Callable[[], bool]:
    """Give a tensor other memory; the function tells whether the memory that it had has been freed."""
    is_freed = watch_storage(tensor)
    tensor.data = new
    return is_freed


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
