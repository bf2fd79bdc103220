"""Forwards that take turns are run by one thread, and hold up nothing else of their worker."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from splitlearn_comm.core.packed import Packed
from splitlearn_manager.runtime.channel import Closed, Message, pair
from splitlearn_manager.runtime.worker_connection import Connection
from splitlearn_manager.worker import connections
from splitlearn_manager.worker.connections import Answer, Connections

PATIENCE_S = 20.0


class Model:
    """Answers what it is asked, and on which thread; `hang` until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.hangs = threading.Event()
        self.inside = 0
        self.most = 0

    def answer(
        self, message: Message, tensors: Sequence[torch.Tensor], descriptors: list[int]
    ) -> Answer:
        if message.get("turn"):
            self.inside += 1
            self.most = max(self.most, self.inside)
        if message["op"] == "hang":
            self.hangs.set()
            assert self.go.wait(PATIENCE_S)
        if message.get("turn"):
            self.inside -= 1
        return {"thread": threading.get_ident()}, [tensor + 1 for tensor in tensors], ()


class Node:
    """The other side: connections to a worker's threads."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or Model()
        self.served = Connections(self.model.answer)
        self.made: list[Connection] = []

    def connect(self) -> Connection:
        ours, theirs = pair()
        self.served.serve(connections.Channel(theirs))
        self.made.append(Connection(ours))
        return self.made[-1]


@pytest.fixture
def node() -> Iterator[Node]:
    found = Node()
    yield found
    found.model.go.set()
    for connection in found.made:
        connection.close()


def answered(connection: Connection) -> tuple[int, list[float]]:
    message, tensors, _ = connection.answer(PATIENCE_S)
    return message["thread"], [tensor.item() for tensor in tensors]


def ask(connection: Connection, op: str = "compute", *, turn: bool, value: float = 0.0) -> None:
    connection.call({"op": op, "turn": turn}, [torch.tensor(value)])


def test_turns_are_one_threads_whatever_connection_they_come_from(node: Node) -> None:
    both = [node.connect(), node.connect()]
    threads = set()
    for number in range(10):
        for connection in both:
            ask(connection, turn=True, value=float(number))
        for connection in both:
            thread, values = answered(connection)
            threads.add(thread)
            assert values == [number + 1.0]
    assert len(threads) == 1
    assert node.model.most == 1


def test_one_in_its_turn_that_hangs_holds_up_those_in_turn_only(node: Node) -> None:
    first, second, beside = node.connect(), node.connect(), node.connect()
    ask(first, turn=True)
    mine, _ = answered(first)
    ask(first, "hang", turn=True)
    assert node.model.hangs.wait(PATIENCE_S)
    ask(second, turn=True)
    ask(beside, turn=False)
    other, _ = answered(beside)
    assert other != mine
    with pytest.raises(TimeoutError):
        second.answer(0.0)
    node.model.go.set()
    assert answered(first)[0] == mine
    assert answered(second)[0] == mine
    assert node.model.most == 1


def test_a_connection_goes_from_its_own_thread_to_that_of_the_turns_and_back(node: Node) -> None:
    """Fails if a call that takes no turn is answered by the thread of the turns: it could hold them up."""
    first, second = node.connect(), node.connect()
    ask(first, turn=True)
    of_turns, _ = answered(first)
    for turn in (False, True, True, False, False, True):
        ask(second, turn=turn, value=3.0)
        thread, values = answered(second)
        assert (thread == of_turns) is turn
        assert values == [4.0]


class Keeps(Model):
    """Keeps each of its inputs, as a module may that remembers the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def answer(
        self, message: Message, tensors: Sequence[torch.Tensor], descriptors: list[int]
    ) -> Answer:
        self.kept += tensors
        return {}, [tensor * 2 for tensor in tensors], ()


@pytest.mark.parametrize("keeps", [True, False])
def test_the_next_forward_is_not_taken_for_the_one_that_was_expected(keeps: bool) -> None:
    """Forwards alike come to a tensor that was made ready; others, and what the model has kept, do not."""
    model = Keeps() if keeps else Model()
    node = Node(model)
    connection = node.connect()
    sent = []
    for number, size in enumerate((4, 4, 4, 8, 8, 2**17, 2**17, 4, 4)):
        tensor = torch.full((size,), float(number))
        sent.append(tensor)
        data = tensor.numpy().tobytes()
        connection.forward([data], torch.float32, (size,), turn=number % 2 == 0)
        _, (answer,) = connection.forward_answer(PATIENCE_S)
        assert isinstance(answer, Packed)
        assert torch.equal(answer.tensor(), tensor * 2 if keeps else tensor + 1)
    if isinstance(model, Keeps):
        assert all(torch.equal(kept, tensor) for kept, tensor in zip(model.kept, sent, strict=True))
    connection.close()


def test_connections_that_are_closed_leave_the_others(node: Node) -> None:
    first, second = node.connect(), node.connect()
    for connection in (first, second):
        ask(connection, turn=True)
        answered(connection)
    first.close()
    ask(second, turn=True)
    answered(second)
    third = node.connect()
    ask(third, turn=True, value=1.0)
    assert answered(third)[1] == [2.0]


@pytest.mark.parametrize("turn", [True, False])
def test_who_sends_what_is_no_call_is_left_and_nobody_else(node: Node, turn: bool) -> None:
    bad, good = node.connect(), node.connect()
    for connection in (bad, good):
        ask(connection, turn=turn)
        answered(connection)
    bad.call({"op": "compute", "turn": turn, "no": "tensors"})
    bad._channel.send({"turn": turn})  # neither tensors nor an area
    with pytest.raises(Closed):
        while True:
            bad.answer(PATIENCE_S)
    ask(good, turn=turn)
    answered(good)


def test_it_looks_only_where_the_last_call_came_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of sleeping, for less than a millisecond."""
    now, comes_s = [0.0], [0.0]
    looks: list[float] = []

    class Poll:
        def register(self, file: object, events: int) -> None:
            pass

        def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
            if timeout is None:
                now[0] = max(now[0], comes_s[0])
            else:
                looks.append(now[0])
                now[0] += 0.00005
            return [(7, select.POLLIN)] if now[0] >= comes_s[0] else []

    monkeypatch.setattr(connections.select, "poll", Poll)
    monkeypatch.setattr(connections, "perf_counter", lambda: now[0])
    watch = connections.Watch()
    looked = []
    for after_s in (5.0, 0.0002, 0.0003, 0.5, 0.0001, 0.0001):
        began_s, comes_s[0] = now[0], now[0] + after_s
        looks.clear()
        assert watch.wait() == [7]
        assert now[0] >= comes_s[0]
        looked.append(bool(looks))
        assert all(at - began_s < 0.001 for at in looks), (
            "it takes a processor for long, for nothing"
        )
    assert looked == [False, False, True, True, False, True]
