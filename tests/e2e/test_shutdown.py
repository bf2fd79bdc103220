"""Stopping a node: no accepted request loses its answer, and nothing is left behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig
from splitlearn_manager.errors import ModelUnavailable, ServerError
from support.comm_v1 import V1Client
from support.gated import Gate
from support.node import Node
from support.served import declare
from support.waiting import eventually

REQUESTS = 8


def slow_node(tmp_path: Path) -> tuple[Node, Gate]:
    """A node, not started yet, with the model `slow`, which waits for the gate."""
    gate = Gate(tmp_path / "gate")
    node = Node(tmp_path / "desired", {"settle_s": 0.05})
    gate.write_factory(node.directory)
    declare(node.directory, "slow", model_path="gated:slow", warmup=False, config=gate.config)
    return node, gate


def answer(address: str, value: float) -> torch.Tensor:
    """One request of a 1.0 client that is not repeated: a retry would hide a lost answer."""
    with V1Client(address, timeout=60, sleep=lambda seconds: None) as client:
        found = client.compute(torch.full((1, 4), value), model_id="slow")
        assert client.attempts == 1
    return found


def refuses(address: str) -> bool:
    """Whether new requests are turned away: UNAVAILABLE, or CANCELLED if one slips into the shutdown."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = compute_pb2_grpc.ComputeServiceStub(channel)
        try:
            stub.HealthCheck(compute_pb2.HealthRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_lets_all_running_requests_end_and_exits_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    node, gate = slow_node(tmp_path)
    with node, ThreadPoolExecutor(REQUESTS) as pool, gate:
        node.wait_phase("slow", "Ready")
        answers: list[Future[torch.Tensor]] = [
            pool.submit(answer, node.address, float(value)) for value in range(REQUESTS)
        ]
        gate.wait_begun(REQUESTS)
        node.process.send_signal(number)
        eventually(lambda: refuses(node.address), "new requests are refused")
        assert not any(future.done() for future in answers)
        assert node.process.poll() is None
        # A node that drains is alive and not ready: a supervisor must not kill it meanwhile.
        assert (node.get("/healthz")[0], node.get("/readyz")[0]) == (200, 503)

        gate.release()
        for value, future in enumerate(answers):
            assert torch.equal(future.result(30), torch.full((1, 4), 2.0 * value))
        assert node.process.wait(30) == 0
    assert node.find("event=Stopped")
    assert not node.find("Traceback")
    assert gate.begun == REQUESTS


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    node, gate = slow_node(tmp_path)
    with node, ThreadPoolExecutor(1) as pool, gate:
        node.wait_phase("slow", "Ready")
        lost = pool.submit(answer, node.address, 1.0)
        gate.wait_begun(1)
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(node.address), "the first signal has been taken")
        assert node.process.poll() is None
        node.process.send_signal(signal.SIGTERM)
        # The gate stays shut: nothing but the signal can end it.
        assert node.process.wait(30) == 128 + signal.SIGTERM
        gate.release()
        with pytest.raises((grpc.RpcError, AssertionError)):
            lost.result(60)
    assert not node.find("event=Stopped")


@pytest.mark.parametrize("key", ["port", "metrics_port"])
def test_a_port_that_is_taken_is_named_by_its_key_and_exits_2(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        settings = {"port": 0, "metrics_port": 0, key: taken}
        (tmp_path / "server.yaml").write_text(json.dumps(settings))
        ended = subprocess.run(
            [sys.executable, "-m", "splitlearn_manager.reconcile", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 2
    assert ended.stdout == ""
    message = ended.stderr.splitlines()[-1]
    assert message.startswith(f"{key}: ")
    assert str(taken) in message
    assert "Traceback" not in ended.stderr


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Linear(4, 4), path)
    return ModelConfig(model_id="m", model_path=str(path))


def ephemeral(**keys: int) -> ServerConfig:
    return ServerConfig.model_validate({"port": 0, "metrics_port": 0, **keys})


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_stop_unloads_the_models_and_closes_the_ports_and_may_be_called_twice(
    model: ModelConfig,
) -> None:
    server = ManagedServer(ephemeral())
    server.load_model(model)
    server.start()
    assert listens(server.port)
    assert listens(server.metrics_port)
    assert not server.wait_for_termination(timeout=0)
    server.stop()
    server.stop()
    assert server.wait_for_termination(timeout=0)
    assert server.model_manager.list_models() == []
    assert not listens(server.port)
    assert not listens(server.metrics_port)
    with pytest.raises(ModelUnavailable, match="shutting down"):
        server.load_model(model)


def test_stop_from_two_threads_ends_both(model: ModelConfig) -> None:
    server = ManagedServer(ephemeral())
    server.start()
    server.load_model(model)
    stoppers = [threading.Thread(target=server.stop) for _ in range(2)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(30)
        assert not stopper.is_alive()
    assert server.model_manager.list_models() == []


def test_a_server_that_was_never_started_can_be_stopped(model: ModelConfig) -> None:
    server = ManagedServer(ephemeral())
    server.load_model(model)
    server.stop()
    assert server.model_manager.list_models() == []
    assert server.wait_for_termination(timeout=0)


def test_starting_twice_is_an_error_and_disturbs_nothing(model: ModelConfig) -> None:
    with ManagedServer(ephemeral()) as server:
        server.load_model(model)
        with pytest.raises(ServerError, match="started already"):
            server.start()
        with V1Client(f"127.0.0.1:{server.port}") as client:
            assert client.compute(torch.ones(1, 4)).shape == (1, 4)


def test_a_stopped_server_is_not_started_again() -> None:
    server = ManagedServer(ephemeral())
    server.start()
    server.stop()
    with pytest.raises(ServerError, match="make a new one"):
        server.start()


def test_the_context_manager_stops_it_when_its_block_raises(model: ModelConfig) -> None:
    with pytest.raises(KeyError), ManagedServer(ephemeral()) as server:
        server.load_model(model)
        raise KeyError("the block's own")
    assert server.wait_for_termination(timeout=0)
    assert server.model_manager.list_models() == []
    assert not listens(server.port)


@pytest.mark.parametrize("key", ["port", "metrics_port"])
def test_a_start_that_fails_leaves_nothing_open_and_can_be_tried_again(
    key: str, model: ModelConfig, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        other = first.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        ports = {"port": other, "metrics_port": other, key: taken}
        server = ManagedServer(ephemeral(**ports), directory=tmp_path / "desired")
        with pytest.raises(ServerError, match=rf"^{key}: .*{taken}"):
            server.start()
        assert not listens(other)
        # Nor the directory: another node may serve it now.
        with ManagedServer(ephemeral(), directory=tmp_path / "desired"):
            pass
    server.start()
    server.load_model(model)
    with V1Client(f"127.0.0.1:{server.port}") as client:
        assert client.compute(torch.ones(1, 4)).shape == (1, 4)
    server.stop()
    assert not listens(server.port)
    assert not listens(server.metrics_port)


def test_stopping_one_whose_start_failed_leaves_another_nodes_socket_alone(
    tmp_path: Path,
) -> None:
    from splitlearn_manager.cli.asking import ask
    from splitlearn_manager.server.state_dir import socket_of, state_dir_for

    directory = tmp_path / "desired"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        failed = ManagedServer(ephemeral(port=holder.getsockname()[1]), directory=directory)
        with pytest.raises(ServerError):
            failed.start()
    with ManagedServer(ephemeral(), directory=directory):
        failed.stop()
        assert ask(socket_of(state_dir_for(directory)), "observe")
