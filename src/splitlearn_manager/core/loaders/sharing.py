"""Lets models on the CPU that have the same weights share one copy of them, by content.

Before a parameter gets memory of its own, a parameter of a model in memory that looks the same (dtype, shape,
first bytes) is compared with the file, byte by byte. If they are equal it is shared, and the file's bytes are
kept nowhere. So two models of one file share, and so do the old and the new instance of an update that
changes only the spec.

Only parameters are shared, never buffers, which models write to. And only between models that surely do not
write to their parameters: made of layers of torch and transformers alone, without hooks. Training puts new
parameters in the place of old ones, and so takes nothing from the others.

Nothing here keeps memory: parameters are known by weak references, and what is shared is gone with its last
owner. Each owner is charged for all of it, so that no model's leaving can break a budget.
"""

from __future__ import annotations

import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import nn

from splitlearn_manager.core.loaders.own_memory import StoredTensor, as_bytes, holds, read_first

MIN_BYTES = 64 * 2**10
"""Smaller parameters are not worth the comparison."""

_GLANCE_ELEMENTS = 1024
_MOST_COMPARED = 4
"""Parameters that begin alike and differ later are rare, but for those that are all zeros or ones."""

_Form = tuple[torch.dtype, tuple[int, ...]]
Elsewhere = Callable[[torch.dtype, tuple[int, ...], int], Iterable[torch.Tensor]]
"""Parameters that are not of this process, by dtype, shape and checksum of the first elements."""
_References = dict[int, list["weakref.ref[nn.Parameter]"]]
"""By the checksum of the first elements."""


class ResidentParameters:
    """The parameters that may be shared; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[_Form, _References] = {}
        self._elsewhere: Elsewhere | None = None

    def ask_also(self, elsewhere: Elsewhere) -> None:
        """From now on loads are offered parameters of other processes, too."""
        self._elsewhere = elsewhere

    def add(self, module: nn.Module) -> None:
        """From now on others may share what parameters of this module lie on the CPU."""
        if not never_writes(module):
            return
        found = [(p, looks_of(p)) for p in module.parameters() if can_be_shared(p)]
        with self._lock:
            self._known = _without_the_dead(self._known)
            for parameter, checksum in found:
                form = (parameter.dtype, tuple(parameter.shape))
                by_checksum = self._known.setdefault(form, {})
                by_checksum.setdefault(checksum, []).append(weakref.ref(parameter))

    def equal_to(
        self, stored: StoredTensor, dtype: torch.dtype, via: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """A tensor in memory with the bytes that reading the stored one would give; None if there is none.

        Args:
            dtype, via: as the stored tensor is read, see `own_memory.fill`.

        Raises:
            LoadError: reading failed.
        """
        if stored.stride is not None or stored.numel * dtype.itemsize < MIN_BYTES:
            return None
        form = (dtype, stored.shape)
        if form not in self._known and self._elsewhere is None:
            return None
        checksum = _checksum(read_first(stored, _GLANCE_ELEMENTS, dtype, via))
        others = self._elsewhere(*form, checksum) if self._elsewhere is not None else ()
        for resident in chain(self._alike(form, checksum), others):
            if holds(resident, stored, via):
                return resident
        return None

    def _alike(self, form: _Form, checksum: int) -> Iterator[torch.Tensor]:
        with self._lock:
            refs = self._known.get(form, {}).get(checksum, [])[-_MOST_COMPARED:]
        for ref in refs:
            # From here on it is held, so that nobody frees it while it is compared.
            parameter = ref()
            if parameter is not None and parameter.device.type == "cpu":
                yield parameter.detach()


class Borrower:
    """What one load takes from others.

    A load asks before it knows all of the model; in the end `settle` gives back what it may not share.
    """

    def __init__(self, resident: ResidentParameters) -> None:
        self._resident = resident
        self._borrowed: set[int] = set()

    def equal_to(
        self, stored: StoredTensor, dtype: torch.dtype, via: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """As `ResidentParameters.equal_to`."""
        found = self._resident.equal_to(stored, dtype, via)
        if found is not None:
            self._borrowed.add(found.untyped_storage().data_ptr())
        return found

    def settle(self, module: nn.Module) -> None:
        """Give buffers, and all of a module that may write to its parameters, memory of their own."""
        if not self._borrowed:
            return
        apart: list[torch.Tensor] = list(module.buffers())
        if not never_writes(module):
            apart += module.parameters()
        for tensor in apart:
            if tensor.untyped_storage().data_ptr() in self._borrowed:
                tensor.data = tensor.detach().clone()


def never_writes(module: nn.Module) -> bool:
    """Whether a module surely leaves its parameters as they are, whatever it is asked."""
    return all(_is_known(part) and not _has_extras(part) for part in module.modules())


def _is_known(part: nn.Module) -> bool:
    cls = type(part)
    home = cls.__module__
    ours = home.startswith(("torch.nn.modules.", "transformers.models.", f"{__package__}."))
    defined = getattr(sys.modules.get(home), cls.__name__, None) is cls
    # With a largest norm, looking a row up scales the row in place.
    return ours and defined and getattr(part, "max_norm", None) is None


def _has_extras(part: nn.Module) -> bool:
    own = vars(part)
    hooks = any(
        own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )
    return hooks or "forward" in own


def can_be_shared(parameter: nn.Parameter) -> bool:
    """Whether a parameter lies on the CPU, in memory that is its own alone, and is worth it."""
    return (
        type(parameter) is nn.Parameter
        and parameter.device.type == "cpu"
        and parameter.layout is torch.strided
        and parameter.nbytes >= MIN_BYTES
        and parameter.is_contiguous()
        and parameter.untyped_storage().nbytes() == parameter.nbytes
    )


def _without_the_dead(known: dict[_Form, _References]) -> dict[_Form, _References]:
    kept: dict[_Form, _References] = {}
    for form, by_checksum in known.items():
        for checksum, refs in by_checksum.items():
            if alive := [ref for ref in refs if ref() is not None]:
                kept.setdefault(form, {})[checksum] = alive
    return kept


def looks_of(parameter: nn.Parameter) -> int:
    """A checksum of how it begins."""
    return _checksum(parameter.detach().view(-1)[:_GLANCE_ELEMENTS])


def _checksum(values: torch.Tensor) -> int:
    return zlib.crc32(as_bytes(values))


RESIDENT = ResidentParameters()
"""One for the process, because its memory is."""
