"""What `optimize` does with a loaded model: which form is taken, which is refused, and what is told."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.errors import (
    CannotOptimize,
    LoadError,
    OptimizedAnswersDiffer,
    TerminalLoadError,
)
from splitlearn_manager.runtime.optimize import choosing
from splitlearn_manager.runtime.optimize.agreement import difference
from splitlearn_manager.runtime.optimize.choosing import PLAIN, Optimized, Trial, fastest, optimize
from splitlearn_manager.runtime.optimize.examples import (
    Examples,
    examples,
    free_dimensions,
    used_batches,
)
from support.models import model_config
from support.optimizable import mlp, optimized

INPUT = (-1, 8)


class Altered:
    """A candidate that answers as the module does, but for what is added; it takes `ms` a call."""

    extra_mb = 2.0

    def __init__(self, clock: Clock, ms: float, added: float = 0.0) -> None:
        self._clock, self._ms, self._added = clock, ms, added
        self._module: nn.Module | None = None

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        inner = function.model.inner
        assert isinstance(inner, nn.Module)
        self._module = inner

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert self._module is not None
        self._clock.seconds += self._ms / 1e3
        answer: torch.Tensor = self._module(x)
        return answer + self._added


class WorksInPlace(nn.Module):
    """Writes into its input, as those do that bring images to a common scale."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.inner(x.sub_(0.5).div_(0.25))
        return answer


class Broken(Altered):
    """A candidate that cannot be made."""

    def prepare(self, function: ModelComputeFunction, examples: Examples) -> None:
        raise CannotOptimize("no compiler here", reason="NoCompiler")


class Clock:
    """Goes on only when a candidate is called, and a little when it is looked at."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1e-3
        return self.seconds


def auto(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Clock], dict[str, Altered]],
    **keys: object,
) -> tuple[ModelComputeFunction, Optimized]:
    clock = Clock()
    made = make(clock)
    monkeypatch.setattr(
        choosing, "CANDIDATES", {name: lambda *_, c=c: c for name, c in made.items()}
    )
    config = model_config("m.pt", config={"input_shape": [-1, 8]}, **{"optimize": "auto", **keys})
    slow = Altered(clock, 5.0)
    module = mlp()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            slow._module = module
            return slow(x)

    function = ModelComputeFunction(Slow())
    return function, optimize(function, config, (1, 8), 1.0, clock=clock)


# Which of them.


def test_the_fastest_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    function, found = auto(
        monkeypatch,
        lambda clock: {
            "freeze": Altered(clock, 2.0),
            "bfloat16": Altered(clock, 0.1, added=0.5),
            "compile": Altered(clock, 1.0),
        },
    )
    (note,) = found.notes
    assert note.startswith("optimize: auto took compile; ms for batches of 1/4/32: plain 6/6/6")
    assert "bfloat16 not: differs by " in note
    assert "compile 2/2/2" in note
    assert found.extra_mb == 2.0
    assert isinstance(function._stand_in, Altered)


def test_auto_keeps_the_plain_model_where_others_are_hardly_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, found = auto(monkeypatch, lambda clock: {"freeze": Altered(clock, 4.9)})
    assert function._stand_in is None
    assert found.extra_mb == 0.0
    assert "auto took plain, no other being 5% faster" in found.notes[0]


def test_auto_tells_why_a_form_could_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    function, found = auto(monkeypatch, lambda clock: {"compile": Broken(clock, 1.0)})
    assert function._stand_in is None
    assert "compile not: NoCompiler: no compiler here" in found.notes[0]


def test_a_form_that_is_asked_for_and_differs_is_refused_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(OptimizedAnswersDiffer, match=r"optimize_tolerance is 0\.001") as caught:
        auto(monkeypatch, lambda clock: {"freeze": Altered(clock, 1, added=0.1)}, optimize="freeze")
    assert caught.value.reason == "OptimizedAnswersDiffer"
    assert isinstance(caught.value, TerminalLoadError)


def test_the_tolerance_is_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    function, found = auto(
        monkeypatch,
        lambda clock: {"freeze": Altered(clock, 1, added=0.1)},
        optimize="freeze",
        optimize_tolerance=0.2,
    )
    assert function._stand_in is not None
    assert "(0.2 allowed)" in found.notes[0]


def test_only_the_mean_over_batches_decides() -> None:
    trials = {
        PLAIN: Trial((1.0, 10.0)),
        "freeze": Trial((0.5, 10.0)),
        "compile": Trial((0.9, 8.0)),
        "bfloat16": Trial((0.1, 0.1), apart=2e-3),
    }
    assert fastest(trials, 1e-3) == "freeze"
    assert fastest(trials, 2e-3) == "bfloat16"
    assert fastest({PLAIN: trials[PLAIN]}, 1e-3) == PLAIN


# What cannot be compared is not optimized.


@pytest.mark.parametrize("how", ["compile", "freeze"])
@pytest.mark.parametrize(("warmup", "why"), [(False, "warmup is off"), (True, "input_shape")])
def test_without_an_input_it_is_refused(how: str, warmup: bool, why: str) -> None:
    config = model_config("m.pt", optimize=how, warmup=warmup)
    with pytest.raises(CannotOptimize, match=why) as caught:
        optimize(ModelComputeFunction(mlp()), config, None, 1.0)
    assert caught.value.reason == "NoInputToOptimizeWith"


def test_auto_without_an_input_serves_the_plain_model_with_a_note() -> None:
    function = ModelComputeFunction(mlp())
    found = optimize(function, model_config("m.pt", optimize="auto", warmup=False), None, 1.0)
    assert "auto took the plain model" in found.notes[0]
    assert function._stand_in is None


class Counting(nn.Module):
    """Answers differently each time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        answer: torch.Tensor = self.inner(x) + self.calls
        return answer


def test_a_model_whose_answers_vary_is_refused() -> None:
    with pytest.raises(CannotOptimize) as caught:
        optimized(Counting(), "freeze", INPUT)
    assert caught.value.reason == "AnswersVary"


def test_none_and_bfloat16_need_no_input_and_touch_nothing() -> None:
    for how, notes in (("none", 0), ("bfloat16", 1)):
        function = ModelComputeFunction(mlp())
        found = optimize(function, model_config("m.pt", optimize=how, warmup=False), None, 1.0)
        assert len(found.notes) == notes
        assert function._stand_in is None


# Training.


def test_a_step_ends_the_stand_in_and_answers_are_of_the_new_weights() -> None:
    module = mlp()
    function, _ = optimized(module, "freeze", INPUT)
    assert function._stand_in is not None
    x = torch.rand(2, 8)
    before = function.compute(x)
    output = function.forward_for_training(x, "a")
    function.backward("a", torch.ones_like(output))
    assert function._stand_in is not None
    output = function.forward_for_training(x, "b")
    function.backward("b", torch.ones_like(output), learning_rate=0.5)
    assert function._stand_in is None
    assert function.trained_past_stand_in
    after = function.compute(x)
    assert isinstance(after, torch.Tensor)
    assert isinstance(before, torch.Tensor)
    assert torch.equal(after, module(x))
    assert not torch.allclose(after, before)


class Caching(nn.Module):
    """Has a key/value cache, and counts how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(
        self, x: torch.Tensor, past_key_values: object = None, use_cache: bool = False
    ) -> object:
        output = self.inner(x)
        key = torch.ones(len(x), 1, 1, 2)
        return (output, ((key, key),)) if use_cache else output


def test_calls_with_a_cache_are_the_plain_modules() -> None:
    function, _ = optimized(Caching(), "freeze", INPUT)
    stand_in = function._stand_in
    assert stand_in is not None
    asked: list[torch.Tensor] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return stand_in(x)

    function.stand_in(counted)
    x = torch.rand(2, 8)
    plain = function.compute(x)
    assert len(asked) == 1
    output, present = function.compute(x, use_cache=True)
    assert torch.equal(output, plain)  # type: ignore[arg-type]
    function.compute(x, past_key_values=present)  # type: ignore[arg-type]
    assert len(asked) == 1


# What agrees.


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.01], [0.0], 0.01),
        ([99.0], [100.0], 1 / 101),
        ([math.nan, math.inf], [math.nan, math.inf], 0.0),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([math.inf], [1.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1.0], [math.inf], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_difference_is_the_least_tolerance(
    one: list[float], other: list[float], apart: float
) -> None:
    found = difference(torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(apart, rel=1e-4)


def test_integers_must_be_the_same_and_dtypes_too() -> None:
    assert difference(torch.tensor([3]), torch.tensor([4])) == math.inf
    assert difference(torch.tensor([3]), torch.tensor([3])) == 0
    assert difference(torch.tensor([3.0]), torch.tensor([3.0], dtype=torch.float64)) == math.inf


# Inputs to try.


def test_batches_are_one_the_powers_of_two_and_the_largest() -> None:
    assert used_batches(1, 1) == (1,)
    assert used_batches(12, 12) == (1, 2, 4, 8, 12)
    assert used_batches(32, 10) == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("declared", "shape", "integers", "free"),
    [
        ((-1, 8), (1, 8), False, (0,)),
        ((4, -1), (4, 8), False, (1,)),
        ((1, 8), (1, 8), False, (0,)),
        (None, (1, 8), False, (0,)),
        (None, (1, 8), True, (0, 1)),
        ((-1, -1), (1, 8), True, (0, 1)),
    ],
)
def test_free_dimensions_are_those_that_may_vary(
    declared: tuple[int, ...] | None, shape: tuple[int, ...], integers: bool, free: tuple[int, ...]
) -> None:
    assert free_dimensions(declared, shape, integers=integers) == free


class Wide(nn.Module):
    """Takes 32 MB for each input of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] * self.weight).expand(len(x), 2**23).clone().sum(1)


def test_no_example_takes_much_more_memory_than_the_weights() -> None:
    function = ModelComputeFunction(Wide())
    config = model_config("m.pt", batch_size=4096, config={"input_shape": [-1, 2]})
    found = examples(function, config, (1, 2), 1.0)
    assert max(len(x) for x in found.inputs) == 4
    assert [len(x) for x in found.timed] == [1, 2, 4]


def test_sizes_that_the_model_does_not_take_are_left_out() -> None:
    def only_short(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise ValueError("too many")
        return x

    function = ModelComputeFunction(mlp())
    function.stand_in(only_short)
    config = model_config("m.pt", batch_size=8, config={"input_shape": [-1, 8]})
    found = examples(function, config, (1, 8), 1.0)
    assert [len(x) for x in found.inputs] == [2, 1]


def test_examples_are_the_same_each_time() -> None:
    config = model_config("m.pt", config={"input_shape": [-1, 8]})
    one, other = (examples(ModelComputeFunction(mlp()), config, (1, 8), 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))


# Memory.


def test_a_failure_of_a_candidate_is_a_load_error_for_who_asked() -> None:
    module = nn.Sequential(mlp(), Refusing())
    with pytest.raises(LoadError) as caught:
        optimized(module, "freeze", INPUT)
    assert caught.value.reason == "FreezeFailed"


class Refusing(nn.Module):
    """Decides by values, which no program can say in advance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x


@pytest.fixture
def only_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "CANDIDATES", {"bfloat16": choosing.CANDIDATES["bfloat16"]})


@pytest.mark.usefixtures("only_bfloat16")
def test_auto_measures_a_copy_in_bfloat16_and_drops_it() -> None:
    function, found = optimized(mlp(), "auto", INPUT, optimize_tolerance=0.0)
    assert "bfloat16 not: differs by" in found.notes[0]
    assert found.extra_mb == 0.0
    assert function.input_dtype is torch.float32


@pytest.mark.usefixtures("only_bfloat16")
def test_auto_takes_bfloat16_if_that_will_do() -> None:
    module = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 8)).eval()
    function, found = optimized(module, "auto", (-1, 2048), optimize_tolerance=0.1)
    x = torch.rand(3, 2048)
    answer = function.compute(x)
    assert isinstance(answer, torch.Tensor)
    assert answer.dtype is torch.float32
    assert difference(answer, module(x)) < 0.1
    if "auto took bfloat16" in found.notes[0]:
        assert found.extra_mb == pytest.approx(8, rel=0.1)


def test_rounds_are_few_for_a_slow_model() -> None:
    ticks = itertools.count(step=10)
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x

    function = ModelComputeFunction(mlp())
    candidate = type("C", (), {"__call__": staticmethod(counted), "extra_mb": 0.0})()
    choosing.timed(function, {"c": candidate}, (torch.rand(1, 8),), lambda: float(next(ticks)))
    assert len(calls) == 3


def test_a_model_that_writes_into_its_input_is_optimized_like_any_other() -> None:
    torch.manual_seed(0)
    module = WorksInPlace()
    function, told = optimized(module, "freeze", INPUT)
    assert told.notes[0].startswith("optimize: freeze in")
    x = torch.randn(5, 8)
    answer = function.compute(x.clone())
    assert isinstance(answer, torch.Tensor)
    assert difference(answer.clone(), module(x).detach()) < 1e-5
