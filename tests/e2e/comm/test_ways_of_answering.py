"""Calls that are taken over without a thread, and calls that go gRPC's own way, are answered alike."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.core.packed import Output
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from splitlearn_comm.server import ComputeServicer, SystemMonitor, build_server
from splitlearn_comm.server.backend import Inference
from support.comm_backend import FakeNode
from support.comm_models import Doubler, Raising
from support.interceptors import interceptors
from support.waiting import eventually

COMPUTE = "/splitlearn.comm.ComputeService/Compute"
PATIENCE_S = 20.0


class Later:
    """Takes inferences over, and answers each twice its input once it is let."""

    def __init__(self) -> None:
        self.taken: list[Inference] = []
        self.entered = threading.Semaphore(0)
        self.takes = True

    def enter(self, model_id: str, inference: Inference) -> bool:
        if not self.takes:
            return False
        self.taken.append(inference)
        self.entered.release()
        return True

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE_S)

    def answer(self, number: int) -> None:
        inference = self.taken[number]
        inference.answer("m", Output(inference.unpack(TensorCodec()).tensor() * 2).whole(), 1.0)


class AsItComes(Later):
    """Answers what it has taken on the thread that polls; may be held up in it.

    Attributes:
        begun_by, run_by: the threads that requests came by, and those that answered them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begun_by: list[int] = []
        self.run_by: list[int] = []
        self.held = threading.Event()
        self.holds = False
        self.go_on = threading.Event()
        self.polls_now = 0

    def enter(self, model_id: str, inference: Inference) -> bool:
        self.begun_by.append(threading.get_ident())
        return super().enter(model_id, inference)

    def fileno(self) -> int | None:
        return None

    def arrived(self) -> None:
        raise AssertionError("nothing is run elsewhere")

    def polled_here(self) -> None:
        self.polls_now = threading.get_ident()

    def has_work(self) -> bool:
        return self.waits_here()

    def waits_here(self) -> bool:
        return len(self.run_by) < len(self.taken)

    def run_here(self) -> None:
        number = len(self.run_by)
        self.run_by.append(threading.get_ident())
        if self.holds:
            self.holds = False
            self.held.set()
            assert self.go_on.wait(PATIENCE_S), "nobody let it go on"
        self.answer(number)


class Elsewhere(AsItComes):
    """Has others run what it has taken, and answers it on the thread that polls when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told, self.tell = socket.socketpair()
        self.answered_by: list[int] = []

    def close(self) -> None:
        self.told.close()
        self.tell.close()

    def fileno(self) -> int:
        return self.told.fileno()

    def run_here(self) -> None:
        number = len(self.run_by)
        self.run_by.append(threading.get_ident())
        threading.Thread(target=lambda: self.tell.send(bytes([number]))).start()

    def arrived(self) -> None:
        for number in self.told.recv(64):
            self.answered_by.append(threading.get_ident())
            self.answer(number)


class Lab:
    way = "taken over"

    def __init__(self, inferences: Later | None = None, **options: int) -> None:
        self.inferences = inferences or Later()
        self.node = FakeNode({"m": Doubler(), "bad": Raising(ValueError("no"))})
        servicer = ComputeServicer(self.node, SystemMonitor(), inferences=self.inferences)
        work = self.inferences if isinstance(self.inferences, AsItComes) else None
        if self.way == "own polling" and work is None:
            work = AsItComes()  # nothing ever waits in it
        through = interceptors(self.way)
        self.server = build_server(
            servicer, "127.0.0.1:0", work=work, interceptors=through, **options
        )
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.port}")
        self.stub = compute_pb2_grpc.ComputeServiceStub(self.channel)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.server.stop(0.1)


@pytest.fixture(params=["taken over", "own polling", "gRPC's own"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Lab, "way", request.param)
    return str(request.param)


def asking(value: float, **fields: object) -> compute_pb2.ComputeRequest:
    data, shape = TensorCodec().encode(torch.full((1, 2), value))
    return compute_pb2.ComputeRequest(data=data, shape=shape, model_id="m", **fields)


def value_of(response: compute_pb2.ComputeResponse) -> float:
    return float(TensorCodec().decode(response.data, response.shape).max())


def test_answers_come_in_any_order_and_to_whom_they_belong(way: str) -> None:
    with Lab() as lab:
        calls = [
            lab.stub.Compute.future(asking(v, request_id=v), timeout=PATIENCE_S) for v in range(5)
        ]
        lab.inferences.wait_for(5)
        for number in (3, 0, 4, 2, 1):
            lab.inferences.answer(number)
        for value, call in enumerate(calls):
            response = call.result()
            assert (value_of(response), response.request_id) == (2.0 * value, value)
            assert response.HasField("compute_time_ms")
            assert response.monitoring_data.timestamp > 0


def test_what_is_not_taken_over_is_answered_all_the_same(way: str) -> None:
    with Lab() as lab:
        lab.inferences.takes = False
        assert value_of(lab.stub.Compute(asking(4), timeout=PATIENCE_S)) == 8
        lab.inferences.takes = True
        response = lab.stub.Compute(asking(5, use_cache=True), timeout=PATIENCE_S)
        assert value_of(response) == 10
        assert not lab.inferences.taken


def test_bytes_that_are_no_request_are_refused_and_the_server_goes_on(way: str) -> None:
    with Lab() as lab:
        raw = lab.channel.unary_unary(COMPUTE)
        with pytest.raises(grpc.RpcError) as caught:
            raw(b"\x0a\xff\xff\xff\xff", timeout=PATIENCE_S)
        expected = {
            "taken over": grpc.StatusCode.INVALID_ARGUMENT,
            "own polling": grpc.StatusCode.INVALID_ARGUMENT,
            "gRPC's own": grpc.StatusCode.INTERNAL,
        }
        assert caught.value.code() is expected[way]
        lab.inferences.takes = False
        assert value_of(lab.stub.Compute(asking(1), timeout=PATIENCE_S)) == 2


def test_a_shape_that_does_not_fit_is_the_callers_mistake(way: str) -> None:
    with Lab() as lab:
        lab.inferences.takes = False
        wrong = compute_pb2.ComputeRequest(data=b"1234", shape=[-1], model_id="m")
        for takes in (True, False):
            lab.inferences.takes = takes
            with pytest.raises(grpc.RpcError) as caught:
                lab.stub.Compute(wrong, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_that_raises_is_internal(way: str) -> None:
    with Lab() as lab:
        lab.inferences.takes = False
        request = asking(1)
        request.model_id = "bad"
        with pytest.raises(grpc.RpcError) as caught:
            lab.stub.Compute(request, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "bad" in caught.value.details()


def test_more_than_may_wait_is_refused_at_once_and_room_comes_back(way: str) -> None:
    with Lab(max_workers=2, max_waiting=1) as lab:
        calls = [lab.stub.Compute.future(asking(v), timeout=PATIENCE_S) for v in range(3)]
        lab.inferences.wait_for(3 if way == "taken over" else 2)
        with pytest.raises(grpc.RpcError) as caught:
            lab.stub.Compute(asking(9), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 compute calls under way, its limit" in caught.value.details()
        for number in range(2):
            lab.inferences.answer(number)
        if way == "gRPC's own":
            lab.inferences.wait_for(1)
        lab.inferences.answer(2)
        assert [value_of(call.result()) for call in calls] == [0, 2, 4]
        lab.inferences.takes = False
        assert value_of(lab.stub.Compute(asking(7), timeout=PATIENCE_S)) == 14


def test_whoever_is_gone_is_known(way: str) -> None:
    with Lab() as lab:
        call = lab.stub.Compute.future(asking(1), timeout=PATIENCE_S)
        lab.inferences.wait_for(1)
        inference = lab.inferences.taken[0]
        inference.check_wanted()
        call.cancel()
        gone = threading.Event()
        for _ in range(2000):
            try:
                inference.check_wanted()
            except Exception:
                break
            gone.wait(0.01)
        else:
            raise AssertionError("nobody noticed")
        lab.inferences.answer(0)
        assert lab.server.stop(5.0)


def test_many_callers_at_once_are_all_answered(way: str) -> None:
    with Lab() as lab, ThreadPoolExecutor(16) as callers:
        lab.inferences.takes = False
        answers = callers.map(
            lambda v: value_of(lab.stub.Compute(asking(v), timeout=PATIENCE_S)), range(200)
        )
        assert list(answers) == [2.0 * v for v in range(200)]
        assert lab.server.stop(5.0)


def test_what_waits_runs_on_the_thread_that_its_request_came_by() -> None:
    work = AsItComes()
    with Lab(work) as lab:
        for value in range(5):
            assert value_of(lab.stub.Compute(asking(value), timeout=PATIENCE_S)) == 2 * value
        assert work.run_by == work.begun_by
        assert set(work.run_by) == {work.polls_now}


def test_what_ran_elsewhere_is_answered_by_the_thread_that_polls() -> None:
    """Fails if nobody looks at what tells of it: the callers wait for ever."""
    work = Elsewhere()
    with Lab(work) as lab:
        asked = [lab.stub.Compute.future(asking(v), timeout=PATIENCE_S) for v in range(5)]
        assert [value_of(each.result()) for each in asked] == [2 * v for v in range(5)]
        assert set(work.answered_by) == {work.polls_now}
    work.close()


def test_work_that_takes_long_holds_up_nobody_else() -> None:
    work = AsItComes()
    with Lab(work) as lab:
        assert value_of(lab.stub.Compute(asking(1), timeout=PATIENCE_S)) == 2
        for _ in range(3):
            work.holds = True
            work.held.clear()
            work.go_on.clear()
            slow = lab.stub.Compute.future(asking(2), timeout=PATIENCE_S)
            assert work.held.wait(PATIENCE_S)
            held_up = work.run_by[-1]
            assert value_of(lab.stub.Compute(asking(3), timeout=PATIENCE_S)) == 6
            assert work.run_by[-1] != held_up
            work.go_on.set()
            assert value_of(slow.result()) == 4

        def answered_by_the_one_that_polls() -> bool:
            assert value_of(lab.stub.Compute(asking(4), timeout=PATIENCE_S)) == 8
            return work.run_by[-1] == work.begun_by[-1] == work.polls_now

        # On a busy machine the polling may change hands once more.
        eventually(answered_by_the_one_that_polls, "no handing over is left")


def test_a_server_stops_while_work_holds_its_polling_thread() -> None:
    work = AsItComes()
    with Lab(work) as lab:
        work.holds = True
        slow = lab.stub.Compute.future(asking(2), timeout=PATIENCE_S)
        assert work.held.wait(PATIENCE_S)
        lab.server.stop(0.0)
        with pytest.raises(grpc.RpcError):
            slow.result()
        work.go_on.set()


def test_a_server_starts_once() -> None:
    with Lab(AsItComes()) as lab, pytest.raises(ValueError, match="started before"):
        lab.server.start()
