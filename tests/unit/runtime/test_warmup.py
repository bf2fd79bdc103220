"""Warm-up: known shapes must work, guessed ones are a bonus, and what was tried is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.loaders.adapters import CallOptions, adapt
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, TerminalLoadError, WarmupFailed
from splitlearn_manager.runtime.warmup import Warmup, concrete, guessed_shapes, warm_up
from support.models import model_config, tiny_bert, tiny_gpt2, tiny_roberta, tiny_vit


class Watched(nn.Module):
    """Remembers the inputs that it saw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.inner(x)


class FirstOf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def run(module: nn.Module, **keys: object) -> tuple[Warmup, list[torch.Tensor]]:
    watched = Watched(module)
    function = ModelComputeFunction(adapt(watched, CallOptions()))
    return warm_up(function, model_config("m.pt", **keys)), watched.seen


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(7, 2), (1, 7)),
        (nn.Sequential(nn.Linear(7, 2), nn.AvgPool2d(1)), (1, 1, 7)),
        (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(5, 2)), (1, 5)),
        (nn.Conv1d(4, 2, 3), (1, 4, 32)),
        (nn.Conv2d(4, 2, 3, groups=2), (1, 4, 32, 32)),
        (nn.Sequential(nn.Conv2d(1, 1, 64), nn.ReLU()), (1, 1, 224, 224)),
        (nn.Conv3d(1, 2, 3), (1, 1, 32, 32, 32)),
        (FirstOf(nn.LSTM(6, 2)), (1, 1, 6)),
        (FirstOf(nn.LSTMCell(6, 2)), (1, 6)),
        (nn.LayerNorm((3, 4)), (1, 1, 3, 4)),
        (nn.BatchNorm1d(9), (1, 9)),
        (nn.BatchNorm2d(9), (1, 9, 32, 32)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 1, 8)),
        (nn.Linear(7, 2).double(), (1, 7)),
        (torch.jit.script(nn.Linear(7, 2)), (1, 7)),
    ],
)
def test_a_shape_is_guessed_from_the_first_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    warmup, seen = run(module.eval())
    assert warmup == Warmup(shape)
    assert tuple(seen[-1].shape) == shape


@pytest.mark.parametrize("size", [1, 2, 50])
def test_ids_are_within_the_vocabulary(size: int) -> None:
    warmup, seen = run(nn.Embedding(size, 3))
    assert warmup.warmed
    assert seen[0].shape == (1, 8)
    assert seen[0].dtype is torch.int64
    assert seen[0].max() < size


def test_a_model_that_no_guess_fits_serves_with_a_note_of_what_was_tried() -> None:
    warmup, _ = run(nn.Sequential(nn.Linear(7, 2), nn.Conv2d(9, 1, 1)))
    assert not warmup.warmed
    (note,) = warmup.notes
    assert note.startswith("not warmed up: give config.input_shape (tried [1, 7]: RuntimeError: ")
    assert "; [1, 1, 7]: RuntimeError: " in note
    unknown, seen = run(nn.ReLU())
    assert unknown == Warmup(None, ("not warmed up: give config.input_shape",))
    assert seen == []


def test_input_shape_is_used_as_it_is() -> None:
    warmup, seen = run(nn.Linear(7, 2), config={"input_shape": [3, 5, 7]})
    assert warmup == Warmup((3, 5, 7))
    assert [tuple(x.shape) for x in seen] == [(3, 5, 7)]


def test_free_dimensions_get_a_size() -> None:
    assert concrete((-1, 4)) == (1, 4)
    assert concrete((-1, -1, 4)) == (1, 8, 4)
    assert concrete((2, -1)) == (2, 8)
    _, seen = run(nn.Linear(7, 2), config={"input_shape": [-1, -1, 7]})
    assert tuple(seen[0].shape) == (1, 8, 7)


def test_a_model_that_cannot_take_its_own_input_shape_is_not_served() -> None:
    with pytest.raises(WarmupFailed) as caught:
        run(nn.Linear(7, 2), config={"input_shape": [1, 6]})
    message = caught.value.message
    assert "'m'" in message
    assert "[1, 6]" in message
    assert "RuntimeError: mat1 and mat2" in message
    assert "\n" not in message
    assert not isinstance(caught.value, TerminalLoadError)


def test_a_torchscript_model_that_cannot_take_its_own_input_shape_says_what_is_wrong() -> None:
    function = ModelComputeFunction(adapt(torch.jit.script(nn.Linear(7, 2)), CallOptions()))
    with pytest.raises(WarmupFailed, match="RuntimeError: mat1 and mat2 shapes") as caught:
        warm_up(function, model_config("m.pt", config={"input_shape": [1, 6]}))
    assert "TorchScript interpreter" not in caught.value.message


def test_warmup_false_runs_nothing() -> None:
    warmup, seen = run(nn.Linear(7, 2), warmup=False)
    assert warmup == Warmup()
    assert not warmup.warmed
    assert seen == []


def test_an_answer_that_is_not_finite_is_noted() -> None:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.bias, float("nan"))
    warmup, _ = run(module)
    assert warmup == Warmup((1, 2), ("its first answer has values that are not finite",))


def test_a_wrong_output_name_is_told_as_such() -> None:
    module = adapt(nn.Linear(7, 2), CallOptions(output="logits"))
    for options in ({}, {"input_shape": [1, 7]}):
        with pytest.raises(InvalidModel, match="'logits'"):
            warm_up(ModelComputeFunction(module), model_config("m.pt", config=options))


@pytest.mark.parametrize("save", [tiny_bert, tiny_gpt2, tiny_roberta, tiny_vit])
def test_transformers_models_need_no_input_shape(tmp_path: Path, save: object) -> None:
    assert callable(save)
    save(tmp_path)
    config = model_config(tmp_path)
    module = ModelLoader().load(config, "cpu").module
    (shape,) = guessed_shapes(module)
    assert shape == ((1, 3, 16, 16) if save is tiny_vit else (1, 8))
    assert warm_up(ModelComputeFunction(module), config) == Warmup(shape)
