"""Sequences of different lengths, answered in one row: a text that is short costs no more for its neighbours.

    [1, 9] [2, 24] [1, 5] ─► [1, 62] ─► one forward, where each row sees itself only ─► an answer to each

Requests of a text model seldom have equal lengths, and a forward of one short text leaves most of a processor
unused. Behind one another they make up a row that is worth a forward, without any padding; what attention
takes more for that is little while the row is short (`MOST_TOGETHER`). A module offers it
(`splitlearn_manager.runtime.base.TakesSequences`); whether it answers as it does alone is found out here by
running it, on sequences as long as any that are joined, so that a model which looks only so far is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from splitlearn_comm.core import InvalidRequest, ModelComputeFunction
from splitlearn_comm.core.compute_function import invoke, on_cpu
from splitlearn_comm.core.packed import Output, Packed, Rows, strung
from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.runtime.base import ComputesSequences, Joining, TakesSequences
from splitlearn_manager.runtime.joining import alike, random_input, rounding_of

LONGEST = 128
"""Tokens of the longest sequence that is joined with others of other lengths."""
MOST_TOGETHER = 256
"""Tokens in all of sequences that are joined: attention takes a ninth of a forward more, where the model's
hidden size is 384, and as much less as that is larger."""
_TRIED = ((1, LONGEST), (2, 1), (1, 37), (1, 64), (3, 8))


class SequenceFunction(ModelComputeFunction, ComputesSequences):
    """A module that takes sequences, as a compute function."""

    @property
    def answers_tokens(self) -> bool:
        """As `TakesSequences.answers_tokens`."""
        return self._module.answers_tokens

    @property
    def longest(self) -> int | None:
        """As `TakesSequences.longest`."""
        return self._module.longest

    def compute_sequences(self, parts: Sequence[Packed]) -> Sequence[Rows]:
        """As `ComputesSequences.compute_sequences`."""
        shapes = [part.shape for part in parts]
        output = on_cpu(self.in_one_row(strung(parts), shapes))
        return answers(Output(output), shapes, of_tokens=self.answers_tokens)

    def in_one_row(self, values: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """As `TakesSequences.forward_sequences`, of values of any dtype.

        Raises:
            InvalidRequest: if one of them is no input that the model takes.
        """
        for shape in shapes:
            self.check_shape(shape)
        return self.compute_by(partial(self._module.forward_sequences, shapes=shapes), values)

    @property
    def _module(self) -> TakesSequences:
        module = self.model
        assert isinstance(module, TakesSequences)
        return module


def answers(output: Output, shapes: Sequence[Sequence[int]], *, of_tokens: bool) -> Sequence[Rows]:
    """The parts of an output that answer inputs of these shapes."""
    found, at = [], 0
    for rows, length in shapes:
        count = rows * length if of_tokens else rows
        head = (rows, length) if of_tokens else (rows,)
        found.append(output.rows_as(at, count, (*head, *output.shape[1:])))
        at += count
    return found


def try_lengths(function: SequenceFunction, found: Joining) -> Joining:
    """Run the model on sequences alone, and in one row.

    Args:
        found: that requests of equal shape may be joined.

    Raises nothing that the model raises.
    """
    shapes = [(rows, min(length, function.longest or length)) for rows, length in _TRIED]
    if not _fit(function, shapes):
        # Its input_shape has one length.
        return found
    why = _why_not(function, shapes)
    if why is not None:
        return replace(found, note=f"{found.note}; those of other lengths are not: {why}")
    note = (
        f"{found.note}; so are sequences of other lengths, of up to {LONGEST} tokens, where "
        f"together they have no more than {MOST_TOGETHER}"
    )
    return replace(found, note=note, lengths=True)


def _fit(function: SequenceFunction, shapes: Sequence[Sequence[int]]) -> bool:
    try:
        for shape in shapes:
            function.check_shape(shape)
    except InvalidRequest:
        return False
    return True


def _why_not(function: SequenceFunction, shapes: Sequence[tuple[int, int]]) -> str | None:
    if function.has_stand_in:
        return "what it is optimized to takes one length at a time"
    inputs = [random_input(function, shape) for shape in shapes]
    try:
        alone = [on_cpu(invoke(function, x.clone()).output) for x in inputs]
        values = torch.cat([x.flatten() for x in inputs])
        together = Output(on_cpu(function.in_one_row(values, shapes)))
        parts = answers(together, shapes, of_tokens=function.answers_tokens)
        rounding = rounding_of(function)
        pairs = [(a, p.tensor()) for a, p in zip(alone, parts, strict=True)]
        same = all(alike(one, other, rounding) for one, other in pairs)
        same = same and _mostly_alike(pairs, rounding, of_tokens=function.answers_tokens)
    except Exception as error:
        return f"that fails ({in_one_line(error)})"
    return None if same else "they are answered differently in one row"


def _mostly_alike(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rounding: float, *, of_tokens: bool
) -> bool:
    """Whether of each answer most values are the same up to rounding, each measured by its own kind.

    The answers of many models have a few values that are far larger than all others, and the mean of a long
    text is smaller than that of a short one. Measured by the largest, the others may be anything.

    Args:
        pairs: of equal shapes and dtypes.
    """
    if not pairs[0][0].is_floating_point():
        return True
    heads = 2 if of_tokens else 1
    one, other = (
        torch.cat([pair[side].double().flatten(0, heads - 1) for pair in pairs]) for side in (0, 1)
    )
    one, other = one.reshape(len(one), -1), other.reshape(len(one), -1)
    size = one.square().mean(0).sqrt()
    of_answer = (one / size.clamp(min=1e-30)).square().mean(1, keepdim=True).sqrt()
    near = (one - other).abs() <= rounding * size * of_answer
    return bool((near.double().mean(1) >= 0.5).all())
