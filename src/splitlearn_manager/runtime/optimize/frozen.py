"""`optimize: freeze`: the module as torch.export writes it down, with what depends on weights alone computed.

    export    the module's forward becomes a list of operators; sizes that may vary stay symbols
    fold      a batch norm goes into the convolution before it, and what weights alone determine is computed
    pack      weights come into oneDNN's order, where that is measured to be faster; see `packing`
    run       the list as one Python function, without the modules around it

No C++ compiler is needed. A trace that takes the sizes of its example for all sizes would answer wrongly;
an exported program has a check of each size that it relies on. The checks are run for each shape that is
new; where one fails, or the program raises (or the input is not contiguous), the plain module answers.
A batch of 1, which operators treat apart (broadcasting), has a program of its own, with the same weights.

It takes memory for what is folded and packed, at most the weights of those layers; other weights are the
plain module's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import fx, nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_manager.errors import CannotOptimize
from splitlearn_manager.runtime.optimize.agreement import difference
from splitlearn_manager.runtime.optimize.candidate import extra_mb, keywords_of, why_not
from splitlearn_manager.runtime.optimize.compiler import COMPILER
from splitlearn_manager.runtime.optimize.examples import Examples
from splitlearn_manager.runtime.optimize.folding import fold, share
from splitlearn_manager.runtime.optimize.packing import Packed, can_pack
from splitlearn_manager.runtime.optimize.size_checks import only_checks
from splitlearn_manager.runtime.optimize.timing import WORTH_IT, least_times, ratio

_MOST_SHAPES = 4096
"""Shapes that are remembered; requests of more than so many different ones are checked anew."""


class Frozen:
    """See the module's text; a `Candidate`."""

    def __init__(self, function: ModelComputeFunction, tolerance: float) -> None:
        self._tolerance = tolerance
        self._plain = _Call(function.model, keywords_of(function))
        self._programs: tuple[_Program, ...] = ()
        self._lock = threading.Lock()
        self._by_shape: dict[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]] = {}
        self.extra_mb = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            return self._of_plain(x)
        known = self._by_shape.get(tuple(x.shape))
        return known(x) if known is not None else self._first_of_its_shape(x)

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        """Export and fold. Raises as `Candidate.prepare`."""
        converted: list[torch.Tensor] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            converted.append(x.clone())
            return x

        function.stand_in(keep)
        for x in examples.inputs:
            function.compute(x)
        function.stand_in(None)
        programs: list[_Program] = []
        packed = Packed()
        try:
            # Inference tensors cannot be exported; nor is there anything to differentiate.
            with COMPILER.turn(None), torch.inference_mode(False), torch.no_grad():
                for x in converted:
                    if not any(program.takes(x.shape) for program in programs):
                        held = [weight for program in programs for weight in program.weights]
                        programs.append(_Program(self._plain, x.clone(), examples.free, held))
                        if can_pack():
                            programs[-1].pack(packed)
            for program in programs:
                taken = [x for x in converted if program.takes(x.shape)]
                program.choose(taken, self._plain, self._tolerance)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CannotOptimize(
                f"model {function.model_name!r} cannot be frozen: {why_not(error, function.model)}",
                reason="FreezeFailed",
            ) from error
        self._programs = tuple(programs)
        weights = [tensor for program in programs for tensor in program.weights]
        self.extra_mb = extra_mb(weights, function.model)

    def _first_of_its_shape(self, x: torch.Tensor) -> torch.Tensor:
        for program in self._programs:
            if program.takes(x.shape) and program.passes(x):
                try:
                    answer: torch.Tensor = program.folded(x)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    # Of these values, perhaps: the plain module says so in its own words.
                    return self._of_plain(x)
                self._remember(x, program.folded)
                return answer
        self._remember(x, self._plain)
        return self._of_plain(x)

    def _of_plain(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self._plain(x)
        return answer

    def _remember(self, x: torch.Tensor, chosen: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with self._lock:
            if len(self._by_shape) >= _MOST_SHAPES:
                self._by_shape.clear()
            self._by_shape[tuple(x.shape)] = chosen


class _Call(nn.Module):
    """The module with the keywords of its call, taking a tensor alone."""

    def __init__(self, module: nn.Module, keywords: Mapping[str, object]) -> None:
        super().__init__()
        self.module = module
        self._keywords = dict(keywords)

    def forward(self, x: torch.Tensor) -> Any:
        return self.module(x, **self._keywords)


class _Program:
    """The module, exported from one example.

    Args:
        held: tensors of other programs of the module, which are read where they are equal to its own.

    Attributes:
        folded: takes only what `takes` and `passes` have let through.
    """

    def __init__(
        self,
        module: nn.Module,
        example: torch.Tensor,
        free: Sequence[int],
        held: Sequence[torch.Tensor],
    ) -> None:
        self._free = frozenset(i for i in free if example.shape[i] > 1)
        self._shape = tuple(example.shape)
        sizes = dict.fromkeys(self._free, torch.export.Dim.AUTO)
        exported = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False)
        self._exported: fx.GraphModule | None = exported.module()
        self._checks = only_checks(self._exported)
        folded = fold(self._exported)
        assert folded is not None
        share(folded, held)
        self.folded = folded
        self._packed: fx.GraphModule | None = None

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """All tensors that the folded program reads."""
        weights: tuple[torch.Tensor, ...] = self.folded.__dict__["weights"]
        return weights

    def pack(self, packed: Packed) -> None:
        """Have a second form at hand, which calls oneDNN; none where oneDNN does not take the weights."""
        assert self._exported is not None
        try:
            self._packed = fold(self._exported, packed)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return
        if self._packed is not None:
            share(self._packed, self.weights)

    def choose(
        self,
        inputs: Sequence[torch.Tensor],
        plain: Callable[[torch.Tensor], torch.Tensor],
        tolerance: float,
    ) -> None:
        """Keep the packed form if its answers agree with the plain module's and it is the faster one."""
        packed, self._packed, self._exported = self._packed, None, None
        if packed is None:
            return
        with torch.inference_mode():
            try:
                apart = max(difference(packed(x.clone()), plain(x.clone())) for x in inputs)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return
            if not apart <= tolerance:
                return
            by_size = sorted(inputs, key=torch.Tensor.numel)
            ends = (by_size[0], by_size[-1])
            times = least_times({"folded": self.folded, "packed": packed}, ends, perf_counter)
        if ratio(times["packed"], times["folded"]) <= WORTH_IT:
            self.folded = packed

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the sizes that were fixed are those; those that may vary are from 2 on."""
        return len(shape) == len(self._shape) and all(
            got > 1 if i in self._free else got == own
            for i, (got, own) in enumerate(zip(shape, self._shape, strict=True))
        )

    def passes(self, x: torch.Tensor) -> bool:
        """Whether the program says that it stands for inputs of that shape."""
        try:
            self._checks(x)
        except Exception:
            return False
        return True
