"""The seam between the ways in which a model can be optimized and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.runtime.optimize.examples import Examples

_MB = 2**20


class Candidate(Protocol):
    """A model in another form: what it is called with is the model's converted input.

    Attributes:
        extra_mb: memory of its own beside the plain module, in MB (2**20 bytes).
    """

    extra_mb: float

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        """Make it ready for requests; nobody else uses the model or it meanwhile.

        Raises:
            CannotOptimize: it cannot be done, with this model or on this machine.
            LoadError: it failed in a way that a later try may not.
        """
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def keywords_of(function: ModelComputeFunction) -> Mapping[str, object]:
    """What the module is called with beside its input, where no cache is asked for."""
    return {"past_key_values": None, "use_cache": False} if function.has_cache else {}


def extra_mb(tensors: Iterable[torch.Tensor], plain: nn.Module) -> float:
    """MB of the memory in which `tensors` lie and nothing of `plain` does."""
    known = {t.untyped_storage().data_ptr() for t in tensors_of(plain)}
    sizes: dict[object, int] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            # In oneDNN's order: torch does not say where that lies, and it takes what it would without.
            sizes["packed", id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(size for place, size in sizes.items() if place not in known) / _MB


def tensors_of(module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Its parameters and buffers."""
    return (*module.parameters(), *module.buffers())


def in_one_line(error: BaseException) -> str:
    """The gist of torch's own errors, which go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def why_not(error: BaseException, module: nn.Module) -> str:
    """Why torch could not freeze or compile the module: what it says of TorchScript is of its own insides."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return "it is TorchScript, or has a part that is, which can be neither frozen nor compiled"
    return in_one_line(error)
