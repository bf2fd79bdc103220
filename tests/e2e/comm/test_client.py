"""The client against real servers: time limits, errors that user code catches, closing and reopening."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm import (
    ClientClosed,
    ExponentialBackoff,
    FixedDelay,
    GRPCComputeClient,
    GRPCComputeServer,
    ModelComputeFunction,
    RemoteComputeError,
    SplitlearnCommError,
    TensorCodec,
)
from splitlearn_comm.client.channel import ComputeChannel
from splitlearn_comm.client.messages import encode_exactly
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from support.comm_models import Doubler, Gate
from support.comm_v1 import V1Server
from support.comm_waiting import DEADLINE_S

ONE = torch.ones(1)


class Time:
    """A clock that moves only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture
def server() -> Iterator[GRPCComputeServer]:
    with GRPCComputeServer(Doubler(), port=0, version="2.5") as server:
        yield server


@pytest.fixture
def address(server: GRPCComputeServer) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


class TestTimeLimit:
    def test_retry_that_could_not_begin_in_time_is_not_waited_for(self) -> None:
        clock = Time()
        with V1Server(failures=[grpc.StatusCode.UNAVAILABLE] * 9) as server:
            client = GRPCComputeClient(
                server.address,
                timeout=2.5,
                retry_strategy=ExponentialBackoff(max_attempts=9),
                sleep=clock.sleep,
                clock=clock,
            )
            with client, pytest.raises(RemoteComputeError) as caught:
                client.compute(ONE)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert caught.value.attempts == 2
            assert clock.slept == [1.0]
            assert len(server.requests) == 2

    def test_limit_holds_for_the_call_itself(self) -> None:
        gate = Gate()
        with (
            GRPCComputeServer(gate, port=0) as server,
            GRPCComputeClient(f"127.0.0.1:{server.port}", timeout=0.2) as client,
        ):
            with pytest.raises(RemoteComputeError) as caught:
                client.compute(ONE)
            gate.open.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert caught.value.attempts == 1

    def test_wait_between_attempts_counts_as_network_time(self) -> None:
        clock = Time()
        with (
            V1Server(failures=[grpc.StatusCode.UNAVAILABLE]) as server,
            GRPCComputeClient(server.address, sleep=clock.sleep, clock=clock) as client,
        ):
            _, timing = client.compute_with_timing(ONE)
        assert timing == {
            "total_time_ms": 1000.0,
            "compute_time_ms": 0.25,
            "network_time_ms": 999.75,
        }


class TestErrors:
    @pytest.mark.parametrize("kind", [grpc.RpcError, RuntimeError, SplitlearnCommError])
    def test_failed_call_is_caught_by_what_user_code_catches(
        self, nobody: str, kind: type[Exception]
    ) -> None:
        with (
            GRPCComputeClient(nobody, retry_strategy=FixedDelay(2, 0.0)) as client,
            pytest.raises(kind) as caught,
        ):
            client.compute(ONE)
        assert isinstance(caught.value, RemoteComputeError)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details()
        assert caught.value.attempts == 2
        assert "Compute failed after 2 attempts: UNAVAILABLE" in str(caught.value)
        assert isinstance(caught.value.__cause__, grpc.RpcError)

    def test_failed_calls_are_not_in_the_statistics(self, nobody: str) -> None:
        with GRPCComputeClient(nobody, retry_strategy=FixedDelay(1)) as client:
            with pytest.raises(RemoteComputeError):
                client.compute(ONE)
            assert client.get_statistics()["total_requests"] == 0

    def test_server_that_is_not_there_is_no_exception_but_for_computing(self, nobody: str) -> None:
        client = GRPCComputeClient(nobody, retry_strategy=FixedDelay(1))
        assert client.connect() is False
        assert client.health_check() is False
        assert client.get_service_info() is None
        assert client.get_server_monitoring_data() is None
        with pytest.raises(RemoteComputeError):
            next(client.stream_monitoring())
        client.close()

    @pytest.mark.parametrize("value", [2**24 + 1, -(2**24) - 1, 2**53 + 1])
    def test_integers_that_would_arrive_changed_are_not_sent(
        self, address: str, value: int
    ) -> None:
        with GRPCComputeClient(address) as client:
            with pytest.raises(ValueError, match=r"float32.* cannot hold exactly"):
                client.compute(torch.tensor([value]))
            assert client.compute(torch.tensor([2**24])).item() == 2**25

    @pytest.mark.parametrize(
        ("value", "dtype", "codec"),
        [
            (300, torch.int64, torch.int8),
            (-1, torch.int64, torch.uint8),
            (-1, torch.int8, torch.uint8),
            (200, torch.uint8, torch.int8),
            (2, torch.int64, torch.bool),
            (2**40, torch.int64, torch.int32),
            (-(2**31), torch.int32, torch.float16),
            (-(2**63), torch.int64, torch.float16),
        ],
    )
    def test_integers_that_another_dtype_would_change_are_not_sent(
        self, address: str, value: int, dtype: torch.dtype, codec: torch.dtype
    ) -> None:
        with GRPCComputeClient(address, codec=TensorCodec(codec)) as client:
            with pytest.raises(ValueError, match=r"on the wire, cannot hold exactly"):
                client.compute(torch.tensor([value], dtype=dtype))
            with pytest.raises(ValueError, match=r"on the wire, cannot hold exactly"):
                client.compute_async(torch.tensor([value], dtype=dtype))

    @pytest.mark.parametrize(
        ("dtype", "codec"),
        [
            (torch.int64, torch.int8),
            (torch.int64, torch.bool),
            (torch.uint16, torch.int32),
            (torch.uint32, torch.float16),
            (torch.uint64, torch.uint8),
            (torch.bool, torch.int16),
        ],
    )
    def test_integers_that_it_would_not_are_sent(
        self, dtype: torch.dtype, codec: torch.dtype
    ) -> None:
        tensor = torch.tensor([0, 1]).to(dtype)
        data, shape = encode_exactly(tensor, TensorCodec(codec))
        assert TensorCodec(codec).decode(data, shape).tolist() == [0, 1]

    def test_what_is_no_tensor_is_not_sent(self, address: str) -> None:
        with GRPCComputeClient(address) as client, pytest.raises(TypeError, match="list"):
            client.compute([1.0])


class TestConnection:
    def test_connecting_logs_version_and_uptime(
        self, address: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO), GRPCComputeClient(address) as client:
            assert client.connect() is True
        assert "version=2.5 uptime_s=0." in caplog.text

    def test_unhealthy_server_is_not_connected_and_the_log_says_why(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with V1Server(status="starting") as server, GRPCComputeClient(server.address) as client:
            assert client.connect() is False
        assert "status=starting" in caplog.text

    def test_closed_client_says_so_until_it_is_connected_again(self, address: str) -> None:
        client = GRPCComputeClient(address)
        assert client.compute(ONE).item() == 2.0
        client.close()
        client.close()
        with pytest.raises(ClientClosed, match=r"connect\(\) opens it again"):
            client.compute(ONE)
        assert client.connect()
        assert client.compute(ONE).item() == 2.0
        client.close()

    def test_call_that_begins_as_another_thread_closes_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = ComputeChannel("127.0.0.1:1", 1 << 20, FixedDelay(1))
        connection = channel._connection()
        channel.close()
        monkeypatch.setattr(channel, "_connection", lambda: connection)
        request, answer = compute_pb2.HealthRequest(), compute_pb2.HealthResponse
        with pytest.raises(ClientClosed):
            channel.call("HealthCheck", request, answer, timeout_s=1.0, retry=False)
        with pytest.raises(ClientClosed):
            channel.open_stream("ComputeStream", iter(()))
        with pytest.raises(ClientClosed):
            next(channel.stream("StreamMonitoring", request, answer))

    def test_copying_or_pickling_is_refused_and_leaves_the_client_as_it_is(
        self, address: str
    ) -> None:
        with GRPCComputeClient(address, retry_strategy=FixedDelay(1)) as client:
            for _ in range(20):
                assert client.compute_async(ONE).result(DEADLINE_S).item() == 2.0
                for made in (copy.copy, copy.deepcopy, pickle.dumps):
                    with pytest.raises(TypeError, match="make another one where it is needed"):
                        made(client)

    def test_closing_ends_a_running_call(self) -> None:
        gate = Gate()
        with (
            GRPCComputeServer(gate, port=0) as server,
            ThreadPoolExecutor(1) as callers,
        ):
            client = GRPCComputeClient(f"127.0.0.1:{server.port}", retry_strategy=FixedDelay(1))
            running = callers.submit(client.compute, ONE)
            gate.wait_entered()
            client.close()
            with pytest.raises(RemoteComputeError) as caught:
                running.result(DEADLINE_S)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            gate.open.set()

    def test_closing_ends_a_stream_quietly(self, address: str) -> None:
        client = GRPCComputeClient(address)
        stream = client.stream_monitoring(5.0)
        assert next(stream)
        client.close()
        assert list(stream) == []

    def test_server_that_comes_back_is_found_again(self) -> None:
        first = GRPCComputeServer(Doubler(), port=0)
        first.start()
        with GRPCComputeClient(f"127.0.0.1:{first.port}") as client:
            assert client.compute(ONE).item() == 2.0
            first.stop(grace=0.0)
            assert not client.health_check()
            second = GRPCComputeServer(Doubler(), port=first.port)
            second.start()
            assert client.compute(ONE).item() == 2.0
            second.stop()

    def test_call_waits_out_a_restart_within_its_retries(self) -> None:
        server = GRPCComputeServer(Doubler(), port=0)
        server.start()
        server.stop()
        waits: list[float] = []

        def start_meanwhile(seconds: float) -> None:
            if not waits:
                server.start()
            waits.append(seconds)
            time.sleep(seconds)

        client = GRPCComputeClient(
            f"127.0.0.1:{server.port}", retry_strategy=FixedDelay(100, 0.1), sleep=start_meanwhile
        )
        with client:
            assert client.compute(ONE).item() == 2.0
        assert waits
        server.stop()


class TestMonitoringData:
    def test_newest_load_comes_with_the_answers(self, address: str) -> None:
        with GRPCComputeClient(address) as client:
            client.compute(ONE)
            load = client.get_server_monitoring_data()
        assert load is not None
        assert load["memory_mb"] > 1
        assert set(load) == {
            "timestamp",
            "cpu_percent",
            "memory_mb",
            "memory_percent",
            "gpu_available",
            "gpu_utilization",
            "gpu_memory_used_mb",
            "gpu_memory_total_mb",
        }

    def test_load_is_asked_for_where_no_answer_brought_it(self, address: str) -> None:
        with GRPCComputeClient(address) as client:
            assert client.get_server_monitoring_data() is not None
            assert client.get_statistics()["total_requests"] == 0

    def test_server_that_sends_no_load_is_waited_for_until_the_time_limit(self) -> None:
        class Silent(compute_pb2_grpc.ComputeServiceServicer):
            over = threading.Event()

            def StreamMonitoring(
                self, request: compute_pb2.MonitoringStreamRequest, context: grpc.ServicerContext
            ) -> Iterator[compute_pb2.MonitoringSnapshotResponse]:
                self.over.wait(DEADLINE_S)
                yield from ()

        silent = grpc.server(ThreadPoolExecutor(2))
        compute_pb2_grpc.add_ComputeServiceServicer_to_server(Silent(), silent)
        port = silent.add_insecure_port("127.0.0.1:0")
        silent.start()
        client = GRPCComputeClient(f"127.0.0.1:{port}", timeout=0.2)
        with ThreadPoolExecutor(1) as callers:
            asked = callers.submit(client.get_server_monitoring_data)
            try:
                assert asked.result(DEADLINE_S / 6) is None
            finally:
                Silent.over.set()
        client.close()
        silent.stop(None)


class TestTraining:
    def test_split_model_learns_as_the_whole_one_does(self) -> None:
        torch.manual_seed(3)
        head, tail = nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 1))
        local_head, local_tail = nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 1))
        local_head.load_state_dict(head.state_dict())
        local_tail.load_state_dict(tail.state_dict())
        x, y = torch.randn(16, 4), torch.randn(16, 1)
        local = torch.optim.SGD([*local_head.parameters(), *local_tail.parameters()], lr=0.1)
        mine = torch.optim.SGD(head.parameters(), lr=0.1)
        losses, local_losses = [], []
        with (
            GRPCComputeServer(ModelComputeFunction(tail), port=0) as server,
            GRPCComputeClient(f"127.0.0.1:{server.port}") as client,
        ):
            for _ in range(5):
                local.zero_grad()
                local_loss = nn.functional.mse_loss(local_tail(local_head(x)), y)
                local_loss.backward()
                local.step()
                local_losses.append(local_loss.item())

                mine.zero_grad()
                hidden = head(x)
                output, _, timing = client.compute_with_cache(hidden, training_mode=True)
                output.requires_grad_()
                loss = nn.functional.mse_loss(output, y)
                loss.backward()
                assert output.grad is not None
                grad = client.compute_backward(output.grad, timing["forward_id"], learning_rate=0.1)
                hidden.backward(grad)
                mine.step()
                losses.append(loss.item())
        assert losses == pytest.approx(local_losses, rel=1e-4)
        assert losses[-1] < losses[0]


def test_a_connection_may_take_its_time(server: GRPCComputeServer) -> None:
    """A TLS handshake with a distant server does, or a lost packet; attempts were given up after 0.2 s."""

    def passed_on(door: socket.socket) -> str:
        came, _ = door.accept()
        with came, socket.create_connection(("127.0.0.1", server.port)) as there:
            came.settimeout(1.0)
            try:
                while sent := came.recv(65536):
                    there.sendall(sent)
                return "given up"
            except TimeoutError:
                came.settimeout(None)
            there_to_here = threading.Thread(target=_copy, args=(there, came))
            there_to_here.start()
            _copy(came, there)
            there_to_here.join(DEADLINE_S)
        return "answered"

    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(1) as threads:
        passing = threads.submit(passed_on, door)
        with GRPCComputeClient(f"127.0.0.1:{door.getsockname()[1]}") as client:
            answer = client.compute(ONE, model_id="m")
        assert torch.equal(answer, ONE * 2)
        assert passing.result(DEADLINE_S) == "answered"


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either side may hang up
        while sent := source.recv(65536):
            target.sendall(sent)
        target.shutdown(socket.SHUT_WR)
