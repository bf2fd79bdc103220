"""Clients on the server's own machine: a Unix socket, shared memory; and what requests may announce."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from splitlearn_comm import (
    ClientClosed,
    GRPCComputeClient,
    Int8Codec,
    RemoteComputeError,
    ServerStartError,
    TensorCodec,
    UnsupportedByServer,
    Zstd,
)
from splitlearn_comm.client.carriage import Carriage
from splitlearn_comm.core import InvalidRequest, NotReady, shared_memory
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_comm.server import ComputeServicer, SystemMonitor, build_server
from splitlearn_comm.server.backend import ServiceInfo
from support.comm_backend import FakeNode
from support.comm_models import Doubler, Gate, Raising
from support.interceptors import interceptors


def files() -> set[Path]:
    return set(shared_memory.DIRECTORY.glob("splitlearn-*"))


class Place:
    """A server at a port and a socket."""

    def __init__(self, path: Path, way: str = "") -> None:
        self.path = path
        self.node = FakeNode({"m": Doubler(), "bad": Raising(ValueError("no"))})
        servicer = ComputeServicer(self.node, SystemMonitor())
        self.server = build_server(
            servicer, "127.0.0.1:0", unix_socket=path, interceptors=interceptors(way)
        )
        self.server.start()
        self.at_socket = f"unix:{path}"
        self.at_port = f"127.0.0.1:{self.server.port}"


@pytest.fixture(params=["taken over", "gRPC's own"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    made = Place(tmp_path / "node.sock", request.param)
    yield made
    made.server.stop(0.1)
    assert not made.path.exists()


def test_the_socket_is_for_its_own_user_and_answers_like_the_port(place: Place) -> None:
    mode = place.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0
    for address in (place.at_socket, place.at_port):
        with GRPCComputeClient(address) as client:
            assert torch.equal(client.compute(torch.ones(2, 2), "m"), torch.full((2, 2), 2.0))


def test_a_server_that_stops_leaves_the_socket_of_another_one(tmp_path: Path) -> None:
    first = Place(tmp_path / "node.sock")
    first.path.unlink()
    second = Place(first.path)
    first.server.stop(0.1)
    with GRPCComputeClient(second.at_socket) as client:
        assert torch.equal(client.compute(torch.ones(2, 2), "m"), torch.full((2, 2), 2.0))
    second.path.unlink()
    second.path.write_text("somebody's")
    second.server.stop(0.1)
    assert second.path.read_text() == "somebody's"


def test_a_socket_that_nobody_uses_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    first = Place(path)
    with pytest.raises(ServerStartError, match="another process listens there"):
        Place(path)
    with GRPCComputeClient(first.at_socket) as client:
        assert client.health_check()
    first.server.stop(0.1)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "a file that is no socket"),
        ("gone/x.sock", "does not exist"),
        ("x" * 120, "103 bytes"),
    ],
)
def test_a_socket_that_cannot_be_is_refused_in_plain_words(
    tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ServerStartError, match=why):
        Place(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("codec", [TensorCodec(), Int8Codec(), TensorCodec(compression=Zstd())])
@pytest.mark.parametrize("shape", [[2, 3], [0, 4], [], [300, 1000]], ids=str)
def test_shared_memory_gives_the_same_answers(
    place: Place, shape: list[int], codec: TensorCodec
) -> None:
    before = files()
    tensor = torch.randn(shape)
    options = {"codec": codec, "announce_dtype": True}
    with (
        GRPCComputeClient(place.at_port, **options) as plain,
        GRPCComputeClient(place.at_socket, shared_memory=True, **options) as shared,
    ):
        expected = plain.compute(tensor, "m")
        assert torch.equal(shared.compute(tensor, "m"), expected)
        assert torch.equal(shared.compute_async(tensor, "m").result(20), expected)
        assert all(torch.equal(x, expected) for x in shared.compute_many([tensor] * 40, "m"))
        assert len(files() - before) <= 16
    assert files() <= before


def test_many_threads_share_no_file(place: Place) -> None:
    with (
        GRPCComputeClient(place.at_socket, shared_memory=True) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def right(value: int) -> bool:
            tensor = torch.full((256, 256), float(value))
            return torch.equal(client.compute(tensor, "m"), tensor * 2)

        assert all(pool.map(right, range(200)))


def test_files_of_requests_that_failed_are_not_used_again(place: Place) -> None:
    before = files()
    with GRPCComputeClient(place.at_socket, shared_memory=True) as client:
        with pytest.raises(RemoteComputeError):
            client.compute(torch.ones(1 << 16), "gone")
        assert files() <= before
        failed = client.compute_async(torch.ones(1 << 16), "gone")
        with pytest.raises(RemoteComputeError):
            failed.result(20)
        assert files() <= before


def test_shared_memory_is_refused_over_a_port_and_where_it_makes_no_sense(
    place: Place, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="only at a Unix socket"):
        GRPCComputeClient(place.at_port, shared_memory=True)
    file = shared_memory.SharedFile()
    foreign = shared_memory.DIRECTORY / "splitlearn-of-somebody"
    link = shared_memory.DIRECTORY / f"splitlearn-{'0' * 32}"
    try:
        said = file.put(bytes(8))
        link.symlink_to(tmp_path / "secret")
        (tmp_path / "secret").write_bytes(bytes(64))
        wrong = {
            f"{file.name}:16": "has 8 bytes, not 16",
            f"{file.name}:1{'0' * 12}": "are accepted",
            f"splitlearn-{'f' * 32}:8": "No such file",
            f"{link.name}:8": "symbolic link",
            f"{foreign.name}:8": "expected NAME:BYTES",
            "../../etc/passwd:8": "expected NAME:BYTES",
            "": "expected NAME:BYTES",
        }
        for address, value, why in [
            (place.at_port, said, "only for calls over a Unix socket"),
            *((place.at_socket, value, why) for value, why in wrong.items()),
        ]:
            with grpc.insecure_channel(address) as channel:
                request = compute_pb2.ComputeRequest(
                    shape=[2], model_id="m", metadata={shared_memory.KEY: value}
                )
                with pytest.raises(grpc.RpcError, match=why) as caught:
                    compute_pb2_grpc.ComputeServiceStub(channel).Compute(request, timeout=20)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        link.unlink()
        file.close()


def test_a_cancelled_future_leaves_no_file_behind(tmp_path: Path) -> None:
    before = files()
    place = Place(tmp_path / "node.sock")
    gate = Gate()
    place.node.functions["m"] = gate
    with GRPCComputeClient(place.at_socket, shared_memory=True) as client:
        futures = [client.compute_async(torch.ones(300, 300), "m") for _ in range(3)]
        made, cancelled = files() - before, [future.cancel() for future in futures]
        left = files() - before
        gate.open.set()
    assert len(made) == 3
    assert all(cancelled)
    assert not left
    place.server.stop(1.0)


def test_what_is_never_asked_or_answered_as_said_leaves_no_file_behind(tmp_path: Path) -> None:
    before = files()
    place = Place(tmp_path / "node.sock")
    tensor, complex_ones = torch.ones(300, 300), torch.ones(1, dtype=torch.complex64)
    client = GRPCComputeClient(place.at_socket, shared_memory=True)
    with pytest.raises(TypeError):
        client.compute_with_cache(tensor, [(complex_ones, complex_ones)], model_id="m")
    client.compute(tensor, "m")
    client.close()
    with pytest.raises(ClientClosed):
        client.compute_async(tensor, "m")
    carriage = Carriage(TensorCodec(), announces=False, shared=True, known=dict)
    for size in (-1, 1 << 62):
        load = carriage.load(tensor)
        with pytest.raises(OSError, match=f"0 bytes are there, not {size}"):
            load.unload(compute_pb2.ComputeResponse(shape=[300, 300], shared_bytes=size), b"")
        load.give_up()
    assert files() <= before
    place.server.stop(0.1)


def test_what_is_sent_once_more_has_a_file_of_its_own() -> None:
    before = files()
    carriage = Carriage(TensorCodec(), announces=False, shared=True, known=dict)
    tensor = torch.randn(300, 300)
    load = carriage.load(tensor)
    first = load.metadata[shared_memory.KEY]
    load.renew()
    second = load.metadata[shared_memory.KEY]
    assert second != first
    with pytest.raises(InvalidRequest):
        shared_memory.write(first, b"late")
    assert bytes(shared_memory.read(second, tensor.nbytes)) == TensorCodec().encode(tensor)[0]
    size = shared_memory.write(second, TensorCodec().encode(tensor)[0])
    answer = compute_pb2.ComputeResponse(shape=tensor.shape, shared_bytes=size)
    assert torch.equal(load.unload(answer, b""), tensor)
    carriage.close()
    assert files() <= before


@pytest.mark.parametrize("shared", [False, True])
def test_many_by_shared_memory_are_tried_again(place: Place, shared: bool) -> None:
    before = files()
    place.node.refusal = NotReady("a moment, please")

    def ready(_: float) -> None:
        place.node.refusal = None

    with GRPCComputeClient(place.at_socket, shared_memory=shared, sleep=ready) as client:
        tensors = [torch.full((300, 300), float(n)) for n in range(4)]
        for tensor, answer in zip(tensors, client.compute_many(tensors, "m"), strict=True):
            assert torch.equal(answer, tensor * 2)
    assert files() <= before


_ANOTHER = """
import os, sys, torch
from splitlearn_comm import GRPCComputeClient

client = GRPCComputeClient(sys.argv[1], shared_memory=True)
client.compute(torch.ones(300, 300), "m")
print("done", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_client_left_is_removed_by_a_later_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "node.sock")
    before = files()
    foreign = shared_memory.DIRECTORY / f"splitlearn-of-somebody-{tmp_path.name}"
    foreign.touch()
    command = [sys.executable, "-c", _ANOTHER, place.at_socket]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    try:
        with (
            subprocess.Popen(command, **pipes) as killed,
            subprocess.Popen(command, **pipes) as other,
        ):
            for process in (killed, other):
                assert process.stdout is not None
                assert process.stdout.readline() == b"done\n"
            assert len(files() - before) == 3
            killed.kill()
            killed.wait(20)
            with GRPCComputeClient(place.at_socket, shared_memory=True) as early:
                early.compute(torch.ones(300, 300), "m")
                assert len(files() - before) == 4
            for path in files() - before - {foreign}:
                os.utime(path, (0, 0))
            with GRPCComputeClient(place.at_socket, shared_memory=True) as client:
                client.compute(torch.ones(300, 300), "m")
                assert len(files() - before) == 3
            assert len(files() - before) == 2
            assert other.stdin is not None
            other.stdin.close()
        assert files() - before == {foreign}
    finally:
        foreign.unlink()
        place.server.stop(0.1)


def test_a_forked_process_neither_uses_nor_removes_the_files_of_its_parent(tmp_path: Path) -> None:
    before = files()
    carriage = Carriage(TensorCodec(), announces=False, shared=True, known=dict)
    tensor = torch.ones(300, 300)
    carriage.load(tensor).unload(compute_pb2.ComputeResponse(shape=[0]), b"")
    (mine,) = files() - before
    child = os.fork()
    if not child:
        used = carriage.load(tensor).metadata[shared_memory.KEY].split(":")[0]
        carriage.close()
        os.unlink(shared_memory.DIRECTORY / used)
        os._exit(1 if used == mine.name else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files() - before == {mine}
    carriage.close()
    assert files() <= before


def test_a_server_that_does_not_know_what_is_announced_is_sent_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitlearn_comm.server.servicer.extensions", lambda: ("dtype:float16",))
    place.node.service_info = lambda: ServiceInfo("old", "cpu")  # type: ignore[method-assign]
    with GRPCComputeClient(place.at_port, codec=Int8Codec(), announce_dtype=True) as client:
        with pytest.raises(UnsupportedByServer, match="does not know dtype:int8"):
            client.compute(torch.ones(2), "m")
        with pytest.raises(UnsupportedByServer):
            client.compute_async(torch.ones(2), "m")
    assert not place.node.observed
    half = TensorCodec(torch.float16)
    with GRPCComputeClient(place.at_port, codec=half, announce_dtype=True) as client:
        assert client.compute(torch.ones(2), "m").dtype is torch.float16


def test_what_nobody_knows_is_the_callers_mistake(place: Place) -> None:
    data, shape = TensorCodec().encode(torch.ones(2))
    with grpc.insecure_channel(place.at_port) as channel:
        for key in ("dtype", "compression"):
            request = compute_pb2.ComputeRequest(
                data=data, shape=shape, model_id="m", metadata={key: "lzma"}
            )
            with pytest.raises(grpc.RpcError, match=f'"{key}".*got .lzma') as caught:
                compute_pb2_grpc.ComputeServiceStub(channel).Compute(request, timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_integers_are_not_sent_as_int8(place: Place) -> None:
    with (
        GRPCComputeClient(place.at_port, codec=Int8Codec(), announce_dtype=True) as client,
        pytest.raises(ValueError, match="do not arrive as they are"),
    ):
        client.compute(torch.arange(4), "m")
