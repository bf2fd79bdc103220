"""How user code's compute functions are called, whatever their signature and their answer."""

from __future__ import annotations

import inspect
from unittest import mock

import pytest
import torch

from splitlearn_comm.core import ComputeFailed, ComputeFunction, InvalidRequest, Unsupported, invoke
from support.comm_models import Doubler

ONES = torch.ones(1, 2)
PAST = ((torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)),)


class Caching(ComputeFunction):
    def compute(self, input_tensor, past_key_values=None, use_cache=False, **kwargs):
        self.got = (past_key_values, use_cache, kwargs)
        return (input_tensor, [[ONES, ONES]]) if use_cache else input_tensor


class Required(ComputeFunction):
    def compute(self, input_tensor, past_key_values, use_cache):
        self.got = (past_key_values, use_cache)
        return input_tensor


class AnyKeyword(ComputeFunction):
    def compute(self, input_tensor, **kwargs):
        self.got = kwargs
        return input_tensor


class Returning(ComputeFunction):
    def __init__(self, value: object) -> None:
        self.value = value

    def compute(self, input_tensor):
        return self.value


def test_one_argument_function_gets_one_argument() -> None:
    computed = invoke(Doubler(), ONES, use_cache=True)
    assert torch.equal(computed.output, ONES * 2)
    assert computed.present is None


def test_one_argument_function_refuses_a_cache_that_it_would_ignore() -> None:
    function = Doubler()
    with pytest.raises(InvalidRequest, match="past_key_values"):
        invoke(function, ONES, PAST)
    assert function.calls == 0


def test_caching_function_gets_and_returns_the_cache() -> None:
    function = Caching()
    computed = invoke(function, ONES, PAST, use_cache=True)
    assert function.got == (PAST, True, {})
    assert computed.present == ((ONES, ONES),)
    assert invoke(function, ONES).present is None
    assert function.got == (None, False, {})


def test_required_cache_arguments_are_always_passed() -> None:
    function = Required()
    invoke(function, ONES)
    assert function.got == (None, False)


def test_keyword_catcher_gets_only_what_was_sent() -> None:
    function = AnyKeyword()
    invoke(function, ONES)
    assert function.got == {}
    invoke(function, ONES, PAST, use_cache=True)
    assert function.got == {"past_key_values": PAST, "use_cache": True}


def test_cache_that_was_not_asked_for_is_not_returned() -> None:
    assert invoke(Returning((ONES, PAST)), ONES).present is None
    assert invoke(Returning((ONES, None)), ONES).present is None


def test_signature_is_not_inspected_for_each_request() -> None:
    function = Caching()
    with mock.patch.object(inspect, "signature", side_effect=AssertionError("inspected")):
        invoke(function, ONES)
        invoke(function, ONES)


def test_subclass_that_does_not_define_compute_keeps_its_parents_form() -> None:
    class Child(Caching):
        pass

    assert invoke(Child(), ONES, PAST, use_cache=True).present is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NoneType"),
        ([1.0], r"list\[float\]"),
        ({"logits": ONES}, "dict"),
        ((ONES, ONES, ONES), r"tuple\[Tensor, Tensor, Tensor\]"),
        (("a", ONES), r"tuple\[str, Tensor\]"),
    ],
)
def test_answer_that_is_no_tensor_is_named(value: object, text: str) -> None:
    with pytest.raises(ComputeFailed, match=text):
        invoke(Returning(value), ONES)


@pytest.mark.parametrize("cache", [ONES, [ONES], [(ONES, None)], [(ONES, ONES, ONES)], 3])
def test_cache_that_is_no_pairs_of_tensors_is_refused(cache: object) -> None:
    class Bad(ComputeFunction):
        def compute(self, input_tensor, past_key_values=None, use_cache=False):
            return input_tensor, cache

    with pytest.raises(ComputeFailed, match="cache of"):
        invoke(Bad(), ONES, use_cache=True)


def test_training_is_refused_unless_defined() -> None:
    with pytest.raises(Unsupported, match="does not keep autograd graphs"):
        Doubler().forward_for_training(ONES, "a")
    with pytest.raises(Unsupported, match="does not keep autograd graphs"):
        Doubler().backward("a", ONES)


def test_optional_methods_have_defaults() -> None:
    class Minimal(ComputeFunction):
        def compute(self, input_tensor):
            return input_tensor

    function = Minimal()
    function.setup()
    function.teardown()
    assert function.get_info() == {"name": "Minimal"}


def test_compute_must_be_defined() -> None:
    with pytest.raises(TypeError, match="compute"):
        ComputeFunction()
