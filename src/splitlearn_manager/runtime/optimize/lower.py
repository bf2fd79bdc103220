"""`bfloat16` as one of the forms that `optimize: auto` tries: a copy of the module beside the plain one.

(`optimize: bfloat16` itself needs none of this: the weights are read as bfloat16, as with `config.dtype`.)
The copy is made tensor by tensor, so that there are never two of it. Integers stay integers, in the
weights and in the input; the output has the plain module's dtype.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_manager.errors import CannotOptimize
from splitlearn_manager.runtime.optimize.candidate import (
    extra_mb,
    in_one_line,
    keywords_of,
    tensors_of,
)
from splitlearn_manager.runtime.optimize.examples import Examples


class Lowered:
    """See the module's text; a `Candidate`."""

    computes_in = torch.bfloat16

    def __init__(self, function: ModelComputeFunction) -> None:
        self._keywords = keywords_of(function)
        self._dtype: torch.dtype | None = None
        self._module: nn.Module | None = None
        self.extra_mb = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert self._module is not None, "called before it was prepared"
        given = x.to(torch.bfloat16) if x.is_floating_point() else x
        output: torch.Tensor = self._module(given, **self._keywords)
        return output if output.dtype is self._dtype else output.to(self._dtype)

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        """Make the copy. Raises as `Candidate.prepare`."""
        answer = function.compute(examples.inputs[-1].clone())
        self._dtype = answer.dtype if isinstance(answer, torch.Tensor) else None
        try:
            self._module = in_bfloat16(function.model)
            function.stand_in(self)
            function.compute(examples.inputs[-1].clone())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CannotOptimize(
                f"model {function.model_name!r} does not work in bfloat16: {in_one_line(error)}"
            ) from error
        finally:
            function.stand_in(None)
        self.extra_mb = extra_mb(tensors_of(self._module), function.model)


def in_bfloat16(module: nn.Module) -> nn.Module:
    """A copy of which all floating-point parameters and buffers are bfloat16; the others are shared."""
    memo: dict[int, object] = {}
    with torch.no_grad():
        for parameter in module.parameters():
            lower = _lower(parameter.detach())
            memo[id(parameter)] = nn.Parameter(lower, requires_grad=False)
        for buffer in module.buffers():
            memo[id(buffer)] = _lower(buffer.detach())
    copied = copy.deepcopy(module, memo)
    stray = [t for t in (*copied.parameters(), *copied.buffers()) if t.dtype is torch.float32]
    if stray:
        raise TypeError(f"{type(module).__name__} cannot be copied in another dtype")
    return copied.eval()


def _lower(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
