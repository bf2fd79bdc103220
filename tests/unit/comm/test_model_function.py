"""An nn.Module as a compute function: inference, with and without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from splitlearn_comm.core import ComputeFailed, InvalidRequest, ModelComputeFunction, invoke
from support.comm_models import Attention


def test_answer_is_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    function = ModelComputeFunction(model)
    x = torch.randn(3, 4)
    assert torch.equal(function.compute(x), model.eval()(x))


def test_model_is_served_in_eval_mode_without_autograd() -> None:
    seen: list[bool] = []

    class Watching(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend([self.training, torch.is_inference_mode_enabled()])
            return super().forward(x)

    output = ModelComputeFunction(Watching(4, 2).train()).compute(torch.ones(1, 4))
    assert seen == [False, True]
    assert not output.requires_grad


class AnswersInOnePlace(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.place = torch.zeros(size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.place if len(x) == len(self.place) else self.place[: len(x)]
        return place.copy_(x)


@pytest.mark.parametrize("size", [2, 8])
def test_an_answer_stays_when_the_model_writes_the_next_one_to_the_same_place(size: int) -> None:
    function = ModelComputeFunction(AnswersInOnePlace(size))
    ones = function.compute(torch.ones(2, 4))
    function.compute(torch.zeros(2, 4))
    assert isinstance(ones, torch.Tensor)
    assert ones.eq(1).all()


def test_an_answer_stays_when_the_model_writes_the_next_one_to_the_same_array() -> None:
    place = np.zeros((2, 4), np.float32)

    class AnswersInAnArray(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            place[:] = x.numpy()
            return torch.from_numpy(place)

    function = ModelComputeFunction(AnswersInAnArray())
    ones = function.compute(torch.ones(2, 4))
    function.compute(torch.zeros(2, 4))
    assert isinstance(ones, torch.Tensor)
    assert ones.eq(1).all()


def test_an_answer_that_the_model_does_not_keep_is_not_copied() -> None:
    places: list[int] = []

    class Tells(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer = super().forward(x)[:1]
            places.append(answer.data_ptr())
            return answer

    answer = ModelComputeFunction(Tells(4, 2)).compute(torch.ones(2, 4))
    assert isinstance(answer, torch.Tensor)
    assert places == [answer.data_ptr()]


def test_token_ids_sent_as_floats_reach_the_model_as_integers() -> None:
    model = nn.Embedding(10, 4)
    output = ModelComputeFunction(model).compute(torch.tensor([[1.0, 9.0]]))
    assert torch.equal(output, model.weight[torch.tensor([[1, 9]])])


def test_exported_program_is_served() -> None:
    model = nn.Linear(4, 2).eval()
    x = torch.randn(1, 4)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(ModelComputeFunction(exported).compute(x), model(x))


def test_cached_steps_agree_with_one_whole_pass() -> None:
    model = Attention()
    function = ModelComputeFunction(model)
    x = torch.randn(2, 5, 4)
    whole = invoke(function, x).output
    first = invoke(function, x[:, :3], use_cache=True)
    rest = invoke(function, x[:, 3:], first.present, use_cache=True)
    assert first.present is not None
    assert first.present[0][0].shape == (2, 2, 3, 2)
    assert torch.allclose(torch.cat([first.output, rest.output], 1), whole, atol=1e-6)
    assert rest.present is not None
    assert rest.present[0][0].shape == (2, 2, 5, 2)


def test_cache_comes_back_in_the_dtype_of_the_weights() -> None:
    function = ModelComputeFunction(Attention().double())
    first = invoke(function, torch.randn(1, 3, 4), use_cache=True)
    assert first.present is not None
    sent = tuple((k.float(), v.float()) for k, v in first.present)
    assert invoke(function, torch.randn(1, 1, 4), sent).output.dtype is torch.float64


def test_model_without_cache_ignores_the_wish_and_refuses_the_cache() -> None:
    function = ModelComputeFunction(nn.Linear(4, 2), model_name="plain")
    x = torch.ones(1, 4)
    assert invoke(function, x, use_cache=True).present is None
    with pytest.raises(InvalidRequest, match="'plain' takes none"):
        invoke(function, x, ((x, x),))


def test_model_that_takes_only_one_cache_argument_has_no_cache() -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            assert not use_cache
            return x

    function = ModelComputeFunction(Half())
    assert invoke(function, torch.ones(1), use_cache=True).present is None


@pytest.mark.parametrize(
    ("value", "name"),
    [((torch.ones(1), torch.ones(1)), "tuple"), ({"a": 1}, "dict"), (None, "NoneType")],
)
def test_model_that_returns_no_tensor_is_refused_by_type(value: object, name: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return value

    with pytest.raises(ComputeFailed, match=f"returned a {name}; expected a tensor"):
        ModelComputeFunction(Odd()).compute(torch.ones(1))


def test_shape_is_checked_only_where_a_dimension_is_free() -> None:
    with pytest.raises(InvalidRequest, match=r"\[1, 3\].*\[-1, 4\]"):
        ModelComputeFunction(nn.Identity(), input_shape=[-1, 4]).compute(torch.ones(1, 3))
    assert ModelComputeFunction(nn.Identity(), input_shape=[1, 4]).compute(
        torch.ones(1, 3)
    ).shape == (1, 3)


def test_info_says_what_is_served() -> None:
    function = ModelComputeFunction(nn.Embedding(10, 4), "cpu", "words", input_shape=(-1, -1))
    assert function.get_info() == {
        "name": "words",
        "device": "cpu",
        "model_class": "Embedding",
        "parameters": 40,
        "input_dtype": "int64",
        "key_value_cache": False,
        "kept_forwards": 0,
        "vocabulary": 10,
        "input_shape": [-1, -1],
    }
    assert ModelComputeFunction(nn.Linear(1, 1)).get_info()["name"] == "Linear"


def test_a_stand_in_answers_inference_and_nothing_else() -> None:
    function = ModelComputeFunction(nn.Linear(2, 2))
    x = torch.rand(3, 2)
    plain = function.compute(x)
    function.stand_in(lambda prepared: prepared * 100)
    assert torch.equal(function.compute(x), x * 100)  # type: ignore[arg-type]
    assert torch.equal(function.forward_for_training(x, "f"), plain)  # type: ignore[arg-type]
    function.stand_in(None)
    assert torch.equal(function.compute(x), plain)  # type: ignore[arg-type]
    assert not function.trained_past_stand_in


def test_a_step_ends_a_stand_in_and_a_backward_alone_does_not() -> None:
    model = nn.Linear(2, 2)
    function = ModelComputeFunction(model)
    function.stand_in(lambda prepared: prepared * 100)
    x = torch.rand(3, 2)
    for learning_rate, ended in ((None, False), (0.1, True)):
        grad = torch.ones_like(function.forward_for_training(x, "f"))
        function.backward("f", grad, learning_rate)
        assert function.trained_past_stand_in is ended
    with torch.inference_mode():
        assert torch.equal(function.compute(x), model(x))  # type: ignore[arg-type]
