"""Optimized models answer as the plain ones do, for all shapes and values; and the best of them is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.runtime.optimize.agreement import difference
from splitlearn_manager.runtime.optimize.choosing import PLAIN, WORTH_IT, Trial, fastest
from splitlearn_manager.runtime.optimize.compiled import Compiled
from splitlearn_manager.runtime.optimize.examples import examples
from splitlearn_manager.runtime.optimize.frozen import Frozen
from splitlearn_manager.runtime.optimize.lower import Lowered
from support.models import model_config
from support.optimizable import SHAPES, built, needs_compiler

TOLERANCE = 1e-4
IN_BFLOAT16 = 0.05
Form = Callable[[torch.Tensor], torch.Tensor]


class BySize(nn.Module):
    """Another answer for each of several batches: what a trace would take from its example alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return x * 2
        return x * 3 if x.shape[0] > 5 else x * x.shape[0] + x.mean()


@pytest.fixture(scope="module")
def prepared(
    compiled: Path,
) -> Callable[[str, str], tuple[ModelComputeFunction, Form]]:
    """A model of a kind, plain, and in a form; each is made once."""
    made: dict[tuple[str, str], tuple[ModelComputeFunction, Form]] = {}

    def prepare(kind: str, form: str) -> tuple[ModelComputeFunction, Form]:
        if (kind, form) not in made:
            module, shape = (
                (BySize(), (-1, 8)) if kind == "by size" else (built(kind), SHAPES[kind])
            )
            function = ModelComputeFunction(module.eval())
            config = model_config("m.pt", batch_size=6, config={"input_shape": list(shape)})
            sizes = (1, *(12 if size == -1 else size for size in shape[1:]))
            candidate = {
                "freeze": lambda: Frozen(function, TOLERANCE),
                "bfloat16": lambda: Lowered(function),
                "compile": lambda: Compiled(function, compiled),
            }[form]()
            candidate.prepare(function, examples(function, config, sizes, 1.0))  # type: ignore[attr-defined]
            made[kind, form] = (function, candidate)  # type: ignore[assignment]
        return made[kind, form]

    return prepare


def drawn(kind: str, data: st.DataObject) -> torch.Tensor:
    """An input of any batch and size; some of them are none that the model takes."""
    batch = data.draw(st.integers(0, 13), "batch")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    if kind == "transformer":
        return torch.randint(0, 20, (batch, data.draw(st.integers(1, 34))), generator=generator)
    if kind == "convolution":
        height, width = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
        return torch.randn(batch, 3, height, width, generator=generator)
    return torch.randn(batch, 8, generator=generator) * data.draw(
        st.sampled_from([1e-3, 1.0, 50.0])
    )


def outcome(function: ModelComputeFunction, form: Form | None, x: torch.Tensor) -> object:
    function.stand_in(form)
    try:
        return function.compute(x.float())
    except Exception as error:
        return type(error).__name__
    finally:
        function.stand_in(None)


def check(
    prepared: Callable[[str, str], tuple[ModelComputeFunction, Form]],
    kind: str,
    form: str,
    data: st.DataObject,
    tolerance: float = TOLERANCE,
    *,
    of_largest: bool = False,
) -> None:
    """With `of_largest` each value may be apart by so much of the largest of the answer."""
    function, candidate = prepared(kind, form)
    x = drawn(kind, data)
    plain = outcome(function, None, x)
    found = outcome(function, candidate, x)
    if isinstance(plain, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        scale = float(plain.abs().max().clamp(min=1)) if of_largest and plain.numel() else 1.0
        assert difference(found / scale, plain / scale) <= tolerance
    else:
        assert not isinstance(found, torch.Tensor)


@pytest.mark.parametrize("kind", [*sorted(SHAPES), "by size"])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_frozen_models_answer_as_the_plain_ones(
    prepared: Callable[[str, str], tuple[ModelComputeFunction, Form]],
    kind: str,
    data: st.DataObject,
) -> None:
    """Seen to fail with eps = 0 where a norm is folded, and with a program that is taken for all shapes."""
    check(prepared, kind, "freeze", data)


@needs_compiler
@pytest.mark.parametrize("kind", [*sorted(SHAPES), "by size"])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_compiled_models_answer_as_the_plain_ones(
    prepared: Callable[[str, str], tuple[ModelComputeFunction, Form]],
    kind: str,
    data: st.DataObject,
) -> None:
    """Seen to fail with torch's checks of the input left out (`skip_all_guards_unsafe`)."""
    check(prepared, kind, "compile", data)


@pytest.mark.parametrize("kind", sorted(SHAPES))
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_models_in_bfloat16_answer_nearly_as_the_plain_ones(
    prepared: Callable[[str, str], tuple[ModelComputeFunction, Form]],
    kind: str,
    data: st.DataObject,
) -> None:
    """Seen to fail with an answer that stays bfloat16, and with ids that become bfloat16.

    What is rounded is what a value is the sum of: a small value may be the sum of large ones.
    """
    check(prepared, kind, "bfloat16", data, IN_BFLOAT16, of_largest=True)


numbers = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.floats(0, 3))
def test_answers_agree_exactly_where_the_formula_says(
    values: list[tuple[float, float]], tolerance: float
) -> None:
    """Seen to fail with a difference relative to the optimized answer, and with NaN passed over."""

    def within(one: float, other: float) -> bool:
        if not (math.isfinite(one) and math.isfinite(other)):
            return one == other or (math.isnan(one) and math.isnan(other))
        return abs(one - other) / (1 + abs(other)) <= tolerance

    optimized = torch.tensor([one for one, _ in values], dtype=torch.float64)
    plain = torch.tensor([other for _, other in values], dtype=torch.float64)
    assert (difference(optimized, plain) <= tolerance) == all(within(*pair) for pair in values)


names = st.sampled_from(["freeze", "bfloat16", "compile"])
trials = st.builds(
    Trial,
    st.tuples(*[st.floats(0.01, 100)] * 3),
    st.floats(0, 2e-3) | st.just(math.inf),
    st.sampled_from(["", "", "NoCompiler"]),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, trials), st.tuples(*[st.floats(0.01, 100)] * 3), st.floats(0, 2e-3))
def test_the_form_that_is_taken_agrees_and_none_that_agrees_is_faster(
    tried: dict[str, Trial], plain_ms: tuple[float, ...], tolerance: float
) -> None:
    """Seen to fail with the slowest taken, and with a form taken that is farther than the tolerance."""

    def share(name: str) -> float:
        return math.prod(tried[name].ms) / math.prod(plain_ms)

    agreeing = [n for n, t in tried.items() if not t.problem and t.apart <= tolerance]
    taken = fastest({PLAIN: Trial(plain_ms), **tried}, tolerance)
    if taken == PLAIN:
        assert all(share(name) > WORTH_IT**3 * (1 - 1e-9) for name in agreeing)
    else:
        assert taken in agreeing
        assert share(taken) <= WORTH_IT**3 * (1 + 1e-9)
        assert all(share(taken) <= share(name) * (1 + 1e-9) for name in agreeing)
