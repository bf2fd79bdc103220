"""What a forward takes: told from two small ones, equal to what a large one really took."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.loaders.adapters import CallOptions, adapt
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.runtime import activations
from splitlearn_manager.runtime.activations import Forward, between, measure_activations
from splitlearn_manager.runtime.thread import ThreadRuntime
from splitlearn_manager.runtime.warmup import first_input, warm_up
from support.models import model_config, save_mlp, tiny_bert, tiny_gpt2, tiny_vit

MB = 2**20


class Dequantized(nn.Module):
    """Its weights are in 8 bits and unpacked for each forward: what takes most depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(512, 512, dtype=torch.int8))
        self.head = nn.Linear(512, 4000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ self.packed.float())


class Pairwise(nn.Module):
    """Compares all inputs of a batch with each other, which no line describes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return torch.cdist(y, y)


class OneAtATime(nn.Module):
    """Takes one input, and no batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.error = error
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if x.shape[0] > 1:
            raise self.error
        return self.first(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64))


def function_of(module: nn.Module) -> ModelComputeFunction:
    return ModelComputeFunction(adapt(module.eval(), CallOptions()))


def measured(module: nn.Module, *shape: int, **options: object) -> activations.Activations | None:
    """What is measured after a warm-up with the shape."""
    function, config = function_of(module), model_config("m.pt", **options)
    function.compute(first_input(function, shape))
    return measure_activations(function, config, shape)


def really_taken_mb(module: nn.Module, *shape: int) -> float:
    found = activations._forward(function_of(module), shape)
    assert found is not None
    return found.peak / MB


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (mlp(), (1, 64)),
        (nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)), (1, 3, 64, 64)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2), (1, 8, 32)),
        (Dequantized(), (1, 512)),
        (mlp().bfloat16(), (1, 64)),
        (torch.jit.script(mlp()), (1, 64)),
        (torch.jit.trace(mlp().eval(), torch.zeros(3, 64)), (1, 64)),
    ],
    ids=["mlp", "convolutions", "encoder", "dequantized", "bfloat16", "scripted", "traced"],
)
def test_two_small_forwards_tell_what_a_large_one_takes(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    found = measured(module, *shape)
    assert found is not None
    for batch in (1, 7, 32, 100):
        taken_mb = really_taken_mb(module, batch, *shape[1:])
        assert found.mb(batch) == pytest.approx(taken_mb, rel=0.05), batch


@pytest.mark.parametrize("save", [tiny_bert, tiny_gpt2, tiny_vit])
def test_transformers_models_too(tmp_path: Path, save: object) -> None:
    assert callable(save)
    save(tmp_path)
    config = model_config(tmp_path)
    module = ModelLoader().load(config, "cpu").module
    function = ModelComputeFunction(module)
    shape = warm_up(function, config).shape
    assert shape is not None
    found = measure_activations(function, config, shape)
    real = activations._forward(function, (32, *shape[1:]))
    assert found is not None
    assert real is not None
    assert found.mb(32) == pytest.approx(real.peak / MB, rel=0.05)


def test_an_mlp_takes_what_its_tensors_take() -> None:
    """Input, hidden layer and its ReLU at the same time, as 4 bytes a value, and no weights."""
    found = measured(mlp(), 1, 64)
    assert found is not None
    assert found.mb(32) == 32 * (64 + 2 * 1024) * 4 / MB


def test_which_moment_takes_most_may_depend_on_the_batch() -> None:
    """Seen: only the peaks of both forwards compared, and a batch of 1,000 was thought to cost nothing."""
    found = measured(Dequantized(), 1, 512)
    assert found is not None
    assert len(found.lines) == 2
    assert found.mb(1) == pytest.approx(1.0, abs=0.1)  # the unpacked weights
    assert found.mb(1000) == pytest.approx(1000 * (512 + 512 + 4000) * 4 / MB, rel=0.01)


def test_what_grows_faster_than_its_batch_is_at_least_what_a_line_says() -> None:
    found = measured(Pairwise(), 1, 16)
    assert found is not None
    assert 0 < found.mb(32) < 1


@pytest.mark.parametrize("error", [ValueError("one at a time"), SystemExit(3)])
def test_a_model_that_takes_no_batch_serves_all_the_same(error: BaseException) -> None:
    module = OneAtATime(error)
    found = measured(module, 1, 16)
    assert found is not None
    assert found.mb(1) == found.mb(32) == 2 * 16 * 4 / MB
    assert module.calls == 3  # that of warm-up, and two


def test_a_model_that_cannot_be_measured_serves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mlp(tmp_path / "m.pt")

    def fails(self: object) -> None:
        raise RuntimeError("Profiler is already enabled on this thread")

    monkeypatch.setattr(activations._Recording, "__enter__", fails)
    running = ThreadRuntime(ModelLoader()).start(model_config(tmp_path / "m.pt"), "cpu")
    assert running.measure_activations() is None
    assert isinstance(running.compute_function.compute(torch.rand(3, 8)), torch.Tensor)


def test_without_a_warmup_nothing_is_run(tmp_path: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    config = model_config(tmp_path / "m.pt", warmup=False)
    running = ThreadRuntime(ModelLoader()).start(config, "cpu")
    assert running.measure_activations() is None


class Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.seen: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(list(x.shape))
        return self.inner(x)


@pytest.mark.parametrize(
    ("declared", "tried"),
    [
        (None, [[1, 4], [2, 4]]),
        ([-1, 4], [[1, 4], [2, 4]]),
        ([1, 4], [[1, 4], [2, 4]]),
        ([6, 4], [[3, 4], [6, 4]]),  # an example: no larger one is tried
        ([6, -1, 4], [[6, 8, 4]]),  # requests have just that batch
    ],
)
def test_no_forward_is_larger_than_it_must_be(
    declared: list[int] | None, tried: list[list[int]]
) -> None:
    module = Watched()
    function = function_of(module)
    config = model_config("m.pt", config={} if declared is None else {"input_shape": declared})
    shape = warm_up(function, config).shape
    assert shape is not None
    module.seen.clear()
    assert measure_activations(function, config, shape) is not None
    assert module.seen == tried


def test_ids_are_as_long_as_the_config_allows(tmp_path: Path) -> None:
    tiny_bert(tmp_path)

    def taken_mb(**options: object) -> float:
        config = model_config(tmp_path, config=options)
        running = ThreadRuntime(ModelLoader()).start(config, "cpu")
        found = running.measure_activations()
        running.close()
        assert found is not None
        return found.mb(32)

    short_mb, long_mb = taken_mb(), taken_mb(max_sequence_length=32)
    assert 3 * short_mb < long_mb < 5 * short_mb  # 32 ids, not 8
    assert taken_mb(max_sequence_length=32, input_shape=[-1, -1]) == long_mb
    assert taken_mb(max_sequence_length=32, input_shape=[-1, 8]) == short_mb


def test_forwards_of_other_threads_are_not_counted() -> None:
    import threading

    alone = measured(mlp(), 1, 64)
    stop = threading.Event()
    busy = function_of(nn.Sequential(nn.Linear(64, 8192), nn.Linear(8192, 64)))

    def keep_busy() -> None:
        while not stop.is_set():
            busy.compute(torch.zeros(64, 64))

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        assert measured(mlp(), 1, 64) == alone
    finally:
        stop.set()
        thread.join()


# Lines through two forwards.


def taken(batch: int, *in_use_mb: float) -> Forward:
    return Forward(batch, tuple(int(mb * MB) for mb in in_use_mb))


def test_the_highest_of_the_moments_counts_for_each_batch() -> None:
    found = between(taken(1, 5, 4, 1, 0), taken(2, 5, 5, 3, 0))
    assert found.lines == ((5.0, 0.0), (3.0, 1.0), (-1.0, 2.0))
    assert [found.mb(batch) for batch in (1, 2, 3, 4, 10)] == [5.0, 5.0, 6.0, 7.0, 19.0]


def test_forwards_that_work_differently_are_compared_by_their_peaks() -> None:
    found = between(taken(2, 1, 3, 0), taken(4, 1, 2, 4, 2, 0))
    assert found.lines == ((2.0, 0.5),)


def test_what_takes_less_for_a_larger_batch_is_thought_to_take_as_much() -> None:
    assert between(taken(1, 4), taken(2, 3)).lines == ((4.0, 0.0),)


def test_a_forward_that_takes_nothing_takes_nothing() -> None:
    assert between(taken(1), taken(2)).mb(32) == 0.0
