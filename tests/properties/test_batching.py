"""Whatever is joined with what, each request gets the answer that it would have got alone."""

from __future__ import annotations

import itertools
import queue
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.http2 import polling
from splitlearn_comm.http2.polling import Polling
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.threads import ThreadPlan
from support.inferences import PATIENCE_S, Asked, Gate, ask, instance_of, leased

torch.manual_seed(0)
MODULES = {
    "mlp": nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).eval(),
    "attention": nn.TransformerEncoderLayer(
        6, nhead=2, dim_feedforward=8, dropout=0.0, batch_first=True
    ).eval(),
    "normalized": nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()).eval(),
}

requests = st.tuples(st.integers(1, 4), st.sampled_from((1, 2, 3)))
"""Rows, and length of the second dimension."""


@given(
    kind=st.sampled_from(sorted(MODULES)),
    shapes=st.lists(requests, min_size=1, max_size=12),
    batch_size=st.integers(1, 8),
    joins=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_joined_requests_are_answered_as_alone(
    kind: str, shapes: list[tuple[int, int]], batch_size: int, joins: bool, seed: int
) -> None:
    """Seen to fail with the parts of an output given out in reverse order, and with `batch_size` compared
    with the number of requests instead of their rows."""
    torch.manual_seed(seed)
    module = MODULES[kind]
    gate = Gate(module)
    batcher = Batcher(ThreadPlan(2, lambda: 1, {"OMP_NUM_THREADS": "1"}))
    instance = instance_of(gate, joins=joins, batch_size=batch_size)
    (first,) = ask(batcher, instance, torch.randn(1, 1, 6))
    gate.wait_entered()
    tensors = [torch.randn(rows, length, 6) for rows, length in shapes]
    asked = ask(batcher, instance, *tensors)
    gate.open.set()
    first.result()
    for one, tensor in zip(asked, tensors, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(one.result(), module(tensor))
    assert sum(gate.rows) == 1 + sum(rows for rows, _ in shapes)
    assert all(rows <= max(batch_size, *(r for r, _ in shapes), 1) for rows in gate.rows)
    batcher.stop()


class Pausing(nn.Module):
    """Takes so many milliseconds for a forward, one after the other, again and again; says when it begins."""

    def __init__(self, pauses_ms: list[int], begins: Callable[[], None]) -> None:
        super().__init__()
        self.pauses_ms = pauses_ms
        self.begins = begins
        self.runs = 0
        self.never = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begins()
        self.never.wait(self.pauses_ms[self.runs % len(self.pauses_ms)] / 1000)
        self.runs += 1
        return x + 1


@given(
    pauses=st.lists(
        st.lists(st.sampled_from((0, 1, 5, 9)), min_size=1, max_size=5), min_size=1, max_size=2
    ),
    joins=st.booleans(),
    overlaps=st.booleans(),
    apart=st.booleans(),
    at_a_time=st.integers(1, 3),
    threads=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_requests_that_come_while_others_run_need_no_later_ones_to_be_answered(
    pauses: list[list[int]],
    joins: bool,
    overlaps: bool,
    apart: bool,
    at_a_time: int,
    threads: int,
) -> None:
    """Whoever runs a batch, and whoever polls by then: no request waits until something else arrives.

    Seen to fail, with the last requests left for ever, where a thread that loses the polling while it runs a
    batch does not look for the next one; and `apart`, where what has been answered still counts as running.
    """
    total = 30
    batcher = Batcher(ThreadPlan(threads, lambda: 1, {"OMP_NUM_THREADS": "1"}), apart=1)
    arriving: queue.SimpleQueue[int] = queue.SimpleQueue()
    numbers = iter(range(total))
    over, left, all_answered = threading.Event(), threading.Event(), threading.Event()
    heard, bell = socket.socketpair()
    lock = threading.Lock()

    def send(count: int = at_a_time) -> None:
        with lock:
            for number in itertools.islice(numbers, count):
                arriving.put(number)
        bell.send(b"x")

    instances = [
        instance_of(Pausing(each, send), f"m{number}", joins=joins, apart=apart, batch_size=2)
        for number, each in enumerate(pauses)
    ]
    for instance in instances:
        instance.running.overlaps = overlaps  # type: ignore[union-attr, misc]
    ended_elsewhere = batcher.fileno()

    def look(wait: bool) -> bool | None:
        if over.is_set():
            left.set()
            return None
        readable, _, _ = select.select([heard, ended_elsewhere], [], [], None if wait else 0)
        if heard in readable:
            heard.recv(64)
        if ended_elsewhere in readable:
            batcher.arrived()
        found = False
        with suppress(queue.Empty):
            while True:
                arrived(arriving.get_nowait())
                found = True
        return found or bool(readable)

    def arrived(number: int) -> None:
        one = Asked(torch.full((1, 2), float(number)))
        one.when_ended = lambda ended: answered(number, ended)
        instance = instances[number % len(instances)]
        batcher.submit(leased(instance), one, one.unpack(TensorCodec()))

    def answered(number: int, ended: Asked) -> None:
        assert ended.output is not None
        assert torch.equal(ended.output, torch.full((1, 2), number + 1.0))
        with lock:
            done.append(number)
            if len(done) == total:
                all_answered.set()

    done: list[int] = []
    send(2)
    with mock.patch.object(polling, "TAKEOVER_S", 0.004):
        Polling(look, batcher).start()
        in_time = all_answered.wait(PATIENCE_S)
        over.set()
        bell.send(b"x")
        assert left.wait(PATIENCE_S)
    assert in_time, f"answered: {sorted(done)}"
    batcher.stop()
    for end in (heard, bell):
        end.close()
