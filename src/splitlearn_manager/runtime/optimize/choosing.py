"""Optimizes a loaded model as its config says, before it serves: the one way into this package.

    compile, freeze   made, compared with the plain model, and refused if the answers differ
    auto              all are made and compared; of those that agree the fastest, else the plain model
    bfloat16          the loader's work: nothing is done or compared here

An optimized form stands in for the module in inference without a key/value cache; the plain module stays
beside it for everything else, and for all of it from the first training step on.

What was measured is told in a note, whatever comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import CannotOptimize, LoadError, OptimizedAnswersDiffer
from splitlearn_manager.runtime.optimize.agreement import difference
from splitlearn_manager.runtime.optimize.candidate import Candidate
from splitlearn_manager.runtime.optimize.compiled import Compiled
from splitlearn_manager.runtime.optimize.examples import Examples, examples
from splitlearn_manager.runtime.optimize.frozen import Frozen
from splitlearn_manager.runtime.optimize.lower import Lowered
from splitlearn_manager.runtime.optimize.timing import WORTH_IT, Clock, least_times, ratio

PLAIN = "plain"
Make = Callable[[ModelComputeFunction, ModelConfig, Path | None], Candidate]

CANDIDATES: Mapping[str, Make] = {
    "freeze": lambda function, config, _: Frozen(function, config.optimize_tolerance),
    "bfloat16": lambda function, config, _: Lowered(function),
    "compile": lambda function, config, cache_dir: Compiled(function, cache_dir),
}


@dataclass(frozen=True)
class Optimized:
    """What became of it.

    Attributes:
        extra_mb: what it takes beside the module, in MB (2**20 bytes).
    """

    extra_mb: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """How one form of the model did.

    Attributes:
        ms: milliseconds of a forward, for each batch that was timed; empty if it was not.
        apart: the largest difference from the plain model's answers, see `agreement`.
        problem: why there is none; empty if there is.
    """

    ms: tuple[float, ...] = ()
    apart: float = 0.0
    problem: str = ""


@dataclass
class _Tried:
    """All forms that were tried, and those that are still there."""

    trials: dict[str, Trial] = field(default_factory=dict)
    candidates: dict[str, Candidate] = field(default_factory=dict)


def optimize(
    function: ModelComputeFunction,
    config: ModelConfig,
    answered: Sequence[int] | None,
    weights_mb: float,
    *,
    cache_dir: Path | None = None,
    clock: Clock = perf_counter,
) -> Optimized:
    """Have the form that the config asks for stand in for the module.

    Args:
        answered: the shape of the input that was answered in warm-up; None if there was none.
        cache_dir: where compiled code is kept for the next load.

    Raises:
        CannotOptimize: not this model, or not on this machine (never for `auto`).
        OptimizedAnswersDiffer: by more than `optimize_tolerance` (never for `auto`).
        LoadError: it failed in a way that a later try may not (never for `auto`).
    """
    asked = config.optimize
    if asked == "none":
        return Optimized()
    if asked == "bfloat16":
        return Optimized(notes=("optimize: bfloat16, for weights and forward; not compared",))
    if asked == "auto":
        try:
            return _best(
                function,
                _examples(function, config, answered, weights_mb),
                config,
                cache_dir,
                clock,
            )
        except CannotOptimize as error:
            return Optimized(notes=(f"optimize: auto took the plain model: {error.message}",))
    return _asked_for(
        function, _examples(function, config, answered, weights_mb), config, cache_dir, clock
    )


def _examples(
    function: ModelComputeFunction,
    config: ModelConfig,
    answered: Sequence[int] | None,
    weights_mb: float,
) -> Examples:
    """What to try it with; a model whose answers cannot be compared is refused."""
    if answered is None:
        why = "warmup is off" if not config.warmup else "no input is known: give config.input_shape"
        raise CannotOptimize(
            f"model {config.model_id!r}: optimize: {config.optimize} compares answers to inputs like that of "
            f"warm-up, and {why}",
            reason="NoInputToOptimizeWith",
        )
    found = examples(function, config, answered, weights_mb)
    if not found.inputs:
        raise CannotOptimize(
            f"model {config.model_id!r} answers its first input, and raises for random values of that shape",
            reason="NoInputToOptimizeWith",
        )
    again = max(difference(_answer(function, x), _answer(function, x)) for x in found.timed)
    if again > config.optimize_tolerance:
        raise CannotOptimize(
            f"model {config.model_id!r} answers the same input differently each time (by {again:.1e}), so "
            "nothing can be compared with it",
            reason="AnswersVary",
        )
    return found


def _asked_for(
    function: ModelComputeFunction,
    found: Examples,
    config: ModelConfig,
    cache_dir: Path | None,
    clock: Clock,
) -> Optimized:
    name, tolerance = config.optimize, config.optimize_tolerance
    begun = clock()
    candidate = CANDIDATES[name](function, config, cache_dir)
    candidate.prepare(function, found)
    took = clock() - begun
    apart = _compared(function, candidate, found, [_answer(function, x) for x in found.inputs])
    if not apart <= tolerance:
        raise OptimizedAnswersDiffer(
            f"model {config.model_id!r}: the answers of optimize: {name} differ from the plain model's by up "
            f"to {apart:.1e}, and optimize_tolerance is {tolerance:g}; raise it if that will do, or leave "
            "optimize out"
        )
    ms = timed(function, {PLAIN: None, name: candidate}, found.timed, clock)
    function.stand_in(candidate)
    return Optimized(
        candidate.extra_mb,
        (
            f"optimize: {name} in {took:.1f} s; {_times(ms, found)}; largest difference {apart:.1e} "
            f"({tolerance:g} allowed){_beside(candidate.extra_mb)}",
        ),
    )


def _best(
    function: ModelComputeFunction,
    found: Examples,
    config: ModelConfig,
    cache_dir: Path | None,
    clock: Clock,
) -> Optimized:
    tried = _Tried()
    plain = [_answer(function, x) for x in found.inputs]
    for name, make in CANDIDATES.items():
        candidate = make(function, config, cache_dir)
        try:
            candidate.prepare(function, found)
            apart = _compared(function, candidate, found, plain)
        except LoadError as error:
            tried.trials[name] = Trial(problem=f"{error.reason}: {error.message}")
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tried.trials[name] = Trial(problem="OutOfMemory")
            continue
        tried.trials[name] = Trial(apart=apart)
        if apart <= config.optimize_tolerance:
            tried.candidates[name] = candidate
    del plain
    ms = timed(function, {PLAIN: None, **tried.candidates}, found.timed, clock)
    for name, times in ms.items():
        apart = tried.trials[name].apart if name in tried.trials else 0.0
        tried.trials[name] = Trial(times, apart)
    taken = fastest(tried.trials, config.optimize_tolerance)
    chosen = tried.candidates.get(taken)
    function.stand_in(chosen)
    extra_mb = chosen.extra_mb if chosen is not None else 0.0
    note = f"optimize: auto took {taken}{_why_plain(taken, ms)}; {_times(ms, found)}"
    told = [_told(name, trial, config.optimize_tolerance) for name, trial in tried.trials.items()]
    return Optimized(extra_mb, ("; ".join((note, *filter(None, told))) + _beside(extra_mb),))


def fastest(trials: Mapping[str, Trial], tolerance: float) -> str:
    """The form to take: of those that agree the one that takes least of the plain model's time.

    That is the geometric mean over the batches. The plain model stays where it is hardly slower.
    """
    plain = trials[PLAIN].ms
    ratios = {
        name: ratio(trial.ms, plain)
        for name, trial in trials.items()
        if name != PLAIN and trial.ms and not trial.problem and trial.apart <= tolerance
    }
    best = min(ratios, key=ratios.__getitem__, default=PLAIN)
    return best if ratios.get(best, 1.0) <= WORTH_IT else PLAIN


def timed(
    function: ModelComputeFunction,
    forms: Mapping[str, Candidate | None],
    inputs: Sequence[torch.Tensor],
    clock: Clock,
) -> dict[str, tuple[float, ...]]:
    """Milliseconds of a forward of each form, for each input, see `least_times`."""

    def forward_of(form: Candidate | None) -> Callable[[torch.Tensor], object]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            function.stand_in(form)
            return _answer(function, x)

        return forward

    try:
        return least_times({name: forward_of(form) for name, form in forms.items()}, inputs, clock)
    finally:
        function.stand_in(None)


def _compared(
    function: ModelComputeFunction,
    candidate: Candidate,
    found: Examples,
    plain: Sequence[torch.Tensor],
) -> float:
    """The largest difference over all examples; infinite if it raises where the plain model answers."""
    function.stand_in(candidate)
    try:
        return max(
            difference(_answer(function, x), answer)
            for x, answer in zip(found.inputs, plain, strict=True)
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return math.inf
    finally:
        function.stand_in(None)


def _answer(function: ModelComputeFunction, x: torch.Tensor) -> torch.Tensor:
    # A copy, because a model may write into its input, and is asked with it more than once.
    answer = function.compute(x.clone())
    return answer[0] if isinstance(answer, tuple) else answer


def _times(ms: Mapping[str, tuple[float, ...]], found: Examples) -> str:
    batches = "/".join(str(len(x)) for x in found.timed)
    each = ", ".join(f"{name} {'/'.join(f'{t:.3g}' for t in times)}" for name, times in ms.items())
    return f"ms for batches of {batches}: {each}"


def _told(name: str, trial: Trial, tolerance: float) -> str:
    if name == PLAIN:
        return ""
    if trial.problem:
        return f"{name} not: {trial.problem}"
    if not trial.apart <= tolerance:
        return f"{name} not: differs by {trial.apart:.1e} ({tolerance:g} allowed)"
    return f"{name} differs by {trial.apart:.1e}"


def _why_plain(taken: str, ms: Mapping[str, object]) -> str:
    if taken != PLAIN or len(ms) == 1:
        return ""
    return f", no other being {1 - WORTH_IT:.0%} faster"


def _beside(extra_mb: float) -> str:
    return f"; takes {extra_mb:,.1f} MB beside the plain weights" if extra_mb else ""
