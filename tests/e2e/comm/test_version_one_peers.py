"""Deployed peers of version 1.0, both ways: their client at our server, our client at their server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm import (
    ExponentialBackoff,
    GRPCComputeClient,
    GRPCComputeServer,
    ModelComputeFunction,
    RemoteComputeError,
)
from splitlearn_comm.protocol import compute_pb2
from support.comm_models import Attention, Doubler, Gate, Raising
from support.comm_v1 import V1Client, V1Server, from_wire


@pytest.fixture
def doubling() -> Iterator[str]:
    with GRPCComputeServer(Doubler(), port=0, version="1.7") as server:
        yield f"127.0.0.1:{server.port}"


class TestTheirClientAtOurServer:
    def test_connects_and_formats_the_uptime(self, doubling: str) -> None:
        with V1Client(doubling) as client:
            assert client.connect()
            assert client.health_check()
            assert client.log[0].startswith("connected version=1.7 uptime=0.")

    @pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 4), (1, 10, 768)])
    def test_computes(self, doubling: str, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape)
        with V1Client(doubling) as client:
            assert torch.equal(client.compute(x), x * 2)
            assert torch.equal(client.compute(x, model_id="anything"), x * 2)

    def test_token_ids_as_floats_are_answered(self) -> None:
        model = nn.Embedding(100, 8)
        with (
            GRPCComputeServer(ModelComputeFunction(model), port=0) as server,
            V1Client(f"127.0.0.1:{server.port}") as client,
        ):
            ids = torch.tensor([[0, 99, 42]])
            assert torch.equal(client.compute(ids), model(ids))
            with pytest.raises(grpc.RpcError) as caught:
                client.compute(torch.tensor([[100]]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert client.attempts == 1

    def test_cache_goes_back_and_forth(self) -> None:
        model = Attention()
        with (
            GRPCComputeServer(ModelComputeFunction(model), port=0) as server,
            V1Client(f"127.0.0.1:{server.port}") as client,
        ):
            x = torch.randn(1, 6, 4)
            whole, nothing, _ = client.compute_with_cache(x)
            outputs, present = [], None
            for step in range(6):
                output, present, _ = client.compute_with_cache(
                    x[:, step : step + 1], present, use_cache=True
                )
                outputs.append(output)
        assert nothing is None
        assert present is not None
        assert [part.shape for part in present[0]] == [(1, 2, 6, 2), (1, 2, 6, 2)]
        assert torch.allclose(torch.cat(outputs, 1), whole, atol=1e-6)

    def test_trains(self) -> None:
        served = nn.Linear(4, 2)
        weight = served.weight.detach().clone()
        with (
            GRPCComputeServer(ModelComputeFunction(served), port=0) as server,
            V1Client(f"127.0.0.1:{server.port}") as client,
        ):
            x, grad = torch.randn(3, 4), torch.randn(3, 2)
            _, _, named = client.compute_with_cache(x, training_mode=True, forward_id="mine")
            assert named["forward_id"] == "mine"
            assert torch.allclose(client.compute_backward(grad, "mine"), grad @ weight, atol=1e-6)
            _, _, chosen = client.compute_with_cache(x, training_mode=True)
            client.compute_backward(grad, str(chosen["forward_id"]), learning_rate=0.5)
            assert torch.allclose(served.weight, weight - 0.5 * grad.t() @ x, atol=1e-5)
            with pytest.raises(grpc.RpcError) as caught:
                client.compute_backward(grad, "mine")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert client.attempts == 1

    def test_reads_the_service_info(self, doubling: str) -> None:
        with V1Client(doubling) as client:
            client.compute(torch.ones(1))
            client.compute(torch.ones(1))
            info = client.get_service_info()
        assert info is not None
        uptime_s = info.pop("uptime_seconds")
        assert isinstance(uptime_s, float)
        assert uptime_s > 0
        # Ours beside what the function says; a text to them.
        assert "dtype:float16" in info["custom_info"].pop("extensions")
        assert info == {
            "service_name": "Doubler",
            "version": "1.7",
            "device": "cpu",
            "total_requests": 2,
            "custom_info": {"name": "Doubler"},
        }

    def test_watches_the_monitoring_stream(self, doubling: str) -> None:
        before = time.time()
        with V1Client(doubling) as client:
            snapshots = list(islice(client.stream_monitoring(0.1), 3))
            default = next(client.stream_monitoring())
        assert len({s["timestamp"] for s in snapshots}) == 3
        for snapshot in [*snapshots, default]:
            assert snapshot["timestamp"] >= before
            assert 0 <= snapshot["cpu_percent"] <= 100
            assert snapshot["memory_mb"] > 1
            assert 0 < snapshot["memory_percent"] <= 100

    def test_gets_optional_fields_only_where_it_asked(self, doubling: str) -> None:
        from splitlearn_comm.protocol import compute_pb2_grpc

        with grpc.insecure_channel(doubling) as channel:
            stub = compute_pb2_grpc.ComputeServiceStub(channel)
            plain = stub.Compute(compute_pb2.ComputeRequest(data=bytes(4), shape=[1]))
            numbered = stub.Compute(
                compute_pb2.ComputeRequest(data=bytes(4), shape=[1], request_id=0)
            )
        assert not plain.HasField("request_id")
        assert not plain.HasField("forward_id")
        assert plain.HasField("compute_time_ms")
        assert plain.monitoring_data.memory_mb > 1
        assert numbered.HasField("request_id")
        assert numbered.request_id == 0

    def test_retries_passing_conditions_and_not_its_own_mistakes(self) -> None:
        with (
            GRPCComputeServer(Raising(RuntimeError("broken")), port=0) as server,
            V1Client(f"127.0.0.1:{server.port}", sleep=lambda _: None) as client,
        ):
            with pytest.raises(grpc.RpcError) as internal:
                client.compute(torch.ones(1))
            assert internal.value.code() is grpc.StatusCode.INTERNAL
            assert client.waited == [1.0, 2.0]
            with pytest.raises(grpc.RpcError) as invalid:
                client.compute_with_cache(torch.ones(1), [(torch.ones(1), torch.ones(1))])
            assert invalid.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.RpcError) as unimplemented:
                client.compute_with_cache(torch.ones(1), training_mode=True)
            assert unimplemented.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert client.waited == [1.0, 2.0]

    def test_gives_up_a_slow_call_at_its_timeout(self) -> None:
        gate = Gate()
        with (
            GRPCComputeServer(gate, port=0) as server,
            V1Client(f"127.0.0.1:{server.port}", timeout=0.2, sleep=lambda _: None) as client,
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.compute(torch.ones(1))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            gate.open.set()


class TestOurClientAtTheirServer:
    @pytest.fixture
    def server(self) -> Iterator[V1Server]:
        with V1Server() as server:
            yield server

    @pytest.fixture
    def client(self, server: V1Server) -> Iterator[GRPCComputeClient]:
        with GRPCComputeClient(server.address, sleep=lambda _: None) as client:
            yield client

    def test_connects(self, client: GRPCComputeClient) -> None:
        assert client.connect()
        assert client.health_check()

    def test_any_other_status_is_not_healthy(self) -> None:
        with V1Server(status="serving") as server, GRPCComputeClient(server.address) as client:
            assert not client.health_check()
            assert not client.connect()

    def test_computes(self, server: V1Server, client: GRPCComputeClient) -> None:
        x = torch.randn(2, 3)
        assert torch.equal(client.compute(x), x * 2)
        assert torch.equal(client.compute(torch.tensor([[7, 8]])), torch.tensor([[14.0, 16.0]]))
        output, timing = client.compute_with_timing(x, model_id="m")
        assert torch.equal(output, x * 2)
        assert timing["compute_time_ms"] == 0.25
        assert client.get_statistics()["total_requests"] == 3
        assert client.get_statistics()["avg_compute_time_ms"] == 0.25
        assert [request.model_id for request in server.requests] == ["", "", "m"]

    def test_sends_nothing_that_version_one_does_not_know(
        self, server: V1Server, client: GRPCComputeClient
    ) -> None:
        client.compute(torch.ones(2))
        (request,) = server.requests
        assert not request.metadata
        assert not request.HasField("training_mode")
        assert not request.HasField("forward_id")
        assert not request.HasField("use_cache")
        assert torch.equal(from_wire(request.data, request.shape), torch.ones(2))

    def test_cache_goes_back_and_forth(self, client: GRPCComputeClient) -> None:
        _, present, _ = client.compute_with_cache(torch.tensor([1.0]), use_cache=True)
        _, present, _ = client.compute_with_cache(torch.tensor([2.0]), present, use_cache=True)
        assert present is not None
        ((key, value),) = present
        assert key.flatten().tolist() == [1.0, 2.0]
        assert value.flatten().tolist() == [-1.0, -2.0]

    def test_trains(self, server: V1Server, client: GRPCComputeClient) -> None:
        _, _, timing = client.compute_with_cache(torch.ones(2), training_mode=True)
        assert timing["forward_id"] == "chosen-by-1.0"
        grad = client.compute_backward(torch.ones(2), timing["forward_id"], "m", learning_rate=0.25)
        assert grad.tolist() == [2.0, 2.0]
        backward = server.requests[-1]
        assert backward.model_id == "m"
        assert backward.learning_rate == 0.25
        assert client.get_statistics()["total_requests"] == 2

    def test_reads_info_and_monitoring(self, client: GRPCComputeClient) -> None:
        info = client.get_service_info()
        assert info is not None
        assert info["service_name"] == "doubler"
        assert info["custom_info"] == {"factor": "2"}
        assert isinstance(info["uptime_seconds"], float)
        # This server sends no load with its answers, so it is asked for.
        client.compute(torch.ones(1))
        load = client.get_server_monitoring_data()
        assert load is not None
        assert load["memory_mb"] == 2.0
        assert load["gpu_utilization"] is None
        assert [s["cpu_percent"] for s in islice(client.stream_monitoring(0.1), 2)] == [1.0, 1.0]

    def test_retries_until_it_answers(self, server: V1Server) -> None:
        waits: list[float] = []
        with GRPCComputeClient(server.address, sleep=waits.append) as client:
            server.failures = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
            assert client.compute(torch.ones(1)).tolist() == [2.0]
            assert waits == [1.0, 2.0]
            assert len(server.requests) == 3
            assert client.get_statistics()["total_requests"] == 1

    @pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED"])
    def test_does_not_retry_what_cannot_succeed(self, server: V1Server, code: str) -> None:
        status = grpc.StatusCode[code]
        server.failures = [status]
        with (
            GRPCComputeClient(server.address, sleep=lambda _: None) as client,
            pytest.raises(RemoteComputeError) as caught,
        ):
            client.compute(torch.ones(1))
        assert caught.value.code() is status
        assert caught.value.details() == "as the test asked"
        assert caught.value.attempts == 1

    def test_gives_up_after_the_last_attempt(self, server: V1Server) -> None:
        server.failures = [grpc.StatusCode.UNAVAILABLE] * 9
        strategy = ExponentialBackoff(max_attempts=4, initial_delay_s=0.0)
        with (
            GRPCComputeClient(server.address, retry_strategy=strategy) as client,
            pytest.raises(RemoteComputeError, match="failed after 4 attempts: UNAVAILABLE: as the"),
        ):
            client.compute(torch.ones(1))
        assert len(server.requests) == 4

    def test_never_repeats_what_the_server_may_have_done(
        self, server: V1Server, client: GRPCComputeClient
    ) -> None:
        server.failures = [grpc.StatusCode.UNAVAILABLE]
        with pytest.raises(RemoteComputeError):
            client.compute_with_cache(torch.ones(1), training_mode=True, forward_id="a")
        client.compute_with_cache(torch.ones(1), training_mode=True, forward_id="a")
        server.failures = [grpc.StatusCode.INTERNAL]
        with pytest.raises(RemoteComputeError):
            client.compute_backward(torch.ones(1), "a", learning_rate=0.1)
        assert len(server.requests) == 3

    def test_codec_of_another_dtype_needs_no_word_on_the_wire(self) -> None:
        from splitlearn_comm import TensorCodec

        half = TensorCodec(torch.float16)
        with V1Server(encode=half.encode, decode=half.decode) as server:
            with GRPCComputeClient(server.address, codec=TensorCodec(torch.float16)) as client:
                assert client.compute(torch.ones(3)).dtype is torch.float16
            assert len(server.requests[0].data) == 6
            assert not server.requests[0].metadata
