"""`optimize: compile`: the module as torch.compile makes it, compiled before it serves and never after.

The module is compiled as one graph in which the dimensions that may vary are symbols, and once more where a
size does not fit that (a batch of 1, which torch always treats apart). Requests are answered by what was
compiled then; an input that fits none of it is answered by the plain module, so that no request ever waits
for the compiler. torch checks before each call that the input, and the module, are what it compiled for.

Weights are arguments of the compiled code, not parts of it: it takes no copy of them.

torch keeps what it compiles beside the code object of the function that was compiled, and modules of one
class share theirs. Here each model has a function with a code object of its own, so what belongs to one
model is found by no other, and goes with it.
"""

from __future__ import annotations

import builtins
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import cast

import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_manager.errors import CannotOptimize, LoadError
from splitlearn_manager.runtime.optimize.candidate import keywords_of, why_not
from splitlearn_manager.runtime.optimize.compiler import COMPILER, missing_compiler
from splitlearn_manager.runtime.optimize.examples import Examples

_Forward = Callable[[torch.Tensor], torch.Tensor]


class Compiled:
    """See the module's text; a `Candidate`.

    Args:
        cache_dir: where compiled code is kept for the next load.
    """

    extra_mb = 0.0

    def __init__(self, function: ModelComputeFunction, cache_dir: Path | None) -> None:
        self._device = function.device.type
        self._own = _with_own_code(function.model, keywords_of(function))
        self._call: _Forward = self._own
        self._cache_dir = cache_dir

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x)

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        """Compile for all examples. Raises as `Candidate.prepare`."""
        command = missing_compiler() if self._device == "cpu" else None
        if command is not None:
            raise CannotOptimize(
                f"model {function.model_name!r}: optimize: compile needs a C++ compiler, and this machine "
                f"has no {command}: install one, or name yours in the environment variable CXX",
                reason="NoCompiler",
            )
        with COMPILER.turn(self._cache_dir):
            try:
                self._compile(function, examples)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                kind = LoadError if _is_of_the_system(error) else CannotOptimize
                raise kind(
                    f"model {function.model_name!r}: torch.compile failed: {why_not(error, function.model)}",
                    reason="CompileFailed",
                ) from error

    def _compile(self, function: ModelComputeFunction, examples: Examples) -> None:
        compiling = cast(_Forward, torch.compile(self._own, fullgraph=True))

        def marked(x: torch.Tensor) -> torch.Tensor:
            for dimension in examples.free:
                if x.shape[dimension] > 1:
                    torch._dynamo.maybe_mark_dynamic(x, dimension)
            return compiling(x)

        self._call = marked
        function.stand_in(self)
        try:
            for x in examples.inputs:
                function.compute(x.clone())
        finally:
            function.stand_in(None)
        self._call = torch._dynamo.run(self._own)


def _with_own_code(module: nn.Module, keywords: Mapping[str, object]) -> _Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, module(x, **keywords))

    # torch leaves what it has compiled in the globals of the function, which here are its own.
    scope: dict[str, object] = {"__builtins__": builtins, "__name__": __name__, "cast": cast}
    scope["torch"] = torch
    own = FunctionType(forward.__code__.replace(), scope, "forward", None, forward.__closure__)
    weakref.finalize(own, _empty, own.__code__, scope)
    return cast(_Forward, own)


def _empty(code: CodeType, scope: dict[str, object]) -> None:
    """Let go of what was compiled for a function that is gone.

    Without it torch would hold it for ever, by its checks of the input: those wait for the end of classes
    that never end. The names stay, because torch deletes them itself if it comes to that.
    """
    scope.update(dict.fromkeys(scope))
    failures = getattr(torch._dynamo.utils, "guard_failures", None)
    if isinstance(failures, dict):
        failures.pop(code, None)


def _is_of_the_system(error: BaseException | None) -> bool:
    """Whether a full disk or the like is behind it, and not the model."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__ or error.__context__
    return False
