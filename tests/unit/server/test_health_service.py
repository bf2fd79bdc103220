"""What `grpc.health.v1` says, over a real connection."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitlearn_comm.http2.server import Server
from splitlearn_comm.server.pool import BoundedPool
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.server.health_service import HealthService, enable_reflection
from support.fakes import Bench, model

SERVICE = "splitlearn.comm.ComputeService"


class Probed:
    """A health service on the network, and the manager whose models it tells of."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.service = HealthService()
        self.server = grpc.server(ThreadPoolExecutor(2))
        self.service.register(self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = health_pb2_grpc.HealthStub(self.channel)

    def begin_load(self, model_id: str, **keys: object) -> None:
        spec = ModelSpec.of(model(model_id, **keys))
        self.bench.manager.begin_load(spec, Owner.API, "cpu", 10.0)

    def publish(self, *declared: str) -> None:
        self.service.publish(self.bench.manager.table, declared)

    def check(self, name: str) -> str:
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            status = self.stub.Check(request, timeout=30).status
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    def watch(self, name: str) -> Iterator[str]:
        request = health_pb2.HealthCheckRequest(service=name)
        for answer in self.stub.Watch(request, timeout=30):
            yield str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class Details(NamedTuple):
    """What a handler is found by."""

    method: str
    invocation_metadata: tuple[()]


class Context:
    """What a handler learns of its call: whether its caller had gone before it began."""

    def __init__(self, *, gone: bool) -> None:
        self._gone = gone
        self._ends: list[Callable[[], None]] = []

    def add_callback(self, end: Callable[[], None]) -> bool:
        if not self._gone:
            self._ends.append(end)
        return not self._gone

    def end(self) -> None:
        """The caller goes."""
        while self._ends:
            self._ends.pop()()


class Sent:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.answers: list[object] = []

    def __call__(self, answer: object) -> None:
        self.answers.append(answer)


@pytest.fixture
def probed() -> Iterator[Probed]:
    probed = Probed()
    yield probed
    probed.channel.close()
    probed.server.stop(0).wait()


def test_the_node_serves_from_the_start_and_unknown_names_are_not_found(probed: Probed) -> None:
    assert [probed.check(name) for name in ("", SERVICE, "m")] == [
        "SERVING",
        "SERVING",
        "NOT_FOUND",
    ]


def test_a_ready_model_and_its_endpoint_serve(probed: Probed) -> None:
    probed.begin_load("m", endpoint="front")
    probed.bench.executor.run_all()
    probed.publish()
    assert [probed.check(name) for name in ("m", "front")] == ["SERVING", "SERVING"]


def test_a_declared_model_that_is_not_ready_does_not_serve(probed: Probed) -> None:
    probed.begin_load("m")
    probed.publish("m")
    assert probed.check("m") == "NOT_SERVING"
    probed.bench.executor.run_all()
    probed.publish("m")
    assert probed.check("m") == "SERVING"


def test_whoever_watches_sees_a_model_come_and_go(probed: Probed) -> None:
    seen = probed.watch("m")
    assert next(seen) == "SERVICE_UNKNOWN"
    probed.publish("m")
    assert next(seen) == "NOT_SERVING"
    probed.begin_load("m")
    probed.bench.executor.run_all()
    probed.publish("m")
    assert next(seen) == "SERVING"
    probed.bench.manager.begin_unload("m", "Requested")
    probed.bench.executor.run_all()
    probed.publish()
    assert next(seen) == "SERVICE_UNKNOWN"


def test_a_draining_node_and_all_its_models_do_not_serve(probed: Probed) -> None:
    probed.begin_load("m")
    probed.bench.executor.run_all()
    probed.publish("m")
    probed.service.drain()
    assert [probed.check(name) for name in ("", SERVICE, "m")] == ["NOT_SERVING"] * 3
    # The loop may end a last turn afterwards.
    probed.publish("m")
    assert probed.check("m") == "NOT_SERVING"
    assert next(probed.watch("m")) == "NOT_SERVING"


def test_a_model_that_is_gone_is_not_found(probed: Probed) -> None:
    probed.publish("m")
    probed.publish()
    assert probed.check("m") == "NOT_FOUND"
    statuses = probed.stub.List(health_pb2.HealthListRequest(), timeout=30).statuses
    assert set(statuses) == {"", SERVICE}


def test_the_end_of_one_node_ends_no_watching_of_another(probed: Probed) -> None:
    HealthService().drain()
    assert next(probed.watch("")) == "SERVING"


def test_nothing_is_kept_of_callers_that_have_gone(probed: Probed) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    kept: list[grpc.GenericRpcHandler[object, object]] = []
    server.add_generic_rpc_handlers = kept.extend  # type: ignore[method-assign]
    service = HealthService()
    service.register(server)
    watch = kept[0].service(Details("/grpc.health.v1.Health/Watch", ()))  # type: ignore[union-attr]
    request = health_pb2.HealthCheckRequest(service="made up")
    for context in (Context(gone=False), Context(gone=True)):
        sent = Sent()
        told = weakref.ref(sent)
        watch.unary_stream(request, context, sent)  # type: ignore[union-attr]
        assert len(sent.answers) == 1
        context.end()
        del sent
        gc.collect()
        assert told() is None
    assert not service._watching


def test_what_stays_open_does_not_keep_a_node_that_stops() -> None:
    """A watch, or a tool that has asked what there is, kept it for all of the grace period."""
    pool = BoundedPool("test", 2, 8)
    server = Server(pool, max_message_length=1000, max_calls=10)
    service = HealthService()
    service.register(server)
    enable_reflection(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    asked: SimpleQueue[reflection_pb2.ServerReflectionRequest] = SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        tells = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter(asked.get, None)
        )
        asked.put(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert SERVICE in str(next(tells))
        service.drain()
        assert server.stop(1000.0).wait(30.0)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for stream in (watch, tells):
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    pool.shutdown(wait=False)
