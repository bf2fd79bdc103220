"""The inputs on which optimized models are compiled, compared and timed.

They are made from the input that the model answered in warm-up: random values, the batches that will be
used (1, the powers of two up to `batch_size`, and that itself), and two sizes for each dimension that may
vary; ids once with padding on either side, too. No batch is tried whose forward takes more memory beside
the weights than the weights themselves, or than `_ALWAYS_MB` if that is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.runtime.activations import measure_activations

_ALWAYS_MB = 256.0
_UNMEASURED_BATCH = 8
_OTHER_SIZE = 11
_SEED = 20240229


@dataclass(frozen=True)
class Examples:
    """Inputs that the plain model answers.

    Attributes:
        free: the dimensions that may vary, the batch included.
        inputs: the largest batch first, all of one size but for the batch; then those of other sizes.
        timed: those to time, smallest batch first.
    """

    free: tuple[int, ...]
    inputs: tuple[torch.Tensor, ...]
    timed: tuple[torch.Tensor, ...]


def free_dimensions(
    declared: Sequence[int] | None, shape: Sequence[int], *, integers: bool
) -> tuple[int, ...]:
    """Which dimensions of the input may vary.

    Those that are declared with -1. A shape without -1 is an example, and one that was guessed as well:
    then the batch may vary, and the length of ids.
    """
    if declared is not None and -1 in declared:
        return tuple(i for i, size in enumerate(declared) if size == -1)
    return (0, 1) if integers and len(shape) == 2 else (0,)


def used_batches(batch_size: int, largest: int) -> tuple[int, ...]:
    """1, the powers of two up to `batch_size`, and that itself; none above `largest`, but always 1."""
    powers = {1 << n for n in range(batch_size.bit_length())}
    return tuple(sorted(b for b in powers | {batch_size} if b == 1 or b <= largest))


def random_input(
    shape: Sequence[int], dtype: torch.dtype, vocabulary: int | None, seed: int = _SEED
) -> torch.Tensor:
    """An input of that shape: normal values, or ids of the vocabulary (0 and 1 where that is not known)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator)
    high = 2 if dtype is torch.bool or vocabulary is None else min(vocabulary, 2**23)
    return torch.randint(0, high, tuple(shape), generator=generator).float()


def examples(
    function: ModelComputeFunction, config: ModelConfig, shape: Sequence[int], weights_mb: float
) -> Examples:
    """The inputs for a model that answered `shape`; those that it does not take are left out."""
    integers = not function.input_dtype.is_floating_point
    free = free_dimensions(config.config.input_shape, shape, integers=integers)
    batches: Sequence[int] = (shape[0],)
    if 0 in free:
        batches = used_batches(
            config.batch_size, _largest_batch(function, config, shape, weights_mb)
        )
    sizes = [tuple(shape)]
    longer = tuple(_other(config) if i in free and i > 0 else size for i, size in enumerate(shape))
    if longer != sizes[0]:
        sizes.append(longer)
    found: list[list[torch.Tensor]] = []
    for size in sizes:
        made = (
            random_input((b, *size[1:]), function.input_dtype, function.vocabulary)
            for b in reversed(batches)
        )
        found.append([x for x in made if _answers(function, x)])
    padded = _padded(function, found[0][0]) if found[0] else ()
    found.append([x for x in padded if _answers(function, x)])
    return Examples(free, tuple(x for group in found for x in group), _to_time(found[0]))


def _to_time(usual: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The smallest batch, one between, and the largest: each once."""
    if not usual:
        return ()
    chosen = (usual[-1], usual[len(usual) // 2], usual[0])
    return tuple({len(x): x for x in chosen}.values())


def _other(config: ModelConfig) -> int:
    longest = config.config.max_sequence_length
    return _OTHER_SIZE if longest is None else max(1, min(_OTHER_SIZE, longest))


def _padded(function: ModelComputeFunction, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ids with padding at the end and at the beginning of a row, for a model that has an id for it."""
    pad = getattr(function.model, "pad_token_id", None)
    if not isinstance(pad, int) or x.dim() != 2 or x.shape[1] < 2:
        return ()
    right, left = x.clone(), x.clone()
    right[0, x.shape[1] // 2 :] = pad
    left[0, : x.shape[1] // 2] = pad
    return right, left


def _largest_batch(
    function: ModelComputeFunction, config: ModelConfig, shape: Sequence[int], weights_mb: float
) -> int:
    activations = measure_activations(function, config, shape)
    if activations is None:
        return min(config.batch_size, _UNMEASURED_BATCH)
    allowed_mb = max(weights_mb, _ALWAYS_MB)
    fitting = (
        b
        for b in used_batches(config.batch_size, config.batch_size)
        if activations.mb(b) <= allowed_mb
    )
    return max(fitting, default=1)


def _answers(function: ModelComputeFunction, x: torch.Tensor) -> bool:
    """Whether the model takes that input: another size than that of warm-up may be none that it takes."""
    try:
        # A copy, because a model may write into its input.
        function.compute(x.clone())
    except Exception:
        return False
    return True
