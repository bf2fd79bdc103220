"""Measures what a forward pass takes on its device beside the weights.

Two forwards of different batches are run, while torch tells of each piece of memory that this thread takes
and gives back. Between two batches the same moments of a forward differ by what each further input takes
there; so every moment gives a line over the batch, and the highest of them is what a forward takes. That is
exact where a model works alike for all batches, and costs no forward of the largest batch.

It counts what torch's allocator hands out in the forward's own thread: tensors, and what operators take
for themselves. Not counted are memory that is not torch's (NumPy, libraries that allocate on their own),
what the first forward of all leaves behind for later ones, and several requests at the same time. Token
ids are as long as `config.max_sequence_length` allows, where that is given; other lengths that may vary are
those of warm-up, and longer inputs take more.

Nothing here can make a model fail: whatever goes wrong, nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.runtime.base import Activations
from splitlearn_manager.runtime.warmup import first_input

_MB = 2**20
_MOST_LINES = 8


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward took: bytes in use after each piece of memory that was taken or given back."""

    batch: int
    in_use: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.in_use, default=0)


def measure_activations(
    function: ModelComputeFunction, config: ModelConfig, shape: Sequence[int]
) -> Activations | None:
    """What a forward takes, from two forwards; None if that cannot be measured.

    Args:
        shape: that of an input which the model has answered already.
    """
    if function.device.type not in ("cpu", "cuda"):
        return None
    longest = _longest(function, config, shape)
    found = _measured(function, config, longest) if longest is not None else None
    return found or _measured(function, config, shape)


def _measured(
    function: ModelComputeFunction, config: ModelConfig, shape: Sequence[int]
) -> Activations | None:
    small, large = _batches(config.config.input_shape, shape)
    first = _try_forward(function, (small, *shape[1:]))
    second = _try_forward(function, (large, *shape[1:])) if large != small else None
    if first is not None and second is not None:
        return between(first, second)
    known = first or second
    return Activations(((known.peak / _MB, 0.0),)) if known is not None else None


def _longest(
    function: ModelComputeFunction, config: ModelConfig, shape: Sequence[int]
) -> tuple[int, int] | None:
    """The shape of the longest ids that a request may have; None if the config does not say."""
    options = config.config
    is_free = options.input_shape is None or options.input_shape[1:] == (-1,)
    if options.max_sequence_length is None or len(shape) != 2 or not is_free:
        return None
    return (
        None if function.input_dtype.is_floating_point else (shape[0], options.max_sequence_length)
    )


def _batches(declared: Sequence[int] | None, shape: Sequence[int]) -> tuple[int, int]:
    """The two batches to try; twice the same where the declared shape allows no other.

    An example without a free dimension is tried at half its batch: it is the largest that is known to work.
    """
    size = shape[0]
    if declared is not None and -1 in declared and declared[0] != -1:
        return size, size
    return (1, 2) if size == 1 else (size // 2, size)


def between(first: Forward, second: Forward) -> Activations:
    """The highest of the lines through both forwards, moment by moment.

    Forwards that differ in their moments work differently, and then only their peaks are compared.
    """
    alike = len(first.in_use) == len(second.in_use)
    pairs = zip(first.in_use, second.in_use, strict=True) if alike else [(first.peak, second.peak)]
    return Activations(_upper(_line(pair, first.batch, second.batch) for pair in pairs))


def _line(in_use: tuple[int, int], small: int, large: int) -> tuple[float, float]:
    """MB whatever the batch, and MB for each input."""
    each = (in_use[1] - in_use[0]) / (large - small)
    if each < 0:
        return max(in_use) / _MB, 0.0
    return (in_use[0] - each * small) / _MB, each / _MB


def _upper(lines: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lines of which one is the highest for some batch from 1 on, flattest first."""
    left = set(lines)
    batch, found = 1.0, list[tuple[float, float]]()
    while left and len(found) < _MOST_LINES:
        highest = max(left, key=lambda line: (line[0] + line[1] * batch, line[1]))
        found.append(highest)
        left = {line for line in left if line[1] > highest[1]}
        # Where the next one overtakes it: the first of those that ever do.
        batch = min(
            ((highest[0] - line[0]) / (line[1] - highest[1]) for line in left), default=batch
        )
    if left:
        found.append(max(left, key=lambda line: line[1]))
    return tuple(found)


def _try_forward(function: ModelComputeFunction, shape: tuple[int, ...]) -> Forward | None:
    try:
        return _forward(function, shape)
    except (Exception, SystemExit):
        # Another batch than that of warm-up may be none that the model takes, or not fit.
        return None


def _forward(function: ModelComputeFunction, shape: tuple[int, ...]) -> Forward | None:
    on_device = "cuda_memory_usage" if function.device.type == "cuda" else "cpu_memory_usage"
    recording = _Recording()
    with recording:
        answer = function.compute(first_input(function, shape))
        del answer
    lists = [_in_use(events, on_device) for events in recording.events]
    if not any(lists):
        return None
    # There is one list for each thread that took part, and nothing tells how they interleave.
    longest = max(lists, key=len)
    aside = sum(max(in_use, default=0) for in_use in lists if in_use is not longest)
    return Forward(shape[0], tuple(bytes_ + aside for bytes_ in longest))


def _in_use(events: Iterable[Any], on_device: str) -> tuple[int, ...]:
    """Bytes in use after each event of a thread, from nothing at the beginning.

    What is given back may have been taken before, and counts as far as it was taken in the forward.
    """
    total, found = 0, list[int]()
    for event in events:
        if event.kind() == "memory_alloc" and (change := getattr(event, on_device)()):
            total = max(0, total + change)
            found.append(total)
    return tuple(found)


class _Recording:
    """Lets torch note all memory that is taken and given back in this thread, within a `with`.

    This is the recorder below `torch.autograd.profiler_legacy`: unlike its successor it concerns this
    thread alone, and needs no setting up.

    Attributes:
        events: those of each thread that took part, once the block has ended.
    """

    def __init__(self) -> None:
        self.events: list[list[Any]] = []

    def __enter__(self) -> None:
        from torch._C import _profiler

        torch.autograd._enable_profiler_legacy(  # type: ignore[attr-defined]
            _profiler.ProfilerConfig(
                _profiler.ProfilerState.CPU,
                False,  # shapes of inputs
                True,  # memory
                False,  # stacks
                False,  # flops
                False,  # modules
                _profiler._ExperimentalConfig(),
            )
        )

    def __exit__(self, *error: object) -> None:
        self.events = torch.autograd._disable_profiler_legacy()  # type: ignore[attr-defined]
