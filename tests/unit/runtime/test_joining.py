"""Models whose rows are independent are found, and so are those whose rows are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.runtime.base import LoadedModel
from splitlearn_manager.runtime.joining import try_joining
from splitlearn_manager.runtime.thread import RunningInThreads
from support.models import model_config


class MeanOverTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0, keepdim=True)


class AlwaysTraining(nn.Module):
    """Keeps its BatchNorm in training mode, whatever mode it is put into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.norm.train()
        # One row has no variance; as such models do, it is passed on.
        return self.norm(x) if len(x) > 1 else x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


class Remembers(nn.Module):
    """Begins anew with each batch of another size than the last, as recurrent models for streams do."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(0, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.state) != len(x):
            self.state = torch.zeros(len(x), 4)
        self.state = self.state + x
        return self.state


class KeepsRandom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class MasksAValue(nn.Module):
    """Marks what may not be chosen by a huge number, and mixes its rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masked = x - x.mean(dim=0, keepdim=True)
        masked[:, 0] = torch.finfo(x.dtype).min
        return masked


class LooksAtItsNeighbour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-2 * x.roll(1, dims=0)


class LargeNumbers(nn.Module):
    """Of which the rounding alone is large: rows that are joined are rounded otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e9 + 1e5 * x + len(x)


class HasRoomForEight(nn.Module):
    """As a mixture of experts, of which each takes so many rows and no more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = x * 2
        answer[8:] = 0
        return answer


class MixesMany(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if len(x) <= 8 else x - x.mean(dim=0, keepdim=True)


class FailsForMany(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(8, 4)[: len(x)]


class OneSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, 4)


class InCoarseNumbers:
    """Stands in for a module, and answers rows that are joined as if it rounded them otherwise."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.computes_in = dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + (1e-3 if len(x) > 2 else 0.0)


class NoRows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


class Flattened(nn.Module):
    """Answers with a row for each position."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2)


class FindsNothing(nn.Module):
    """As a detector does in noise: its rows are what it found, in all of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(1) > 1e6]


class NotFinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def found(module: nn.Module, shape: tuple[int, ...] = (1, 4), batch_size: int = 32) -> str:
    joining = try_joining(ModelComputeFunction(module), shape, batch_size)
    assert joining.joins == (joining.note == "requests of equal shape are joined into batches")
    return joining.note


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (1, 4)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (1, 3, 8, 8)),
        (nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2)), (1, 5)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8)),
        (nn.Linear(4, 2).to(torch.bfloat16), (1, 4)),
        (LargeNumbers(), (1, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), (1, 4)),
        (nn.ReLU(inplace=True), (1, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_model_of_independent_rows_joins(
    module: nn.Module, shape: tuple[int, ...], batch_size: int
) -> None:
    assert "are joined" in found(module, shape, batch_size)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (MeanOverTheBatch(), "rows that are joined are answered differently"),
        (AlwaysTraining(), "answered differently"),
        (MasksAValue(), "rows that are joined are answered differently"),
        (LooksAtItsNeighbour(), "rows that are joined are answered differently"),
        (Counts(), "it answers the same input differently from call to call"),
        (Remembers(), "it answers the same input differently from call to call"),
        (KeepsRandom(), "it answers the same input differently from call to call"),
        (NotFinite(), "its answers have values that are not finite"),
        (OneSize(), "batches of another size fail (RuntimeError: shape '[1, 4]' is invalid"),
        (torch.jit.script(OneSize()), "(RuntimeError: shape '[1, 4]' is invalid"),
        (NoRows(), "its output has no dimension of rows"),
        (Flattened(), "the first dimension of its output is not that of its input"),
        (FindsNothing(), "the first dimension of its output is not that of its input"),
        (Transposed(), "the first dimension of its output is not that of its input"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_model_that_mixes_its_rows_is_found(module: nn.Module, why: str) -> None:
    note = found(module)
    assert note.startswith("requests are not joined into batches: ")
    assert why in note


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_model_that_mixes_its_rows_is_found_with_small_batches(batch_size: int) -> None:
    why = "rows that are joined are answered differently"
    assert why in found(MeanOverTheBatch(), batch_size=batch_size)


@pytest.mark.parametrize("module", [HasRoomForEight(), MixesMany()], ids=["room", "mixes"])
def test_a_model_that_answers_many_rows_differently_is_found(module: nn.Module) -> None:
    function = ModelComputeFunction(module)
    joining = try_joining(function, (1, 4), 32, 16)
    assert not joining.joins
    assert joining.note.endswith(": rows are answered differently in a batch of 16")
    assert try_joining(function, (1, 4), 32, 8).joins


def test_a_model_that_fails_for_many_rows_is_left_to_verification() -> None:
    assert try_joining(ModelComputeFunction(FailsForMany()), (1, 4), 32, 16).joins


def test_as_many_rows_are_tried_as_what_was_measured_allows() -> None:
    config = model_config("net:build", batch_size=32, config={"input_shape": [1, 4]})
    loaded = LoadedModel(MixesMany(), 0.0, "custom")
    function = ModelComputeFunction(loaded.module)
    running = RunningInThreads(loaded, function, config, "cpu", (), (1, 4))
    assert running.find_joining().joins  # nothing is known of its memory yet
    assert running.measure_activations() is not None
    assert not running.find_joining().joins


def test_what_is_not_known_or_not_wanted_is_not_joined() -> None:
    assert "it was not warmed up" in try_joining(ModelComputeFunction(nn.ReLU()), None, 32).note
    assert "batch_size was 1 when it was loaded" in found(nn.ReLU(), batch_size=1)


def test_a_model_that_takes_one_batch_only_by_its_config_is_not_joined() -> None:
    function = ModelComputeFunction(nn.ReLU(), input_shape=[1, -1])
    note = try_joining(function, (1, 8), 32).note
    assert "batches of another size fail (InvalidRequest: " in note


@pytest.mark.parametrize(("dtype", "joins"), [(torch.bfloat16, True), (None, False)])
def test_rounding_is_that_of_what_computes(dtype: torch.dtype | None, joins: bool) -> None:
    function = ModelComputeFunction(nn.Linear(4, 4))
    function.stand_in(InCoarseNumbers(dtype))
    assert try_joining(function, (1, 4), 8).joins is joins
