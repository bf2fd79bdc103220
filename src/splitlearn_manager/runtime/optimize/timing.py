"""How long forms of a model take, side by side, and which is worth having."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

WORTH_IT = 0.95
"""A form that takes more than so much of another's time is not worth having beside it."""

_ROUNDS = (3, 20)
_SECONDS_A_FORM = 0.1

Clock = Callable[[], float]


def least_times(
    forms: Mapping[str, Callable[[torch.Tensor], object]],
    inputs: Sequence[torch.Tensor],
    clock: Clock,
) -> dict[str, tuple[float, ...]]:
    """Milliseconds of a call of each form, for each input: the least of some rounds.

    The forms take turns, so that what else the machine does in a moment concerns them alike.
    """
    least = {name: [math.inf] * len(inputs) for name in forms}
    fewest, most = _ROUNDS
    for i, x in enumerate(inputs):
        begun = clock()
        for done in range(most):
            if done >= fewest and clock() - begun > _SECONDS_A_FORM * len(forms):
                break
            for name, form in forms.items():
                start = clock()
                form(x)
                least[name][i] = min(least[name][i], (clock() - start) * 1e3)
    return {name: tuple(times) for name, times in least.items()}


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The share of the other's time that a form takes: the geometric mean over the inputs."""
    return math.prod(a / b for a, b in zip(times, others, strict=True)) ** (1 / len(others))
