"""The faults of version 1.0 that belong to the communication layer, each asked for by its own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from splitlearn_comm import (
    ComputeFunction,
    GRPCComputeClient,
    GRPCComputeServer,
    ModelComputeFunction,
)
from splitlearn_comm.server import ComputeServicer, SystemMonitor, build_server
from support.comm_backend import FakeNode
from support.comm_models import Doubler
from support.comm_v1 import V1Client


@contextmanager
def asked(function: ComputeFunction) -> Iterator[V1Client]:
    with (
        GRPCComputeServer(function, port=0) as server,
        V1Client(f"127.0.0.1:{server.port}") as client,
    ):
        yield client


def test_servicer_passes_cache_arguments_to_one_argument_functions() -> None:
    with asked(Doubler()) as client:
        assert client.compute(torch.ones(2)).tolist() == [2.0, 2.0]
        output, present, _ = client.compute_with_cache(torch.ones(2), use_cache=True)
    assert output.tolist() == [2.0, 2.0]
    assert present is None


def test_backward_returns_the_output_gradient_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x, grad = torch.randn(2, 3), torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    model(leaf).backward(grad)
    model.zero_grad()
    with asked(ModelComputeFunction(model)) as client:
        client.compute_with_cache(x, training_mode=True, forward_id="a")
        got = client.compute_backward(grad, "a")
    assert torch.allclose(got, leaf.grad, atol=1e-6)
    assert not torch.allclose(got, grad)


def test_model_id_of_the_request_is_ignored() -> None:
    class Constant(ComputeFunction):
        def __init__(self, value: float) -> None:
            self.value = value

        def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
            return torch.full_like(input_tensor, self.value)

    node = FakeNode({"one": Constant(1), "two": Constant(2)})
    server = build_server(ComputeServicer(node, SystemMonitor()), "127.0.0.1:0")
    server.start()
    try:
        with V1Client(f"127.0.0.1:{server.port}") as client:
            answers = [
                client.compute(torch.zeros(1), name).item() for name in ("two", "one", "two")
            ]
    finally:
        server.stop(grace_s=1.0)
    assert answers == [2.0, 1.0, 2.0]
    assert [opened.model_id for opened in node.opens] == ["two", "one", "two"]


def test_avg_total_time_ms_adds_the_compute_time_twice() -> None:
    now_s = [0.0]

    class Slow(ComputeFunction):
        """Takes three seconds by the client's clock."""

        def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
            now_s[0] += 3.0
            return input_tensor

    with (
        GRPCComputeServer(Slow(), port=0) as server,
        GRPCComputeClient(f"127.0.0.1:{server.port}", clock=lambda: now_s[0]) as client,
    ):
        client.compute(torch.ones(1))
        statistics = client.get_statistics()
    assert statistics["avg_total_time_ms"] == pytest.approx(3000.0)
    assert statistics["avg_total_time_ms"] == pytest.approx(
        statistics["avg_network_time_ms"] + statistics["avg_compute_time_ms"]
    )
