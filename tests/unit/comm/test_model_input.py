"""Which inputs a model takes, and what is said of those it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitlearn_comm.core import InvalidRequest, input_rule
from splitlearn_comm.core.lanes import Lane

CPU = Lane(torch.device("cpu"))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, **attributes: object) -> None:
        super().__init__()
        self.inner = inner
        for name, value in attributes.items():
            setattr(self, name, value)


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(4, 2), torch.float32),
        (nn.Linear(4, 2).to(torch.bfloat16), torch.bfloat16),
        (nn.Linear(4, 2).double(), torch.float64),
        (nn.Sequential(nn.Dropout(), nn.Embedding(10, 4)), torch.int64),
        (nn.EmbeddingBag(10, 4), torch.int64),
        (nn.Sequential(nn.Linear(4, 2), nn.Embedding(10, 4)), torch.float32),
        (nn.BatchNorm1d(4, affine=False).half(), torch.float16),
        (nn.ReLU(), torch.float32),
        (Wrapped(nn.Linear(4, 2), input_dtype=torch.int32), torch.int32),
        (Wrapped(nn.Linear(4, 2), input_dtype="int32"), torch.float32),
    ],
    ids=[
        "float32",
        "bfloat16",
        "float64",
        "embedding",
        "embedding bag",
        "embedding later",
        "buffers only",
        "nothing",
        "own attribute",
        "attribute of another kind",
    ],
)
def test_dtype_is_found_out_from_the_model(model: nn.Module, dtype: torch.dtype) -> None:
    assert input_rule(model).dtype is dtype


def test_given_dtype_goes_before_the_models_own() -> None:
    model = Wrapped(tokens(), input_dtype=torch.int32)
    assert input_rule(model, torch.float16).dtype is torch.float16


def test_scripted_embedding_is_known_as_one() -> None:
    rule = input_rule(torch.jit.script(tokens()))
    assert (rule.dtype, rule.vocabulary) == (torch.int64, 10)


def test_vocabulary_is_the_models_word_before_the_embeddings_size() -> None:
    assert input_rule(tokens()).vocabulary == 10
    assert input_rule(Wrapped(tokens(), vocab_size=7)).vocabulary == 7
    assert input_rule(nn.Linear(4, 2), torch.int64).vocabulary is None


def test_float_ids_become_integers() -> None:
    ids = input_rule(tokens()).convert(torch.tensor([[0.0, 9.0, 3.0]]), CPU)
    assert ids.dtype is torch.int64
    assert ids.tolist() == [[0, 9, 3]]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5], "fraction, or NaN"),
        ([float("nan")], "fraction, or NaN"),
        ([float("inf")], r"must lie in \[0, 9\]"),
        ([float("-inf")], r"must lie in \[0, 9\]"),
        ([0.0, 10.0], r"values from 0 to 10; .*vocabulary 10.* must lie in \[0, 9\]"),
        ([-1.0], r"must lie in \[0, 9\]"),
        ([1e30], r"must lie in \[0, 9\]"),
    ],
)
def test_values_that_are_no_ids_are_refused(values: list[float], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        input_rule(tokens()).convert(torch.tensor(values), CPU)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8]
)
def test_ids_may_arrive_in_any_dtype(dtype: torch.dtype) -> None:
    rule = input_rule(tokens())
    assert rule.convert(torch.tensor([0, 9]).to(dtype), CPU).tolist() == [0, 9]
    with pytest.raises(InvalidRequest):
        rule.convert(torch.tensor([10]).to(dtype), CPU)


@pytest.mark.parametrize(
    ("dtype", "value", "high"),
    [
        (torch.int32, 2.0**31, 2**31 - 1),
        (torch.int64, 2.0**63, 2**63 - 1),
        (torch.uint8, 256.0, 255),
        (torch.bool, 2.0, 1),
    ],
)
def test_integers_without_a_vocabulary_must_fit_their_dtype(
    dtype: torch.dtype, value: float, high: int
) -> None:
    with pytest.raises(InvalidRequest, match=rf"{high}\]"):
        input_rule(nn.Linear(4, 2), dtype).convert(torch.tensor([value]), CPU)


def test_input_without_elements_is_converted() -> None:
    assert input_rule(tokens()).convert(torch.empty(2, 0), CPU).dtype is torch.int64


def test_floats_are_converted_without_checks() -> None:
    rule = input_rule(nn.Linear(4, 2).half())
    assert rule.convert(torch.tensor([0.5, float("nan")]), CPU).dtype is torch.float16


@pytest.mark.parametrize("shape", [(1, 4), (7, 4), (0, 4)])
def test_free_dimension_takes_any_size(shape: tuple[int, ...]) -> None:
    rule = input_rule(nn.Linear(4, 2), input_shape=(-1, 4))
    assert rule.convert(torch.empty(shape), CPU).shape == shape


@pytest.mark.parametrize("shape", [(2, 5), (4,), (1, 2, 4), ()])
def test_shape_that_does_not_fit_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    rule = input_rule(nn.Linear(4, 2), input_shape=(-1, 4))
    with pytest.raises(InvalidRequest) as refused:
        rule.convert(torch.empty(shape), CPU)
    assert str(list(shape)) in refused.value.message
    assert "[-1, 4]" in refused.value.message
