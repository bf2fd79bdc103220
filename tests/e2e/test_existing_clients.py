"""Clients of wire 1.0 against a managed node: what they call works, and each refusal is the right status.

`V1Client` knows the protocol and nothing of this project. What it calls is tried against a node in a process
of its own that serves a directory, and against a `ManagedServer` that was filled from Python; the statuses,
against a `ManagedServer` in this process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from torch import nn

from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig
from splitlearn_manager.errors import OperationInProgress
from support.comm_v1 import V1Client, from_wire, to_wire
from support.gated import Gate
from support.models import save_mlp, tiny_bert, tiny_gpt2
from support.node import Node
from support.waiting import eventually

WIDTH = 8


class Trunk:
    """The models that are served, to compare answers with, and the address that serves them."""

    def __init__(self, directory: Path) -> None:
        self.mlp = save_mlp(directory / "mlp.pt", WIDTH)
        self.gpt2 = tiny_gpt2(directory / "gpt2")
        self.bert = tiny_bert(directory / "bert")
        self.address = ""

    @staticmethod
    def configs() -> list[dict[str, object]]:
        return [
            {"model_id": "mlp", "model_path": "mlp.pt", "device": "cpu"},
            {"model_id": "gpt2", "model_path": "gpt2", "device": "cpu"},
            {"model_id": "bert", "model_path": "bert", "device": "cpu"},
        ]


@contextmanager
def served_by_a_node(directory: Path) -> Iterator[str]:
    for config in Trunk.configs():
        (directory / f"{config['model_id']}.yaml").write_text(json.dumps(config))
    with Node(directory, {"settle_s": 0.05}) as node:
        for config in Trunk.configs():
            node.wait_phase(str(config["model_id"]), "Ready")
        yield node.address
        assert node.stop() == 0
        assert not node.find("Traceback")


@contextmanager
def served_from_python(directory: Path) -> Iterator[str]:
    with ManagedServer(ServerConfig(port=0, metrics_port=0)) as server:
        for config in Trunk.configs():
            server.load_model(ModelConfig.model_validate(config).with_base_dir(directory))
        yield f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module", params=["node", "python"])
def trunk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trunk]:
    directory = tmp_path_factory.mktemp(request.param)
    trunk = Trunk(directory)
    serve = served_by_a_node if request.param == "node" else served_from_python
    with serve(directory) as trunk.address:
        yield trunk


@pytest.fixture
def client(trunk: Trunk) -> Iterator[V1Client]:
    """Fails a test in which a call had to be repeated."""
    with V1Client(trunk.address) as client:
        yield client
        assert client.waited == []


def test_it_connects_and_logs_version_and_uptime(client: V1Client) -> None:
    assert client.connect()
    assert client.log[0].startswith("connected version=")
    assert client.health_check()


def test_it_computes_with_a_model_by_its_id(trunk: Trunk, client: V1Client) -> None:
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(client.compute(x, model_id="mlp"), trunk.mlp(x))


def test_without_an_id_the_router_takes_the_ready_models_in_turn(
    trunk: Trunk, client: V1Client
) -> None:
    # Token ids to two of them, WIDTH numbers to the perceptron.
    x = torch.arange(1.0, WIDTH + 1).reshape(1, WIDTH)
    shapes = sorted(tuple(client.compute(x).shape) for _ in Trunk.configs())
    assert shapes == [(1, WIDTH), (1, WIDTH, 16), (1, WIDTH, 60)]


def test_token_ids_that_travel_as_floats_reach_the_model_as_integers(
    trunk: Trunk, client: V1Client
) -> None:
    ids = torch.tensor([[5, 9, 17, 59], [1, 2, 3, 4]])
    with torch.inference_mode():
        expected = trunk.bert(ids).last_hidden_state
    torch.testing.assert_close(client.compute(ids.float(), model_id="bert"), expected)


def test_decoding_token_by_token_with_the_cache_equals_one_full_pass(
    trunk: Trunk, client: V1Client
) -> None:
    ids = torch.tensor([[5, 9, 17, 42, 8]])
    with torch.inference_mode():
        expected = trunk.gpt2(ids).logits
    logits, cache, _ = client.compute_with_cache(
        ids[:, :2].float(), use_cache=True, model_id="gpt2"
    )
    torch.testing.assert_close(logits, expected[:, :2])
    for position in range(2, ids.shape[1]):
        assert cache is not None
        assert [tuple(key.shape) for key, _ in cache] == [(1, 2, position, 8)] * 2
        logits, cache, timing = client.compute_with_cache(
            ids[:, position : position + 1].float(), cache, use_cache=True, model_id="gpt2"
        )
        torch.testing.assert_close(logits, expected[:, position : position + 1])
        assert float(str(timing["compute_time_ms"])) > 0


def test_a_model_without_a_cache_answers_without_one(trunk: Trunk, client: V1Client) -> None:
    x = torch.randn(1, WIDTH)
    output, present, _ = client.compute_with_cache(x, use_cache=True, model_id="mlp")
    torch.testing.assert_close(output, trunk.mlp(x))
    assert present is None


@pytest.mark.parametrize("backward_id", ["mlp", None], ids=["by-id", "without-id"])
def test_backward_gives_the_gradient_that_local_autograd_gives(
    trunk: Trunk, client: V1Client, backward_id: str | None
) -> None:
    x = torch.randn(2, WIDTH, requires_grad=True)
    local = trunk.mlp(x)
    grad_output = torch.randn_like(local)
    local.backward(grad_output)

    output, _, timing = client.compute_with_cache(x, model_id="mlp", training_mode=True)
    torch.testing.assert_close(output, local)
    forward_id = timing["forward_id"]
    assert isinstance(forward_id, str)
    found = client.compute_backward(grad_output, forward_id, backward_id)
    torch.testing.assert_close(found, x.grad)


def test_a_forward_that_the_router_placed_is_found_by_its_backward(
    trunk: Trunk, client: V1Client
) -> None:
    """Three forwards in turn; token ids have no gradient, so only the perceptron's is kept."""
    x = torch.randn(1, WIDTH)
    placed, refused = [], []
    for forward_id in ("routed-0", "routed-1", "routed-2"):
        try:
            client.compute_with_cache(x, training_mode=True, forward_id=forward_id)
            placed.append(forward_id)
        except grpc.RpcError as error:
            refused.append(error.code())
    assert refused == [grpc.StatusCode.INVALID_ARGUMENT] * 2
    found = client.compute_backward(torch.ones(1, WIDTH), placed[0])
    leaf = x.clone().requires_grad_()
    trunk.mlp(leaf).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_a_backward_answers_once(client: V1Client) -> None:
    client.compute_with_cache(
        torch.ones(1, WIDTH), model_id="mlp", training_mode=True, forward_id="once"
    )
    client.compute_backward(torch.ones(1, WIDTH), "once", "mlp")
    with pytest.raises(grpc.RpcError) as refused:
        client.compute_backward(torch.ones(1, WIDTH), "once", "mlp")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_service_info_names_the_models(client: V1Client) -> None:
    before = client.get_service_info()
    client.compute(torch.ones(1, WIDTH), model_id="mlp")
    after = client.get_service_info()
    assert before is not None
    assert after is not None
    assert after["service_name"] == "splitlearn-manager"
    assert after["device"] == "cpu"
    assert after["total_requests"] == int(str(before["total_requests"])) + 1
    custom = after["custom_info"]
    assert isinstance(custom, dict)
    assert sorted(custom["models"].split(",")) == ["bert", "gpt2", "mlp"]
    assert custom["model.mlp"] == "READY on cpu"


def test_monitoring_streams_snapshots(client: V1Client) -> None:
    stream = client.stream_monitoring(sampling_interval=0.1)
    snapshots = [next(stream) for _ in range(3)]
    stream.close()
    times = [float(snapshot["timestamp"]) for snapshot in snapshots]
    assert times == sorted(times)
    assert len(set(times)) == 3
    assert all(float(snapshot["memory_mb"]) > 0 for snapshot in snapshots)


# Statuses.


class Lab:
    """A `ManagedServer` with whatever models a test wants, and one stub that tries once."""

    def __init__(self, directory: Path, **settings: int) -> None:
        self.directory = directory
        self.gate = Gate(directory / "gate")
        self.gate.write_factory(directory)
        config = {"port": 0, "metrics_port": 0, **settings}
        self.server = ManagedServer(ServerConfig.model_validate(config))

    def __enter__(self) -> Lab:
        self.server.start()
        self.address = f"127.0.0.1:{self.server.port}"
        unlimited = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        self.channel = grpc.insecure_channel(
            self.address, [*unlimited, ("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = compute_pb2_grpc.ComputeServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        return self

    def __exit__(self, *error: object) -> None:
        self.gate.release()
        self.server.stop()
        self.channel.close()

    def config(self, model_id: str, path: str, **keys: object) -> ModelConfig:
        values = {"model_id": model_id, "model_path": path, "device": "cpu", **keys}
        return ModelConfig.model_validate(values).with_base_dir(self.directory)

    def load_mlp(self) -> nn.Module:
        module = save_mlp(self.directory / "mlp.pt", WIDTH)
        shape = {"input_shape": [-1, WIDTH]}
        self.server.load_model(self.config("mlp", "mlp.pt", config=shape))
        return module

    def load_slow(self, **keys: object) -> None:
        slow = self.config("slow", "gated:slow", warmup=False, config=self.gate.config, **keys)
        self.server.load_model(slow)

    def refusal(self, request: compute_pb2.ComputeRequest, timeout: float = 30) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as refused:
            self.stub.Compute(request, timeout=timeout)
        details = refused.value.details()
        assert "Traceback" not in details
        assert ".py" not in details
        return refused.value


def request_of(tensor: torch.Tensor, model_id: str = "") -> compute_pb2.ComputeRequest:
    data, shape = to_wire(tensor)
    return compute_pb2.ComputeRequest(data=data, shape=shape, model_id=model_id)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        yield lab


@pytest.mark.parametrize(
    ("data", "shape", "named"),
    [
        (b"\0" * 12, [1, WIDTH], "bytes"),
        (b"\0" * 32, [-1, WIDTH], "-1"),
        (b"\0" * 16, [1, 4], "[1, 4]"),
    ],
    ids=["bytes-do-not-match-shape", "bad-shape", "does-not-fit-input-shape"],
)
def test_an_input_that_cannot_be_is_invalid_argument(
    lab: Lab, data: bytes, shape: list[int], named: str
) -> None:
    lab.load_mlp()
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp")
    error = lab.refusal(request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in error.details()
    answered = lab.stub.Compute(request_of(torch.ones(1, WIDTH), "mlp"))
    assert list(answered.shape) == [1, WIDTH]


def test_an_unknown_dtype_is_invalid_argument(lab: Lab) -> None:
    lab.load_mlp()
    request = request_of(torch.ones(1, WIDTH), "mlp")
    request.metadata["dtype"] = "float7"
    error = lab.refusal(request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "float7" in error.details()


def test_an_unknown_model_is_not_found_and_not_retried(lab: Lab) -> None:
    lab.load_mlp()
    error = lab.refusal(request_of(torch.ones(1, WIDTH), "mpl"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'mpl'" in error.details()
    with V1Client(lab.address) as client, pytest.raises(grpc.RpcError):
        client.compute(torch.ones(1, WIDTH), model_id="mpl")
    assert client.attempts == 1


@pytest.mark.parametrize("model_id", ["mlp", ""])
def test_an_unknown_forward_is_not_found(lab: Lab, model_id: str) -> None:
    lab.load_mlp()
    data, shape = to_wire(torch.ones(1, WIDTH))
    with pytest.raises(grpc.RpcError) as refused:
        lab.stub.ComputeBackward(
            compute_pb2.BackwardRequest(
                grad_output_data=data,
                grad_output_shape=shape,
                forward_id="never-made",
                model_id=model_id,
            )
        )
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert "never-made" in refused.value.details()


def test_without_any_model_ready_it_is_unavailable_and_retried(lab: Lab) -> None:
    error = lab.refusal(request_of(torch.ones(1, WIDTH)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "no model is READY" in error.details()

    # The retry of a 1.0 client finds the model that was loaded meanwhile.
    def load_meanwhile(seconds: float) -> None:
        lab.load_mlp()

    with V1Client(lab.address, sleep=load_meanwhile) as client:
        assert client.compute(torch.ones(1, WIDTH)).shape == (1, WIDTH)
    assert client.attempts == 2


def test_a_model_that_loads_is_unavailable_and_others_answer(lab: Lab) -> None:
    module = lab.load_mlp()
    config = lab.config("late", "gated:slow_to_build", warmup=False, config=lab.gate.config)
    with ThreadPoolExecutor(1) as pool, lab.gate:
        loading = pool.submit(lab.server.load_model, config)
        lab.gate.wait_begun(1)
        error = lab.refusal(request_of(torch.ones(1, WIDTH), "late"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "LOADING" in error.details()
        x = torch.randn(1, WIDTH)
        answered = lab.stub.Compute(request_of(x, "mlp"))
        torch.testing.assert_close(from_wire(answered.data, answered.shape), module(x))
        lab.gate.release()
        assert loading.result(30)
    assert list(lab.stub.Compute(request_of(torch.ones(1, 2), "late")).shape) == [1, 2]


def test_a_model_that_drains_is_unavailable_and_finishes_what_it_has_begun(lab: Lab) -> None:
    lab.load_slow()
    with ThreadPoolExecutor(1) as pool, lab.gate:
        running = lab.stub.Compute.future(request_of(torch.ones(1, 2), "slow"), timeout=60)
        lab.gate.wait_begun(1)
        unloading = pool.submit(lab.server.unload_model, "slow")
        eventually(
            lambda: lab.server.model_manager.get_model_info("slow")["state"] == "UNLOADING",
            "it drains",
        )
        error = lab.refusal(request_of(torch.ones(1, 2), "slow"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        lab.gate.release()
        answered = running.result()
        assert from_wire(answered.data, answered.shape).tolist() == [[2.0, 2.0]]
        assert unloading.result(30)
    error = lab.refusal(request_of(torch.ones(1, 2), "slow"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_model_that_raises_is_internal_with_its_id_and_the_errors_type(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.server.load_model(lab.config("broken", "gated:raising", warmup=False))
    error = lab.refusal(request_of(torch.ones(1, 2), "broken"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == ("model 'broken' raised ArithmeticError: the sum does not come out")
    # The stack is for whoever runs the node.
    assert any(record.exc_info for record in caplog.records)


def test_a_message_over_the_limit_is_resource_exhausted(lab: Lab) -> None:
    lab.load_mlp()
    huge = compute_pb2.ComputeRequest(data=bytes(101 * 2**20), shape=[101 * 2**18], model_id="mlp")
    error = lab.refusal(huge)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert lab.stub.Compute(request_of(torch.ones(1, WIDTH), "mlp")).data


def test_a_request_whose_deadline_passes_in_the_queue_is_never_computed(tmp_path: Path) -> None:
    x = request_of(torch.ones(1, 2), "slow")
    with Lab(tmp_path, max_workers=1) as lab:
        lab.load_slow()
        first = lab.stub.Compute.future(x, timeout=60)
        lab.gate.wait_begun(1)
        assert lab.refusal(x, timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        lab.gate.release()
        # The one thread takes them in order: when the third is answered, the second is over.
        third = lab.stub.Compute.future(x, timeout=60)
        assert first.result().data == third.result().data
        assert lab.gate.begun == 2


def test_what_still_waits_after_drain_timeout_is_told_to_try_again_and_what_runs_goes_on(
    tmp_path: Path,
) -> None:
    x = request_of(torch.ones(1, 2), "slow")
    with Lab(tmp_path, max_workers=1) as lab:
        lab.load_slow(drain_timeout_s=0.3)
        running = lab.stub.Compute.future(x, timeout=60)
        lab.gate.wait_begun(1)
        waiting = [lab.stub.Compute.future(x, timeout=60) for _ in range(3)]
        in_flight = lab.server.model_manager.table.by_model["slow"]
        eventually(lambda: in_flight.in_flight == 4, "all have been taken over")
        with pytest.raises(OperationInProgress, match="slow"):
            lab.server.unload_model("slow")
        for call in waiting:
            error = call.exception(60)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "was unloaded before this request's turn; try again" in error.details()
        assert not running.done()
        lab.gate.release()
        assert running.result(60).shape == [1, 2]
        assert lab.gate.begun == 1


def test_a_full_queue_is_resource_exhausted_and_loses_nothing(tmp_path: Path) -> None:
    x = request_of(torch.ones(1, 2), "slow")
    with Lab(tmp_path, max_workers=1) as lab:
        lab.load_slow()
        first = lab.stub.Compute.future(x, timeout=60)
        lab.gate.wait_begun(1)
        waiting = [lab.stub.Compute.future(x, timeout=60) for _ in range(1100)]
        refused = threading.Event()
        for call in waiting:
            call.add_done_callback(lambda _: refused.set())
        # One runs and 1024 wait; of the others each is refused at once.
        assert refused.wait(30)
        eventually(lambda: sum(call.done() for call in waiting) == 76, "76 are refused")
        lab.gate.release()
        statuses = [call.code() for call in (first, *waiting)]
        assert statuses.count(grpc.StatusCode.OK) == 1025
        assert statuses.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 76
        assert lab.gate.begun == 1025
        assert lab.stub.Compute(x).data == first.result().data


# Health, reflection, parked models.


def check(lab: Lab, service: str) -> str:
    """What `grpc.health.v1` says of a service."""
    try:
        answer = lab.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    except grpc.RpcError as error:
        return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_grpc_health_tells_of_the_node_and_of_each_model(lab: Lab) -> None:
    assert check(lab, "") == "SERVING"
    assert check(lab, "splitlearn.comm.ComputeService") == "SERVING"
    assert check(lab, "mlp") == "NOT_FOUND"
    lab.load_mlp()
    eventually(lambda: check(lab, "mlp") == "SERVING", "the model is SERVING")
    lab.server.unload_model("mlp")
    eventually(
        lambda: check(lab, "mlp") in ("SERVICE_UNKNOWN", "NOT_FOUND"), "the model is unknown again"
    )
    assert check(lab, "") == "SERVING"


def test_reflection_lists_the_services(lab: Lab) -> None:
    services = ProtoReflectionDescriptorDatabase(lab.channel).get_services()
    assert sorted(services) == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "splitlearn.comm.ComputeService",
    ]


def test_open_streams_of_reflection_keep_no_probe_waiting(lab: Lab) -> None:
    """Each kept one of the four threads that answer HealthCheck for as long as its caller liked."""
    closed = threading.Event()

    def asked() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        closed.wait(60)

    stub = reflection_pb2_grpc.ServerReflectionStub(lab.channel)
    streams = [stub.ServerReflectionInfo(asked(), timeout=60)]
    try:
        assert next(streams[0]).list_services_response.service
        # Those that find no thread wait for one.
        streams += [stub.ServerReflectionInfo(asked(), timeout=60) for _ in range(7)]
        assert lab.stub.HealthCheck(compute_pb2.HealthRequest(), timeout=30).status == "ok"
        assert check(lab, "") == "SERVING"
    finally:
        closed.set()
        for stream in streams:
            stream.cancel()


@pytest.mark.parametrize("max_workers", [1, 10])
def test_a_request_for_a_parked_model_brings_it_back_and_is_answered(
    tmp_path: Path, max_workers: int
) -> None:
    module = save_mlp(tmp_path / "mlp.pt", WIDTH)
    (tmp_path / "mlp.yaml").write_text(
        json.dumps({"model_id": "mlp", "model_path": "mlp.pt", "keep_alive_s": 0.2})
    )
    settings = ServerConfig(port=0, metrics_port=0, settle_s=0.05, max_workers=max_workers)
    with ManagedServer(settings, directory=tmp_path) as server:
        status = server.reconciler.status

        def phase() -> str:
            return str(status.published.get("mlp", {}).get("phase"))

        eventually(lambda: server.reconciler.converged, "it was loaded")
        with V1Client(f"127.0.0.1:{server.port}", timeout=20) as client:
            for _ in range(2):
                eventually(lambda: phase() == "Evicted", "it is parked")
                x = torch.randn(1, WIDTH)
                torch.testing.assert_close(client.compute(x, model_id="mlp"), module(x))
                assert client.attempts == 1
