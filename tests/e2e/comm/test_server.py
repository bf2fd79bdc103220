"""The server on a real network: overload, starvation, streams, starting and stopping."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm import (
    ComputeFunction,
    FixedDelay,
    GRPCComputeClient,
    GRPCComputeServer,
    ModelComputeFunction,
    RemoteComputeError,
    ServerStartError,
    TensorCodec,
)
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_comm.server import (
    ComputeServicer,
    NetworkServer,
    SystemMonitor,
    build_server,
    join_address,
)
from support.comm_backend import FakeNode
from support.comm_models import Doubler, Gate, Raising
from support.comm_waiting import DEADLINE_S, until

ONE = torch.ones(1)
ONCE = FixedDelay(max_attempts=1)


def address_of(server: GRPCComputeServer | NetworkServer) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def compute_code(client: GRPCComputeClient) -> grpc.StatusCode:
    with pytest.raises(RemoteComputeError) as caught:
        client.compute(ONE)
    return caught.value.code()


class TestOverload:
    def test_calls_beyond_the_queue_are_refused_at_once(self, gate: Gate) -> None:
        with (
            GRPCComputeServer(gate, port=0, max_workers=2, max_waiting=1) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            ThreadPoolExecutor(3) as callers,
        ):
            running = [callers.submit(client.compute, ONE) for _ in range(2)]
            gate.wait_entered(2)
            pool = server._running._pools[0]
            waiting = callers.submit(client.compute, ONE)
            until(lambda: pool.full, "the third call waits")
            with pytest.raises(RemoteComputeError, match="3 compute calls under way") as caught:
                client.compute(ONE)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.open.set()
            assert [done.result(DEADLINE_S).item() for done in (*running, waiting)] == [1.0] * 3
            assert client.compute(ONE).item() == 1.0
            assert gate.calls == 4

    def test_message_is_refused_before_it_is_read(self, gate: Gate) -> None:
        never = threading.Event()

        def message_that_never_comes() -> Iterator[bytes]:
            never.wait(DEADLINE_S)
            yield b""

        with (
            GRPCComputeServer(gate, port=0, max_workers=1, max_waiting=0) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            grpc.insecure_channel(address_of(server)) as channel,
            ThreadPoolExecutor(1) as callers,
        ):
            running = callers.submit(client.compute, ONE)
            gate.wait_entered()
            sending = channel.stream_unary("/splitlearn.comm.ComputeService/Compute")
            with pytest.raises(grpc.RpcError) as early:
                sending(message_that_never_comes(), timeout=DEADLINE_S / 2)
            assert early.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            never.set()
            with pytest.raises(RemoteComputeError) as large:
                client.compute(torch.ones(5_000_000))
            assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.open.set()
            running.result(DEADLINE_S)

    def test_caller_that_leaves_the_queue_is_never_computed(self, gate: Gate) -> None:
        with (
            GRPCComputeServer(gate, port=0, max_workers=1) as server,
            GRPCComputeClient(address_of(server)) as client,
            GRPCComputeClient(address_of(server), timeout=0.2) as impatient,
            ThreadPoolExecutor(1) as callers,
        ):
            running = callers.submit(client.compute, ONE)
            gate.wait_entered()
            assert compute_code(impatient) is grpc.StatusCode.DEADLINE_EXCEEDED
            gate.open.set()
            running.result(DEADLINE_S)
            assert client.compute(ONE).item() == 1.0
            assert gate.calls == 2

    def test_message_over_the_limit_is_refused(self) -> None:
        with (
            GRPCComputeServer(Doubler(), port=0, max_message_length=1000) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
        ):
            assert client.compute(torch.ones(100)).shape == (100,)
            with pytest.raises(RemoteComputeError) as caught:
                client.compute(torch.ones(1000))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert client.compute(ONE).item() == 2.0

    def test_hundred_mebibytes_go_both_ways_by_default(self) -> None:
        class Same(ComputeFunction):
            def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
                return input_tensor

        with (
            GRPCComputeServer(Same(), port=0) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
        ):
            x = torch.ones(25, 1024, 1000)
            assert client.compute(x).shape == x.shape


class TestStarvation:
    def test_health_and_info_are_answered_while_all_workers_compute(self, gate: Gate) -> None:
        with (
            GRPCComputeServer(gate, port=0, max_workers=1, max_waiting=1) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            ThreadPoolExecutor(2) as callers,
        ):
            calls = [callers.submit(client.compute, ONE) for _ in range(2)]
            gate.wait_entered()
            until(lambda: server._running._pools[0].full, "the queue is full")
            assert client.health_check()
            assert client.get_service_info() is not None
            assert next(client.stream_monitoring(0.1))["memory_mb"] > 1
            gate.open.set()
            for done in calls:
                done.result(DEADLINE_S)

    def test_streams_starve_nothing_and_are_bounded(self) -> None:
        with (
            GRPCComputeServer(Doubler(), port=0, max_workers=1, max_streams=2) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
        ):
            streams = [client.stream_monitoring(5.0) for _ in range(2)]
            assert all(next(stream) for stream in streams)
            assert client.compute(ONE).item() == 2.0
            assert client.health_check()
            with pytest.raises(RemoteComputeError, match="2 monitoring streams") as caught:
                next(client.stream_monitoring())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            streams[0].close()
            pool = server._running._pools[1]
            until(lambda: not pool.full, "the closed stream's thread is free")
            assert next(client.stream_monitoring())["memory_mb"] > 1

    def test_stream_ends_at_once_when_its_client_goes(self) -> None:
        with GRPCComputeServer(Doubler(), port=0, max_streams=1) as server:
            client = GRPCComputeClient(address_of(server))
            assert next(client.stream_monitoring(5.0))
            client.close()
            assert server._running._pools[1].wait_idle(DEADLINE_S)


class TestStopping:
    def test_stream_ends_when_the_server_stops(self) -> None:
        server = GRPCComputeServer(Doubler(), port=0)
        server.start()
        with GRPCComputeClient(address_of(server)) as client:
            stream = client.stream_monitoring(5.0)
            assert next(stream)
            server.stop(grace=DEADLINE_S)
            with pytest.raises(RemoteComputeError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def test_running_call_is_finished(self, gate: Gate) -> None:
        server = GRPCComputeServer(gate, port=0)
        server.start()
        with (
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            ThreadPoolExecutor(2) as threads,
        ):
            running = threads.submit(client.compute, ONE)
            gate.wait_entered()
            stopping = threads.submit(server.stop, DEADLINE_S)
            until(lambda: compute_refused(client), "new calls are refused")
            gate.open.set()
            assert running.result(DEADLINE_S).item() == 1.0
            stopping.result(DEADLINE_S)
            assert gate.calls == 1

    def test_call_that_outlasts_the_grace_is_cancelled(self, gate: Gate) -> None:
        server = GRPCComputeServer(gate, port=0)
        server.start()
        with (
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            ThreadPoolExecutor(1) as threads,
        ):
            running = threads.submit(compute_code, client)
            gate.wait_entered()
            server.stop(grace=0.0)
            assert running.result(DEADLINE_S) in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.CANCELLED,
            )

    def test_waiting_for_termination_ends_with_the_stop(self) -> None:
        server = GRPCComputeServer(Doubler(), port=0)
        assert server.wait_for_termination() is False
        server.start()
        assert server.wait_for_termination(timeout=0.01) is True
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(server.wait_for_termination)
            server.stop()
            waiting.result(DEADLINE_S)

    def test_function_is_set_up_before_and_torn_down_after(self) -> None:
        function = Doubler()
        server = GRPCComputeServer(function, port=0)
        assert function.events == []
        server.start()
        assert function.events == ["setup"]
        server.stop()
        server.stop()
        assert function.events == ["setup", "teardown"]
        server.start()
        assert function.events == ["setup", "teardown", "setup"]
        server.stop()

    def test_kept_forwards_go_with_the_server(self) -> None:
        function = ModelComputeFunction(nn.Linear(1, 1))
        with (
            GRPCComputeServer(function, port=0) as server,
            GRPCComputeClient(address_of(server)) as client,
        ):
            client.compute_with_cache(torch.ones(1, 1), training_mode=True)
            assert function.get_info()["kept_forwards"] == 1
        assert function.get_info()["kept_forwards"] == 0


def compute_refused(client: GRPCComputeClient) -> bool:
    return not client.health_check()


class TestStarting:
    def test_port_that_is_taken_is_named(self) -> None:
        function = Doubler()
        with GRPCComputeServer(Doubler(), port=0) as server:
            second = GRPCComputeServer(function, port=server.port)
            with pytest.raises(ServerStartError, match=rf"127\.0\.0\.1:{server.port}.* taken"):
                second.start()
        assert function.events == ["setup", "teardown"]
        second.start()
        second.stop()

    def test_address_of_another_machine_is_named(self) -> None:
        with pytest.raises(ServerStartError, match=r"192\.0\.2\.1:0"):
            GRPCComputeServer(Doubler(), host="192.0.2.1", port=0).start()

    def test_free_port_is_picked_and_told(self) -> None:
        server = GRPCComputeServer(Doubler(), port=0)
        server.start()
        assert server.port > 0
        server.stop()

    def test_is_not_started_twice(self) -> None:
        with (
            GRPCComputeServer(Doubler(), port=0) as server,
            pytest.raises(RuntimeError, match="runs already"),
        ):
            server.start()

    @pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
    def test_ipv6_address_gets_its_brackets(self) -> None:
        assert join_address("::1", 5) == "[::1]:5"
        assert join_address("[::1]", 5) == "[::1]:5"
        assert join_address("localhost", 5) == "localhost:5"

    def test_listens_on_loopback_unless_told_otherwise(self) -> None:
        assert GRPCComputeServer(Doubler()).host == "127.0.0.1"


class TestAnswers:
    def test_model_error_is_told_without_a_stack_trace(self) -> None:
        with (
            GRPCComputeServer(Raising(ValueError("bad shape\nmore")), port=0) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            pytest.raises(RemoteComputeError) as caught,
        ):
            client.compute(ONE)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "model 'Raising' raised ValueError: bad shape"

    def test_model_that_exits_does_not_leave_its_caller_waiting(self) -> None:
        with (
            GRPCComputeServer(Raising(SystemExit(1)), port=0) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
        ):
            assert compute_code(client) is grpc.StatusCode.INTERNAL

    def test_long_and_foreign_text_arrives(self) -> None:
        with (
            GRPCComputeServer(Raising(ValueError("形状" * 2000)), port=0) as server,
            GRPCComputeClient(address_of(server), retry_strategy=ONCE) as client,
            pytest.raises(RemoteComputeError, match=r"形状形状.*…") as caught,
        ):
            client.compute(ONE)
        assert caught.value.code() is grpc.StatusCode.INTERNAL

    def test_wrong_bytes_are_the_callers_mistake(self) -> None:
        with (
            GRPCComputeServer(Doubler(), port=0) as server,
            grpc.insecure_channel(address_of(server)) as channel,
        ):
            stub = compute_pb2_grpc.ComputeServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Compute(compute_pb2.ComputeRequest(data=b"abc", shape=[1]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "needs 4 bytes, but the message carries 3" in caught.value.details()

    def test_codec_given_to_both_ends_is_used(self) -> None:
        codec = TensorCodec(torch.float16)
        with (
            GRPCComputeServer(Doubler(), port=0, codec=codec) as server,
            GRPCComputeClient(address_of(server), codec=codec) as client,
        ):
            answer = client.compute(torch.tensor([1.5]))
        assert answer.dtype is torch.float16
        assert answer.item() == 3.0

    def test_announced_dtype_needs_no_configured_server(self) -> None:
        codec = TensorCodec(torch.bfloat16)
        with (
            GRPCComputeServer(Doubler(), port=0) as server,
            GRPCComputeClient(address_of(server), codec=codec, announce_dtype=True) as client,
        ):
            answer = client.compute(torch.tensor([1.5]))
        assert answer.dtype is torch.bfloat16
        assert answer.item() == 3.0

    def test_many_callers_get_their_own_answers(self) -> None:
        with (
            GRPCComputeServer(Doubler(), port=0, max_workers=4) as server,
            GRPCComputeClient(address_of(server)) as client,
            ThreadPoolExecutor(16) as callers,
        ):
            values = [float(i) for i in range(200)]
            answers = callers.map(lambda v: client.compute(torch.tensor([v])).item(), values)
            assert list(answers) == [2 * v for v in values]
            assert client.get_statistics()["total_requests"] == 200
            info = client.get_service_info()
            assert info is not None
            assert info["total_requests"] == 200


class TestSharedServer:
    """`build_server`: other services on the same port, interceptors, encryption, any backend."""

    @pytest.fixture
    def node(self) -> FakeNode:
        return FakeNode({"m": Doubler()})

    def built(self, node: FakeNode, **options: object) -> NetworkServer:
        return build_server(ComputeServicer(node, SystemMonitor()), "127.0.0.1:0", **options)

    def test_other_services_share_the_port(self, node: FakeNode) -> None:
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
            ProtoReflectionDescriptorDatabase,
        )

        server = self.built(node)
        checks = health.HealthServicer()
        checks.set("m", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server.grpc_server)
        reflection.enable_server_reflection(["splitlearn.comm.ComputeService"], server.grpc_server)
        server.start()
        try:
            with grpc.insecure_channel(address_of(server)) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service="m")
                )
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                names = ProtoReflectionDescriptorDatabase(channel).get_services()
                assert "splitlearn.comm.ComputeService" in names
            with GRPCComputeClient(address_of(server)) as client:
                assert client.compute(ONE, "m").item() == 2.0
        finally:
            assert server.stop(grace_s=1.0)
        assert node.observed == [("m", "OK")]

    def test_interceptor_may_refuse_and_leaves_the_rest_as_it_is(self, node: FakeNode) -> None:
        class Token(grpc.ServerInterceptor):
            def intercept_service(self, continuation, details):
                if ("authorization", "Bearer right") in details.invocation_metadata:
                    return continuation(details)

                def refuse(request, context):
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")

                return grpc.unary_unary_rpc_method_handler(refuse)

        server = self.built(node, interceptors=[Token()])
        server.start()
        try:
            right = [("authorization", "Bearer right")]
            with GRPCComputeClient(address_of(server), metadata=right) as client:
                assert client.connect()
                assert client.compute(ONE).item() == 2.0
                assert next(client.stream_monitoring())
            with GRPCComputeClient(address_of(server)) as stranger:
                assert not stranger.connect()
                assert compute_code(stranger) is grpc.StatusCode.UNAUTHENTICATED
        finally:
            server.stop(grace_s=1.0)

    def test_credentials_are_used_at_both_ends(self, node: FakeNode) -> None:
        server = self.built(node, credentials=grpc.local_server_credentials())
        server.start()
        try:
            credentials = grpc.local_channel_credentials()
            with GRPCComputeClient(address_of(server), credentials=credentials) as client:
                assert client.compute(ONE).item() == 2.0
        finally:
            server.stop(grace_s=1.0)

    def test_unknown_rpc_is_unimplemented(self, node: FakeNode) -> None:
        server = self.built(node)
        server.start()
        try:
            with grpc.insecure_channel(address_of(server)) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary("/splitlearn.comm.ComputeService/Nonsense")(b"")
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        finally:
            server.stop(grace_s=1.0)

    def test_target_is_let_go_when_the_caller_goes(self) -> None:
        gate = Gate()
        node = FakeNode({"m": gate})
        server = self.built(node)
        server.start()
        try:
            with GRPCComputeClient(address_of(server), timeout=0.2) as client:
                assert compute_code(client) is grpc.StatusCode.DEADLINE_EXCEEDED
            gate.wait_entered()
            assert node.held == 1
            gate.open.set()
            node.wait_observed()
            assert node.held == 0
        finally:
            server.stop(grace_s=1.0)

    def test_stop_says_whether_a_model_still_runs(self) -> None:
        gate = Gate()
        server = self.built(FakeNode({"m": gate}))
        server.start()
        asking = threading.Thread(target=ask_and_fail, args=(address_of(server),))
        asking.start()
        gate.wait_entered()
        assert server.stop(grace_s=0.0) is False
        gate.open.set()
        asking.join(DEADLINE_S)
        assert server._pools[0].wait_idle(DEADLINE_S)


def ask_and_fail(address: str) -> None:
    with GRPCComputeClient(address, retry_strategy=ONCE) as client:
        compute_code(client)
