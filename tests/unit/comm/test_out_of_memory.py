"""A forward pass for which there is no memory: known on every device, told with the batch, let go at once."""

from __future__ import annotations

import weakref

import pytest
import torch

from splitlearn_comm.core import InvalidRequest, OutOfMemory, Overloaded
from splitlearn_comm.core.out_of_memory import telling_out_of_memory


def test_the_request_is_told_which_model_and_how_large_its_batch_was() -> None:
    with pytest.raises(OutOfMemory) as told, telling_out_of_memory("m1", (64, 128)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
    assert isinstance(told.value, Overloaded)
    assert (told.value.batch, told.value.reason) == (64, "OutOfMemory")
    assert told.value.message == (
        "model 'm1' ran out of memory on a batch of 64 (shape [64, 128]): OutOfMemoryError: CUDA out of "
        "memory. Tried to allocate 2 GiB"
    )


def test_an_input_without_dimensions_is_a_batch_of_one() -> None:
    with pytest.raises(OutOfMemory) as told, telling_out_of_memory("m1", ()):
        raise MemoryError
    assert told.value.batch == 1
    assert told.value.message.endswith("on a batch of 1 (shape []): MemoryError")


def test_a_real_refusal_of_the_processors_allocator_is_known() -> None:
    with pytest.raises(OutOfMemory), telling_out_of_memory("m1", (2,)):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [ValueError("a shape"), InvalidRequest("no"), RuntimeError("no")])
def test_whatever_else_is_raised_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, telling_out_of_memory("m1", (2,)):
        raise error
    assert raised.value is error


def test_what_is_told_already_is_told_once() -> None:
    outer, inner = telling_out_of_memory("outer", (9,)), telling_out_of_memory("inner", (2,))
    with pytest.raises(OutOfMemory) as told, outer, inner:
        raise MemoryError
    assert told.value.batch == 2
    assert "inner" in told.value.message


def test_what_the_pass_had_allocated_is_gone_while_the_error_is_handled() -> None:
    """A cache can be emptied only of what nobody holds; seen to fail without the frames cleared."""
    allocated: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        partial = torch.ones(10)
        allocated.append(weakref.ref(partial))
        raise MemoryError

    with pytest.raises(OutOfMemory) as told, telling_out_of_memory("m", (2,)):
        forward()
    assert told.value.__cause__ is not None
    assert allocated[0]() is None
