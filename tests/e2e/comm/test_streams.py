"""Many requests over one call: every one is answered, as a call of its own would be, in any order."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitlearn_comm import GRPCComputeClient, GRPCComputeServer
from splitlearn_comm.client.errors import RemoteComputeError
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_comm.core import ComputeFunction, ModelComputeFunction, TensorCodec
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_comm.server.streams import WINDOW
from support.interceptors import interceptors
from support.waiting import eventually

PATIENCE_S = 20.0
RPC = "/splitlearn.comm.ComputeService/ComputeStream"


class Gated(ComputeFunction):
    """Twice its input, once the gate is open; raises for negative values."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        self.began.release()
        assert self.gate.wait(PATIENCE_S)
        if input_tensor.min() < 0:
            raise ValueError("negative")
        return input_tensor * 2


@pytest.fixture
def function() -> Gated:
    return Gated()


@pytest.fixture(params=["taken over", "gRPC's own"])
def server(function: Gated, request: pytest.FixtureRequest) -> Iterator[GRPCComputeServer]:
    way = interceptors(request.param)
    with GRPCComputeServer(function, port=0, max_workers=4, interceptors=way) as server:
        yield server


@pytest.fixture
def client(server: GRPCComputeServer) -> Iterator[GRPCComputeClient]:
    once = FixedDelay(max_attempts=1)
    with GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S, retry_strategy=once) as client:
        yield client


def test_each_future_gets_its_own_answer(client: GRPCComputeClient, function: Gated) -> None:
    function.gate.set()
    tensors = [torch.full((1, size), float(size)) for size in range(1, 100)]
    futures = [client.compute_async(tensor) for tensor in tensors]
    for tensor, future in zip(tensors, futures, strict=True):
        assert torch.equal(future.result(PATIENCE_S), tensor * 2)
    assert client.get_statistics()["total_requests"] == len(tensors)


def test_large_tensors_pass(client: GRPCComputeClient, function: Gated) -> None:
    function.gate.set()
    tensors = [torch.rand(1000, 1000) for _ in range(3)]
    for tensor, answer in zip(tensors, client.compute_many(tensors), strict=True):
        assert torch.equal(answer, tensor * 2)


def test_one_refusal_is_one_futures_own(client: GRPCComputeClient, function: Gated) -> None:
    function.gate.set()
    good, bad = client.compute_async(torch.ones(2)), client.compute_async(-torch.ones(2))
    assert torch.equal(good.result(PATIENCE_S), torch.full((2,), 2.0))
    with pytest.raises(RemoteComputeError, match=r"INTERNAL: .*ValueError: negative"):
        bad.result(PATIENCE_S)
    assert torch.equal(
        client.compute_async(torch.ones(1)).result(PATIENCE_S), torch.full((1,), 2.0)
    )


class Wider(ComputeFunction):
    """A thousand numbers for each; waits at the gate with what is negative."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        if input_tensor.min() < 0:
            self.began.release()
            assert self.gate.wait(PATIENCE_S)
        return input_tensor.repeat(1000)


@pytest.mark.parametrize("way", ["taken over", "gRPC's own"])
def test_an_answer_that_is_too_large_is_one_futures_own(way: str) -> None:
    """It ended the stream, and with it all that was asked on it."""
    wider, once = Wider(), FixedDelay(max_attempts=1)
    with (
        GRPCComputeServer(
            wider, port=0, max_message_length=10_000, interceptors=interceptors(way)
        ) as server,
        GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S, retry_strategy=once) as client,
    ):
        waits = client.compute_async(-torch.ones(1))
        assert wider.began.acquire(timeout=PATIENCE_S)
        with pytest.raises(RemoteComputeError, match="most that is sent is 10000"):
            client.compute_async(torch.ones(100)).result(PATIENCE_S)
        wider.gate.set()
        assert torch.equal(waits.result(PATIENCE_S), -torch.ones(1000))


def test_a_request_that_is_too_large_fails_alone(
    server: GRPCComputeServer, function: Gated
) -> None:
    limit = 1 << 16
    once = FixedDelay(max_attempts=1)
    with GRPCComputeClient(
        f"127.0.0.1:{server.port}", PATIENCE_S, max_message_length=limit, retry_strategy=once
    ) as client:
        good = client.compute_async(torch.ones(2))
        assert function.began.acquire(timeout=PATIENCE_S)
        with pytest.raises(RemoteComputeError, match=f"RESOURCE_EXHAUSTED: .*{limit}"):
            client.compute_async(torch.ones(limit)).result(PATIENCE_S)
        function.gate.set()
        assert torch.equal(good.result(PATIENCE_S), torch.full((2,), 2.0))


def test_many_are_given_in_order_whatever_comes_first(
    client: GRPCComputeClient, function: Gated
) -> None:
    function.gate.set()
    taken: list[int] = []

    def tensors() -> Iterator[torch.Tensor]:
        for number in range(50):
            taken.append(number)
            yield torch.full((1,), float(number))

    answers = client.compute_many(tensors(), in_flight=5)
    assert next(answers).item() == 0.0
    assert len(taken) == 5
    assert [answer.item() for answer in answers] == [2.0 * n for n in range(1, 50)]


def test_a_tensor_is_sent_as_it_was_when_it_was_taken_also_when_it_is_tried_again(
    function: Gated, server: GRPCComputeServer
) -> None:
    tensor = torch.zeros(1)

    def one_that_changes() -> Iterator[torch.Tensor]:
        for number in range(8):
            yield tensor.fill_(float(number))

    def restart_meanwhile(seconds: float) -> None:
        if not function.gate.is_set():
            function.gate.set()
            server.start()
        threading.Event().wait(seconds)

    server.stop()
    tries = FixedDelay(max_attempts=100, delay_s=0.1)
    address = f"127.0.0.1:{server.port}"
    options = {"retry_strategy": tries, "sleep": restart_meanwhile}
    with GRPCComputeClient(address, PATIENCE_S, **options) as client:
        answers = [answer.item() for answer in client.compute_many(one_that_changes())]
    assert answers == [2.0 * n for n in range(8)]


def test_many_are_asked_once_where_the_retry_strategy_allows_no_more(
    client: GRPCComputeClient, function: Gated
) -> None:
    function.gate.set()
    with pytest.raises(RemoteComputeError, match="INTERNAL"):
        list(client.compute_many([torch.tensor([-1.0])]))
    assert function.began.acquire(timeout=PATIENCE_S)
    assert not function.began.acquire(blocking=False)


def test_a_stream_reads_no_more_than_its_window(
    client: GRPCComputeClient, function: Gated, server: GRPCComputeServer
) -> None:
    futures = [client.compute_async(torch.full((1,), float(n))) for n in range(3 * WINDOW)]
    for _ in range(4):
        assert function.began.acquire(timeout=PATIENCE_S)
    function.gate.set()
    assert [f.result(PATIENCE_S).item() for f in futures] == [2.0 * n for n in range(3 * WINDOW)]


def test_a_deadline_is_each_requests_own(function: Gated, server: GRPCComputeServer) -> None:
    with GRPCComputeClient(f"127.0.0.1:{server.port}", timeout=0.2) as hasty:
        late = [hasty.compute_async(torch.ones(1)) for _ in range(8)]
        for _ in range(4):
            assert function.began.acquire(timeout=PATIENCE_S)
        passed = threading.Event()
        passed.wait(0.3)
        function.gate.set()
        # Four ran before their time was over, which nobody waits for any more; the others never run.
        ends = [future.exception(PATIENCE_S) for future in late]
        assert all(e.code() is grpc.StatusCode.DEADLINE_EXCEEDED for e in ends)  # type: ignore[union-attr]
        assert not function.began.acquire(blocking=False)


def test_futures_that_are_kept_keep_no_requests(client: GRPCComputeClient, function: Gated) -> None:
    """They kept the bytes of their tensors twice, beside the answers."""
    function.gate.set()
    tensor = torch.ones(1_000_000)
    tracemalloc.start()
    try:
        kept = [client.compute_async(tensor) for _ in range(8)]
        wait(kept, PATIENCE_S)
        most = len(kept) * 6_000_000
        eventually(lambda: tracemalloc.get_traced_memory()[0] < most, "4 MB of each are left")
    finally:
        tracemalloc.stop()


def ended_by(future: Future[torch.Tensor]) -> None:
    sys.exit("a callback must not do this")


def test_a_callback_that_exits_ends_nothing_but_itself(
    client: GRPCComputeClient, function: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the thread that takes the answers, and all requests of the stream with it."""
    first = client.compute_async(torch.ones(1))
    first.add_done_callback(ended_by)
    assert function.began.acquire(timeout=PATIENCE_S)
    rest = [client.compute_async(torch.ones(1)) for _ in range(20)]
    function.gate.set()
    for future in (first, *rest):
        assert future.result(PATIENCE_S).item() == 2.0
    assert "a callback of a future failed" in caplog.text


def test_a_cancelled_future_withdraws_its_request(
    client: GRPCComputeClient, function: Gated
) -> None:
    running = [client.compute_async(torch.ones(1)) for _ in range(4)]
    for _ in running:
        assert function.began.acquire(timeout=PATIENCE_S)
    waiting = [client.compute_async(torch.ones(1)) for _ in range(3)]
    assert waiting[1].cancel()
    last = client.compute_async(torch.ones(1))

    def has_read_all() -> bool:
        info = client.get_service_info()
        return info is not None and info["total_requests"] == 8

    eventually(has_read_all, "the server has read all requests")
    function.gate.set()
    for future in (*running, waiting[0], waiting[2], last):
        assert future.result(PATIENCE_S).item() == 2.0
    with pytest.raises(CancelledError):
        waiting[1].result()
    for _ in range(3):
        assert function.began.acquire(timeout=PATIENCE_S)
    assert not function.began.acquire(blocking=False)


def test_a_server_that_stops_answers_what_it_has_and_refuses_the_rest(
    client: GRPCComputeClient, function: Gated, server: GRPCComputeServer
) -> None:
    futures = [client.compute_async(torch.ones(1)) for _ in range(4)]
    for _ in futures:
        assert function.began.acquire(timeout=PATIENCE_S)
    stopping = threading.Thread(target=server.stop, args=(PATIENCE_S,))
    stopping.start()
    function.gate.set()
    assert [future.result(PATIENCE_S).item() for future in futures] == [2.0] * 4
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    with pytest.raises(RemoteComputeError, match="UNAVAILABLE"):
        client.compute_async(torch.ones(1)).result(PATIENCE_S)


def test_a_stream_that_broke_is_opened_again(function: Gated, server: GRPCComputeServer) -> None:
    function.gate.set()
    with GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S) as client:
        assert client.compute_async(torch.ones(1)).result(PATIENCE_S).item() == 2.0
        server.stop()
        server.start()
        answers = client.compute_many(torch.ones(1) for _ in range(3))
        assert [answer.item() for answer in answers] == [2.0] * 3


def test_a_client_that_is_dropped_leaves_no_threads_behind(
    server: GRPCComputeServer, function: Gated
) -> None:
    before = set(threading.enumerate())
    dropped = GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S)
    # To collect garbage holds this process up, its server too, for longer than a client tries to connect.
    function.gate.set()
    assert dropped.compute_async(torch.ones(1)).result(PATIENCE_S).item() == 2.0
    function.gate.clear()
    last = dropped.compute_async(torch.ones(1))
    del dropped
    gc.collect()
    function.gate.set()
    assert last.result(PATIENCE_S).item() == 2.0
    del last

    def threads_are_gone() -> bool:
        gc.collect()
        left = set(threading.enumerate()) - before
        return not {thread.name for thread in left} & {"compute-stream", "compute-limits"}

    eventually(threads_are_gone, "the stream has ended", PATIENCE_S / 2)


class Collecting(dict[int, Any]):
    """Garbage is collected each time something is put into it."""

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        gc.collect()


def test_many_that_are_collected_as_garbage_are_withdrawn_whatever_is_done_meanwhile(
    server: GRPCComputeServer, function: Gated
) -> None:
    """They may be, by any thread that makes an object: also while it holds the locks of the same stream."""
    function.gate.set()
    client = GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S)
    many = [client.compute_many(torch.ones(9, 1), in_flight=4)]
    assert next(many[0]).item() == 2.0
    many.append(many)  # type: ignore[arg-type]
    stream = client._stream
    assert stream is not None
    assert stream._open is not None
    stream._open._unanswered = Collecting(stream._open._unanswered)
    answers: list[torch.Tensor] = []

    def ask() -> None:
        answers.append(client.compute_async(torch.ones(1)).result(PATIENCE_S))

    asking = threading.Thread(target=ask, daemon=True)
    del many
    asking.start()
    asking.join(PATIENCE_S)
    assert [answer.item() for answer in answers] == [2.0]
    client.close()


_FORKS = """
import os, sys, torch
from splitlearn_comm import GRPCComputeClient

client = GRPCComputeClient(sys.argv[1], timeout=10)
ones = torch.ones(1)
assert client.compute(ones).item() == 2.0
inherited = client._channel._channel
child = os.fork()
assert client.compute_async(ones).result().item() == 2.0
assert client.compute(ones).item() == 2.0
assert (client._channel._channel is inherited) is bool(child)
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_process_that_was_forked_has_a_connection_of_its_own(
    server: GRPCComputeServer, function: Gated
) -> None:
    function.gate.set()
    command = [sys.executable, "-c", _FORKS, f"127.0.0.1:{server.port}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_closing_the_client_fails_what_waits(client: GRPCComputeClient, function: Gated) -> None:
    future = client.compute_async(torch.ones(1))
    assert function.began.acquire(timeout=PATIENCE_S)
    client.close()
    with pytest.raises(RemoteComputeError):
        future.result(PATIENCE_S)
    function.gate.set()


class OneByOne(compute_pb2_grpc.ComputeServiceServicer):
    """A server without streams, as version 1.0 is."""

    def __init__(self) -> None:
        self.address = ""
        self.calls = 0
        self.gate = threading.Event()
        self._lock = threading.Lock()

    def Compute(
        self, request: compute_pb2.ComputeRequest, context: grpc.ServicerContext
    ) -> compute_pb2.ComputeResponse:
        with self._lock:
            self.calls += 1
        assert self.gate.wait(PATIENCE_S)
        tensor = TensorCodec().decode(request.data, request.shape) * 2
        data, shape = TensorCodec().encode(tensor)
        return compute_pb2.ComputeResponse(data=data, shape=shape, compute_time_ms=1.0)


@pytest.fixture
def one_by_one() -> Iterator[OneByOne]:
    server = grpc.server(ThreadPoolExecutor(16))
    servicer = OneByOne()
    compute_pb2_grpc.add_ComputeServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    servicer.gate.set()
    server.stop(None)


def test_a_server_without_streams_is_asked_one_by_one_and_each_once(one_by_one: OneByOne) -> None:
    one_by_one.gate.set()
    with GRPCComputeClient(one_by_one.address, PATIENCE_S) as client:
        futures = [client.compute_async(torch.full((1,), float(n))) for n in range(20)]
        assert [f.result(PATIENCE_S).item() for f in futures] == [2.0 * n for n in range(20)]
        assert one_by_one.calls == 20
        more = client.compute_many(torch.full((1,), float(n)) for n in range(20))
        assert [answer.item() for answer in more] == [2.0 * n for n in range(20)]


def test_closing_the_client_fails_what_waits_for_its_turn_without_streams(
    one_by_one: OneByOne,
) -> None:
    client = GRPCComputeClient(one_by_one.address, PATIENCE_S)
    futures = [client.compute_async(torch.ones(1)) for _ in range(20)]
    eventually(lambda: one_by_one.calls == 8, "as many are asked as there are threads")
    client.close()
    for future in futures:
        assert isinstance(future.exception(PATIENCE_S), RemoteComputeError)


def test_a_cancelled_future_is_not_asked_without_streams(one_by_one: OneByOne) -> None:
    with GRPCComputeClient(one_by_one.address, PATIENCE_S) as client:
        futures = [client.compute_async(torch.ones(1)) for _ in range(20)]
        eventually(lambda: one_by_one.calls == 8, "as many are asked as there are threads")
        assert all(future.cancel() for future in futures[8:])
        one_by_one.gate.set()
        for future in (*futures[:8], client.compute_async(torch.ones(1))):
            assert future.result(PATIENCE_S).item() == 2.0
        assert one_by_one.calls == 9


class Silent(compute_pb2_grpc.ComputeServiceServicer):
    """Takes all requests, and says nothing."""

    def __init__(self) -> None:
        self.address = ""
        self.calls = 0
        self.over = threading.Event()

    def Compute(
        self, request: compute_pb2.ComputeRequest, context: grpc.ServicerContext
    ) -> compute_pb2.ComputeResponse:
        self.calls += 1
        context.abort(grpc.StatusCode.UNAVAILABLE, "a moment, please")

    def ComputeStream(
        self, requests: Iterator[compute_pb2.StreamedRequest], context: grpc.ServicerContext
    ) -> Iterator[compute_pb2.StreamedResponse]:
        self.over.wait(PATIENCE_S)
        yield from ()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = grpc.server(ThreadPoolExecutor(16))
    servicer = Silent()
    compute_pb2_grpc.add_ComputeServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    servicer.over.set()
    server.stop(None)


def test_a_server_that_says_nothing_is_not_waited_for_beyond_the_time_limit(silent: Silent) -> None:
    with GRPCComputeClient(silent.address, timeout=PATIENCE_S) as client:
        patient = client.compute_async(torch.ones(1))
        for _ in range(2):
            hasty = [client.compute_async(torch.ones(1), timeout=0.1) for _ in range(3)]
            for future in hasty:
                with pytest.raises(RemoteComputeError, match="DEADLINE_EXCEEDED"):
                    future.result(PATIENCE_S / 2)
        assert not patient.done()
    assert isinstance(patient.exception(PATIENCE_S), RemoteComputeError)
    limits = "compute-limits"
    eventually(lambda: limits not in {t.name for t in threading.enumerate()}, "it has ended")


def test_time_limits_hold_whatever_callbacks_do(silent: Silent) -> None:
    """One that exits ended the thread that finds what is late, and nothing was late from then on."""
    with GRPCComputeClient(silent.address, 0.3) as client:
        for _ in range(2):
            future = client.compute_async(torch.ones(1))
            future.add_done_callback(ended_by)
            with pytest.raises(RemoteComputeError, match="DEADLINE_EXCEEDED"):
                future.result(PATIENCE_S / 2)


def test_time_limits_hold_again_once_there_are_threads_again(
    silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for whose time limit there was no thread kept all later ones from having one."""
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "compute-limits":
            raise RuntimeError("can't start new thread")
        start(thread)

    with GRPCComputeClient(silent.address, 0.3) as client:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_more)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                client.compute_async(torch.ones(1))
        with pytest.raises(RemoteComputeError) as caught:
            client.compute_async(torch.ones(1)).result(PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("size", [3, 1 << 17], ids=["small", "large"])
def test_bytes_that_are_no_answer_end_the_stream_and_say_so(size: int) -> None:
    over = threading.Event()

    def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(over.set)
        next(requests)
        yield b"\xff" * size
        over.wait(PATIENCE_S)

    service, rpc = RPC.strip("/").split("/")
    handler = grpc.stream_stream_rpc_method_handler(answer)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {rpc: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = GRPCComputeClient(f"127.0.0.1:{port}", PATIENCE_S)
    future = client.compute_async(torch.ones(1))
    with pytest.raises(RemoteComputeError, match="INTERNAL: what the server has sent is no answer"):
        future.result(PATIENCE_S)
    assert over.wait(PATIENCE_S / 2), "the call has ended"
    client.close()
    server.stop(None)


def test_many_are_not_tried_again_once_their_time_is_over(silent: Silent) -> None:
    with GRPCComputeClient(silent.address, timeout=0.2) as client:
        with pytest.raises(RemoteComputeError, match="DEADLINE_EXCEEDED"):
            list(client.compute_many([torch.ones(1)]))
        assert silent.calls == 0


def test_a_request_that_waits_for_its_turn_without_streams_has_its_time_limit(
    one_by_one: OneByOne,
) -> None:
    with GRPCComputeClient(one_by_one.address, PATIENCE_S) as client:
        futures = [client.compute_async(torch.ones(1)) for _ in range(8)]
        late = client.compute_async(torch.ones(1), timeout=0.1)
        with pytest.raises(RemoteComputeError, match="DEADLINE_EXCEEDED"):
            late.result(PATIENCE_S / 2)
        one_by_one.gate.set()
        for future in (*futures, client.compute_async(torch.ones(1))):
            assert future.result(PATIENCE_S).item() == 2.0
        assert one_by_one.calls == 9


class Raw:
    """A stream spoken by hand."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.frames: SimpleQueue[bytes | None] = SimpleQueue()
        self.call = self.channel.stream_stream(RPC)(iter(self.frames.get, None), timeout=PATIENCE_S)

    def send(self, number: int, value: float) -> None:
        data, shape = TensorCodec().encode(torch.full((1,), value))
        request = compute_pb2.ComputeRequest(data=data, shape=shape)
        self.frames.put(compute_pb2.StreamedRequest(id=number, request=request).SerializeToString())


def test_an_id_that_is_taken_is_refused_and_the_stream_goes_on(
    server: GRPCComputeServer, function: Gated
) -> None:
    raw = Raw(server.port)
    raw.send(7, 1.0)
    raw.send(7, 2.0)
    refusal = compute_pb2.StreamedResponse.FromString(next(raw.call))
    assert refusal.id == 7
    assert refusal.refusal.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "give each an id of its own" in refusal.refusal.message
    function.gate.set()
    answer = compute_pb2.StreamedResponse.FromString(next(raw.call))
    assert TensorCodec().decode(answer.response.data, answer.response.shape).item() == 2.0
    raw.frames.put(None)
    assert list(raw.call) == []
    assert raw.call.code() is grpc.StatusCode.OK
    raw.channel.close()


def test_bytes_that_are_no_request_end_the_stream_and_not_the_server(
    server: GRPCComputeServer, function: Gated
) -> None:
    function.gate.set()
    raw = Raw(server.port)
    raw.frames.put(b"\xff\xff\xff")
    with pytest.raises(grpc.RpcError) as caught:
        next(raw.call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    raw.channel.close()
    other = Raw(server.port)
    other.send(1, 3.0)
    assert next(other.call)
    other.frames.put(None)
    other.channel.close()


MODEL = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=20))
def test_streamed_answers_are_the_models_own(shapes: list[tuple[int, int]]) -> None:
    """Seen to fail with answers that are given out in the order of asking, whatever their ids."""
    with (
        GRPCComputeServer(ModelComputeFunction(MODEL), port=0) as server,
        GRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S) as client,
    ):
        tensors = [torch.randn(*shape, 5) for shape in shapes]
        futures: list[Future[torch.Tensor]] = [client.compute_async(t) for t in tensors]
        for tensor, future in zip(tensors, futures, strict=True):
            with torch.inference_mode():
                torch.testing.assert_close(future.result(PATIENCE_S), MODEL(tensor))
