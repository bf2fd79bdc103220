"""Finds out, by running a model, whether its requests may be joined into batches.

They may if the first dimension of its input and output is one of independent rows: it answers rows joined as
it answers them alone, up to rounding, and the same rows alike each time. A model that mixes its rows (a mean
over the batch, say), keeps state, draws random numbers, or takes one size only is found by that, and each of
its requests runs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.compute_function import invoke
from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.runtime.base import Joining

_PARTS = (1, 2, 1)
"""Rows of the inputs that are tried."""
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How much two answers may differ, as a part of the largest value: sums are taken in another order."""
_FILL = 1e4
"""Values from here on may stand for minus infinity, and say nothing of how large the others are."""


def try_joining(
    function: ModelComputeFunction,
    shape: Sequence[int] | None,
    batch_size: int,
    largest: int | None = None,
) -> Joining:
    """Run the model on separate and on joined inputs.

    Args:
        shape: that of an input which the model has answered; None if there is none.
        batch_size: most rows that the operator wants in a batch.
        largest: most rows to try; not more than a few unless given.

    Raises nothing that the model raises.
    """
    if batch_size == 1:
        return _apart("batch_size was 1 when it was loaded", lasts=False)
    if not shape:
        return _apart("it was not warmed up")
    parts = _PARTS if batch_size >= sum(_PARTS) else (1, 1)
    few = sum(parts)
    many = random_input(function, (max(few, largest or 0), *shape[1:]))
    together = many[:few]
    # No two rows are the same: a mean over rows that are changes nothing.
    inputs = torch.split(together, list(parts))
    try:
        alone = [_run(function, x) for x in inputs]
        joined = _run(function, together)
        # Twice in a row: some models begin anew with each batch of another size than the last, and only then.
        again = [_run(function, inputs[0]) for _ in range(2)]
    except Exception as error:
        return _apart(f"batches of another size fail ({in_one_line(error)})")
    found = _judged(function, parts, alone, joined, again)
    if not found.joins or len(many) == few:
        return found
    return _with_many(function, many, joined) or found


def _with_many(
    function: ModelComputeFunction, many: torch.Tensor, first: torch.Tensor
) -> Joining | None:
    """Why a large batch cannot be joined where a small one can; None if it can.

    Some models have room for so many rows only, or take another way for many of them. A batch that fails is
    no matter of rows: that is for verification to say.

    Args:
        first: what the model answered to as many of the first rows.
    """
    few = len(first)
    try:
        joined, last = _run(function, many), _run(function, many[-few:])
    except Exception:
        return None
    if len(joined) == len(many):
        ends = torch.cat([joined[:few], joined[-few:]])
        if alike(torch.cat([first, last]), ends, rounding_of(function)):
            return None
    return _apart(f"rows are answered differently in a batch of {len(many)}")


def _judged(
    function: ModelComputeFunction,
    parts: Sequence[int],
    alone: Sequence[torch.Tensor],
    joined: torch.Tensor,
    again: Sequence[torch.Tensor],
) -> Joining:
    rounding = rounding_of(function)
    if not all(bool(answer.isfinite().all()) for answer in alone):
        return _apart("its answers have values that are not finite, which cannot be compared")
    if not all(alike(alone[0], answer, rounding) for answer in again):
        return _apart("it answers the same input differently from call to call")
    if any(answer.dim() == 0 for answer in alone):
        return _apart("its output has no dimension of rows")
    # Rows must be as many, too: two answers of twice the rows fit together as well, and are no rows.
    as_many = all(len(answer) == rows for answer, rows in zip(alone, parts, strict=True))
    together = torch.cat(list(alone)) if as_many and _fit(alone) else None
    if together is None or together.shape != joined.shape:
        return _apart("the first dimension of its output is not that of its input")
    if not alike(together, joined, rounding):
        difference = (together.double() - joined.double()).abs().max().item()
        return _apart(f"rows that are joined are answered differently (by {difference:.3g})")
    return Joining(True, "requests of equal shape are joined into batches")


def _apart(why: str, *, lasts: bool = True) -> Joining:
    return Joining(False, f"requests are not joined into batches: {why}", lasts)


def _fit(answers: Sequence[torch.Tensor]) -> bool:
    return len({answer.shape[1:] for answer in answers}) == 1


def alike(one: torch.Tensor, other: torch.Tensor, rounding: float) -> bool:
    """Whether two answers are the same up to rounding, which is a part of the largest value."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    # What is not finite says nothing about rows, and is alike to nothing.
    if not bool(one.isfinite().all()):
        return False
    size = one.double().abs()
    usual = size[size < _FILL]
    scale = usual.max().item() if usual.numel() else 0.0
    return bool(torch.allclose(other.double(), one.double(), rtol=rounding, atol=rounding * scale))


def rounding_of(function: ModelComputeFunction) -> float:
    """How much two answers of a model may differ, as a part of the largest value.

    By that of the coarsest dtype that the model computes in.
    """
    dtypes = {p.dtype for p in function.model.parameters()} | {torch.float32}
    if function.computes_in is not None:
        dtypes.add(function.computes_in)
    return max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes)


def random_input(function: ModelComputeFunction, shape: tuple[int, ...]) -> torch.Tensor:
    """An input of that shape, on the CPU; the same in each run."""
    draw = torch.Generator().manual_seed(sum(shape))
    if function.input_dtype.is_floating_point:
        return torch.randn(shape, generator=draw)
    if function.input_dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=draw).float()
    vocabulary = function.get_info().get("vocabulary")
    return torch.randint(0, vocabulary if isinstance(vocabulary, int) else 2, shape, generator=draw)


def _run(function: ModelComputeFunction, x: torch.Tensor) -> torch.Tensor:
    return invoke(function, x.clone()).output.detach().to("cpu", copy=True)
