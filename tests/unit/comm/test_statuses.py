"""Which gRPC status a refusal ends with, and what it says."""

from __future__ import annotations

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm.core import (
    ComputeError,
    ComputeFailed,
    DeadlinePassed,
    InvalidRequest,
    NotReady,
    Overloaded,
    UnknownTarget,
    Unsupported,
)
from splitlearn_comm.server.statuses import details_of, from_model_error, status_of

RETRIED_BY_VERSION_ONE = {NotReady, Overloaded, DeadlinePassed, ComputeFailed}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        (UnknownTarget, grpc.StatusCode.NOT_FOUND),
        (NotReady, grpc.StatusCode.UNAVAILABLE),
        (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlinePassed, grpc.StatusCode.DEADLINE_EXCEEDED),
        (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
        (ComputeFailed, grpc.StatusCode.INTERNAL),
        (ComputeError, grpc.StatusCode.INTERNAL),
    ],
)
def test_each_refusal_has_its_status(kind: type[ComputeError], status: grpc.StatusCode) -> None:
    class Special(kind):
        pass

    assert status_of(kind("why")) is status
    assert status_of(Special("why")) is status


def test_every_kind_of_refusal_has_a_status_of_its_own() -> None:
    statuses = [
        status_of(kind("why"))
        for kind in ComputeError.__subclasses__()
        if "core" in kind.__module__
    ]
    assert len(statuses) == len(set(statuses)) == 7


@pytest.mark.parametrize(
    "kind", [k for k in ComputeError.__subclasses__() if "core" in k.__module__]
)
def test_callers_mistakes_are_final_and_passing_conditions_are_not(
    kind: type[ComputeError],
) -> None:
    from splitlearn_comm.client.retry import FINAL_STATUSES

    assert (status_of(kind("why")) not in FINAL_STATUSES) is (kind in RETRIED_BY_VERSION_ONE)


def test_model_error_tells_id_type_and_first_line_only() -> None:
    refusal = from_model_error("m1", LookupError("no such head\n  File '/srv/secret.py', line 3"))
    assert status_of(refusal) is grpc.StatusCode.INTERNAL
    assert details_of(refusal) == "model 'm1' raised LookupError: no such head"
    assert from_model_error("m1", ValueError()).message == "model 'm1' raised ValueError"
    many_lines = from_model_error("m1", ValueError("\n one \n two \n"))
    assert many_lines.message == "model 'm1' raised ValueError: one"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
    ids=["cuda", "python", "cpu", "mps"],
)
def test_running_out_of_memory_is_overload(error: BaseException) -> None:
    refusal = from_model_error("m1", error)
    assert status_of(refusal) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "'m1' ran out of memory" in refusal.message


def test_real_allocation_failure_of_the_processor_is_overload() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert status_of(from_model_error("m1", caught.value)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_long_text_is_shortened_to_fit_a_header() -> None:
    text = details_of(InvalidRequest("é" * 5000))
    assert len(text.encode()) * 3 < 8192
    assert text.endswith("…")


class Adds(nn.Module):
    """Adds three numbers to each row, and refuses rows of five."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == 5:
            raise ValueError("five is too many")
        return x + torch.zeros(3)


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (
            4,
            "RuntimeError: The size of tensor a (4) must match the size of tensor b (3) at non-singleton "
            "dimension 1",
        ),
        (5, "Error: builtins.ValueError: five is too many"),
    ],
    ids=["operator", "raise"],
)
def test_what_a_torchscript_model_raised_is_told_and_not_its_stack(width: int, told: str) -> None:
    scripted = torch.jit.script(Adds())
    with pytest.raises((RuntimeError, torch.jit.Error)) as raised:
        scripted(torch.zeros(1, width))
    assert "TorchScript interpreter" in str(raised.value)
    assert from_model_error("m1", raised.value).message == f"model 'm1' raised {told}"
