"""Requests are joined, kept apart, dropped and refused as they should be."""

from __future__ import annotations

import itertools
import select
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from splitlearn_comm.core import (
    ComputeFailed,
    DeadlinePassed,
    NotReady,
    OutOfMemory,
    Overloaded,
    TensorCodec,
)
from splitlearn_comm.core.packed import Output, Packed, Rows
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.runtime.base import Begun
from splitlearn_manager.server import batching
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.elsewhere import LATE_S
from splitlearn_manager.server.queues import queue_of
from splitlearn_manager.server.threads import ThreadPlan
from support.inferences import PATIENCE_S, Apart, Asked, Gate, OfModule, ask, instance_of, leased
from support.waiting import eventually


def batcher(forwards: int = 2, **told: object) -> Batcher:
    plan = ThreadPlan(forwards, lambda: 1, {"OMP_NUM_THREADS": "1"})
    return Batcher(plan, **told)  # type: ignore[arg-type]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def behind(
    gate: Gate, joined: Batcher, instance: ManagedModel, *tensors: torch.Tensor
) -> list[Asked]:
    """Requests that wait while an earlier one runs; then all are let go."""
    (first,) = ask(joined, instance, torch.ones(1, 4))
    gate.wait_entered()
    asked = ask(joined, instance, *tensors)
    gate.open.set()
    first.result()
    return asked


def test_requests_that_wait_while_one_runs_are_one_batch_and_get_their_own_rows() -> None:
    module, gate = mlp(), Gate(mlp())
    tensors = [torch.randn(rows, 4) for rows in (1, 3, 2)]
    asked = behind(gate, batcher(), instance_of(gate), *tensors)
    for one, tensor in zip(asked, tensors, strict=True):
        torch.testing.assert_close(one.result(), module(tensor))
    assert gate.rows == [1, 6]


def test_only_equal_shapes_and_dtypes_are_joined_and_order_is_kept() -> None:
    gate = Gate(nn.Identity())
    order: list[int] = []
    instance, joined = instance_of(gate), batcher()
    (first,) = ask(joined, instance, torch.ones(1, 4))
    gate.wait_entered()
    tensors = [
        torch.ones(1, 4),
        torch.ones(2, 5),
        torch.ones(1, 4, 1),
        torch.ones(3, 5),
        torch.ones(1, 4),
    ]
    asked = [Asked(tensor) for tensor in tensors]
    for number, one in enumerate(asked):
        one.when_ended = lambda _, number=number: order.append(number)  # type: ignore[misc]
        joined.submit(leased(instance), one, one.unpack(TensorCodec()))
    gate.open.set()
    assert [tuple(one.result().shape) for one in asked] == [tuple(t.shape) for t in tensors]
    first.result()
    assert gate.rows == [1, 2, 5, 1]
    assert order == [0, 4, 1, 3, 2]


def test_a_batch_has_at_most_batch_size_rows_unless_one_request_has_more() -> None:
    gate = Gate(mlp())
    tensors = [torch.randn(rows, 4) for rows in (2, 3, 1, 7, 1)]
    for one in behind(gate, batcher(), instance_of(gate, batch_size=4), *tensors):
        one.result()
    assert gate.rows == [1, 2, 4, 7, 1]


class RefusesNan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("NaN")
        return x * 2


def test_one_bad_request_fails_alone() -> None:
    gate = Gate(RefusesNan())
    bad = torch.full((1, 4), float("nan"))
    asked = behind(gate, batcher(), instance_of(gate), torch.ones(1, 4), bad, torch.ones(2, 4))
    assert torch.equal(asked[0].result(), torch.full((1, 4), 2.0))
    assert torch.equal(asked[2].result(), torch.full((2, 4), 2.0))
    with pytest.raises(ComputeFailed, match="model 'm' raised ValueError: NaN"):
        asked[1].result()


class Doubles(nn.Module):
    """Takes sequences, and refuses a sum of seven; `open` holds it up, as `Gate` does."""

    answers_tokens, longest, input_dtype = True, None, torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(nn.Identity())
        self.lengths: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate(x)
        self.lengths.append([x.shape[1]] * x.shape[0])
        if x.sum() == 7:
            raise ValueError("seven")
        return x * 2

    def forward_sequences(self, ids: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        parts = ids.split([rows * length for rows, length in shapes])
        self.lengths.append([length for rows, length in shapes for _ in range(rows)])
        if any(part.sum() == 7 for part in parts):
            raise ValueError("seven")
        return ids * 2


def test_sequences_of_different_lengths_are_one_batch_and_get_their_own_answers() -> None:
    module = Doubles()
    tensors = [torch.randn(rows, length) for rows, length in ((1, 3), (2, 5), (1, 3), (3, 1))]
    asked = behind(module.gate, batcher(), instance_of(module), *tensors)
    for one, tensor in zip(asked, tensors, strict=True):
        assert torch.equal(one.result(), tensor * 2)
    assert module.lengths == [[4], [3, 3, 5, 5, 1, 1, 1]]


def test_one_bad_sequence_among_others_fails_alone() -> None:
    module = Doubles()
    bad = torch.full((1, 7), 1.0)
    asked = behind(module.gate, batcher(), instance_of(module), torch.ones(1, 3), bad)
    assert torch.equal(asked[0].result(), torch.full((1, 3), 2.0))
    with pytest.raises(ComputeFailed, match="model 'm' raised ValueError: seven"):
        asked[1].result()
    assert module.lengths == [[4], [3, 7], [3], [7]]


def test_whoever_is_gone_costs_no_forward() -> None:
    gate = Gate(mlp())
    instance, joined = instance_of(gate), batcher()
    (first,) = ask(joined, instance, torch.ones(1, 4))
    gate.wait_entered()
    gone, there = ask(joined, instance, torch.ones(1, 4), torch.ones(1, 4))
    gone.wanted = False
    gate.open.set()
    there.result()
    first.result()
    with pytest.raises(Exception, match="the caller is gone"):
        gone.result()
    assert gate.rows == [1, 1]
    assert instance.in_flight == 0


def test_a_full_queue_refuses_at_once_and_leaves_the_lease_to_the_caller() -> None:
    gate = Gate(mlp())
    instance, joined = instance_of(gate, max_queue=2), batcher()
    (first,) = ask(joined, instance, torch.ones(1, 4))
    gate.wait_entered()
    waiting = ask(joined, instance, torch.ones(1, 4), torch.ones(1, 4))
    lease = leased(instance)
    with pytest.raises(Overloaded, match="model 'm' has 2 requests waiting, its max_queue"):
        joined.submit(lease, Asked(torch.ones(1, 4)), torch.ones(1, 4))
    assert instance.in_flight == 4
    lease.release()
    gate.open.set()
    for one in (first, *waiting):
        one.result()


def test_requests_of_a_model_that_does_not_join_run_apart_and_side_by_side() -> None:
    gate = Gate(mlp())
    instance, apart = instance_of(gate, joins=False), batcher(forwards=2)
    asked = ask(apart, instance, *(torch.ones(1, 4) for _ in range(4)))
    gate.wait_entered()
    gate.wait_entered()
    gate.open.set()
    for one in asked:
        one.result()
    assert gate.rows == [1, 1, 1, 1]


def test_a_forward_that_hangs_holds_up_no_other_model() -> None:
    hanging, quick = Gate(mlp()), instance_of(mlp(), "quick")
    one_place = batcher(forwards=1)
    (stuck,) = ask(one_place, instance_of(hanging, "hanging"), torch.ones(1, 4))
    hanging.wait_entered()
    for _ in range(3):
        (other,) = ask(one_place, quick, torch.ones(1, 4))
        other.result()
    assert not stuck.ended.is_set()
    hanging.open.set()
    stuck.result()


def test_where_copies_run_beside_computing_two_batches_are_under_way_and_no_more() -> None:
    gate, joined = Gate(mlp()), batcher(forwards=1)
    instance = instance_of(gate, device="cuda:0")
    queue = queue_of(instance)

    def beside_one_that_runs(overlaps: bool) -> tuple[int, int]:
        gate.open.clear()
        assert isinstance(instance.running, OfModule)
        instance.running.overlaps = overlaps
        asked = ask(joined, instance, torch.ones(1, 4))
        gate.wait_entered()
        asked += ask(joined, instance, torch.ones(2, 4))
        if overlaps:
            gate.wait_entered()
        asked += ask(joined, instance, torch.ones(3, 4))
        found = queue.running, len(queue.waiting)
        gate.open.set()
        for one in asked:
            one.result()
        return found

    assert beside_one_that_runs(True) == (2, 1)
    assert gate.rows == [1, 2, 3]
    gate.entered = threading.Semaphore(0)
    eventually(lambda: not queue.running, "all is over")
    assert beside_one_that_runs(False) == (1, 2)
    assert gate.rows == [1, 2, 3, 1, 5]


def test_forwards_on_a_gpu_take_no_place_from_those_on_the_processor() -> None:
    standing_still = 100.0
    shared = batcher(forwards=1, clock=lambda: standing_still)
    gates = [Gate(mlp()) for _ in range(2)]
    asked = []
    for number, gate in enumerate(gates):
        asked += ask(
            shared, instance_of(gate, f"on-gpu-{number}", device="cuda:0"), torch.ones(1, 4)
        )
        gate.wait_entered()
    (quick,) = ask(shared, instance_of(mlp(), "on-cpu"), torch.ones(1, 4))
    quick.result()
    for gate in gates:
        gate.open.set()
    for one in asked:
        one.result()


class TooLittleMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("no more")
        return x


def test_a_batch_without_memory_is_halved_until_it_fits() -> None:
    module = TooLittleMemory()
    gate = Gate(module)
    told: list[tuple[str, int]] = []

    def out_of_memory(instance: ManagedModel, rows: int) -> None:
        told.append((instance.model_id, rows))
        instance.shrink_batches(rows)

    instance = instance_of(gate)
    joined = batcher(out_of_memory=out_of_memory)
    for one in behind(gate, joined, instance, *(torch.ones(1, 4) for _ in range(4))):
        one.result()
    assert module.rows == [1, 4, 2, 2]
    assert told == [("m", 4)]
    (alone,) = ask(joined, instance, torch.ones(3, 4))
    with pytest.raises(OutOfMemory):
        alone.result()


class Summed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=0, keepdim=True)


def test_an_output_without_the_rows_of_its_input_is_never_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate(Summed())
    asked = behind(gate, batcher(), instance_of(gate), torch.ones(2, 4), torch.ones(3, 4))
    assert [one.result().max().item() for one in asked] == [2.0, 3.0]
    assert gate.rows == [1, 5, 2, 3]
    assert "joins=no" in caplog.text


def test_with_a_queue_delay_a_batch_waits_to_fill_and_a_full_one_does_not() -> None:
    gate = Gate(mlp())
    gate.open.set()
    instance = instance_of(gate, batch_size=3, max_queue_delay_ms=60_000.0)
    for one in ask(batcher(), instance, *(torch.ones(1, 4) for _ in range(3))):
        one.result()
    assert gate.rows == [3]
    soon = instance_of(gate, batch_size=3, max_queue_delay_ms=20.0)
    for one in ask(batcher(), soon, torch.ones(1, 4), torch.ones(1, 4)):
        one.result()
    assert gate.rows == [3, 2]


def test_what_waits_can_be_cut_and_a_stopped_batcher_takes_nothing() -> None:
    gate = Gate(mlp())
    instance, joined = instance_of(gate), batcher()
    (first,) = ask(joined, instance, torch.ones(1, 4))
    gate.wait_entered()
    waiting = ask(joined, instance, torch.ones(1, 4), torch.ones(1, 4))
    assert joined.cut(instance.key, NotReady("cut")) == 2
    for one in waiting:
        with pytest.raises(NotReady, match="cut"):
            one.result()
    (late,) = ask(joined, instance, torch.ones(1, 4))
    joined.stop()
    with pytest.raises(NotReady, match="shutting down"):
        late.result()
    lease = leased(instance)
    with pytest.raises(NotReady):
        joined.submit(lease, Asked(torch.ones(1, 4)), torch.ones(1, 4))
    lease.release()
    gate.open.set()
    first.result()
    assert instance.in_flight == 0


def test_models_share_the_time_by_the_weight_of_their_priority() -> None:
    """On one place, each forward 10 ms of a clock that only forwards move."""
    seconds = itertools.count()
    now = [0.0]
    ran: list[str] = []

    class Works(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] = next(seconds) * 0.01
            return x

    gate = Gate(nn.Identity())
    shared = Batcher(
        ThreadPlan(1, lambda: 1, {"OMP_NUM_THREADS": "1"}),
        ran=lambda model_id, rows, waited_s: ran.append(model_id),
        clock=lambda: now[0],
    )
    (first,) = ask(shared, instance_of(gate, "gate"), torch.ones(1, 4))
    gate.wait_entered()
    asked = []
    for model_id, priority in (("low", 0), ("high", 2)):
        instance = instance_of(Works(), model_id, joins=False, priority=priority)
        asked += ask(shared, instance, *(torch.ones(1, 4) for _ in range(100)))
    gate.open.set()
    first.result()
    for one in asked:
        one.result()
    assert ran[0] == "gate"
    for end in range(10, 125):
        low, high = ran[1 : end + 1].count("low"), ran[1 : end + 1].count("high")
        assert abs(high - 4 * low) <= 8, f"after {end} forwards: {low} of low, {high} of high"


def test_what_goes_wrong_beside_the_model_leaves_nobody_waiting_and_no_thread_is_lost() -> None:
    """Seen to fail with a thread that ends by what is raised."""
    failing = [True, True]

    def ran(model_id: str, rows: int, waited_s: float) -> None:
        if failing and failing.pop():
            raise LookupError("no such series")

    instance, joined = instance_of(mlp()), batcher(ran=ran)
    for _ in range(2):
        (lost,) = ask(joined, instance, torch.ones(1, 4))
        with pytest.raises(ComputeFailed, match="no such series"):
            lost.result()
    (good,) = ask(joined, instance, torch.ones(1, 4))
    good.result()
    broken = Asked(torch.ones(1, 4))
    broken.when_ended = lambda asked: (_ for _ in ()).throw(OSError("the call is gone"))
    joined.submit(leased(instance), broken, broken.unpack(TensorCodec()))
    (after,) = ask(joined, instance, torch.ones(1, 4))
    after.result()
    eventually(lambda: instance.in_flight == 0, "leases are given back")


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted as one that there is, and no thread was ever started for what waits."""
    instance, joined = instance_of(mlp()), batcher()

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    (waits,) = ask(joined, instance, torch.ones(1, 4))
    monkeypatch.undo()
    (later,) = ask(joined, instance, torch.ones(1, 4))
    later.result()
    waits.result()


def test_leases_are_given_back_and_errors_counted() -> None:
    instance, joined = instance_of(RefusesNan()), batcher()
    good, bad = ask(joined, instance, torch.ones(1, 4), torch.full((1, 4), float("nan")))
    good.result()
    assert bad.ended.wait(PATIENCE_S)
    eventually(lambda: instance.in_flight == 0, "leases are given back")
    assert (instance.in_flight, instance.requests, instance.errors) == (0, 2, 1)


def test_short_batches_run_on_the_thread_that_polls_and_others_do_not() -> None:
    threads: list[int] = []

    class Where(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            threads.append(threading.get_ident())
            return x

    me = threading.get_ident()
    now = [0.0]
    joined, instance = batcher(clock=lambda: now[0]), instance_of(Where())
    joined.polled_here()
    (unknown,) = ask(joined, instance, torch.ones(1, 4))
    unknown.result()
    assert threads[-1] != me
    eventually(lambda: not joined._active, "the first batch is over")
    now[0] += 10.0
    short = ask(joined, instance, torch.ones(1, 4), torch.ones(2, 4))
    assert joined.waits_here()
    joined.run_here()
    assert [tuple(one.result().shape) for one in short] == [(1, 4), (2, 4)]
    assert threads[-1] == me
    assert not joined.waits_here()
    instance.queue.request_s = 1.0  # type: ignore[union-attr]
    (long,) = ask(joined, instance, torch.ones(1, 4))
    long.result()
    assert threads[-1] != me


def test_what_the_polling_thread_does_not_come_to_is_run_by_another() -> None:
    joined, instance = batcher(), instance_of(mlp())
    ask(joined, instance, torch.ones(1, 4))[0].result()
    eventually(lambda: not joined._active, "the first batch is over")
    joined.polled_here()
    (waiting,) = ask(joined, instance, torch.ones(1, 4))
    # It is left to this thread, which never comes back; other requests come by others.
    other = threading.Thread(target=lambda: ask(joined, instance, torch.ones(1, 4))[0].result())
    other.start()
    waiting.result()
    other.join(PATIENCE_S)
    assert not other.is_alive()


def test_who_has_lost_the_polling_leaves_nothing_behind() -> None:
    """Fails if who ends a batch and polls no more looks for nobody to run the next one."""
    gate = Gate(mlp())
    joined, instance = batcher(), instance_of(gate)
    gate.open.set()
    ask(joined, instance, torch.ones(1, 4))[0].result()
    eventually(lambda: not joined._active, "the first batch is over")
    gate.open.clear()
    gate.wait_entered()
    begun = threading.Event()

    def first_poller() -> None:
        joined.polled_here()
        ask(joined, instance, torch.ones(1, 4))
        assert joined.waits_here()
        begun.set()
        joined.run_here()

    losing = threading.Thread(target=first_poller)
    losing.start()
    assert begun.wait(PATIENCE_S)
    gate.wait_entered()
    joined.polled_here()
    (waiting,) = ask(joined, instance, torch.ones(1, 4))
    # This thread waits for calls now, and none comes.
    assert not joined.waits_here()
    gate.open.set()
    waiting.result()
    losing.join(PATIENCE_S)
    assert not losing.is_alive()


def test_what_is_no_longer_short_is_left_to_others_before_the_polling_thread_waits() -> None:
    """Fails if a request that was left to the polling thread is nobody's when others have come."""
    now = [0.0]
    joined, instance = batcher(clock=lambda: now[0]), instance_of(mlp(), "first")
    beside = instance_of(mlp(), "second", max_queue=1)
    ask(joined, instance, torch.ones(1, 4))[0].result()
    eventually(lambda: not joined._active, "the first batch is over")
    joined.polled_here()
    instance.queue.request_s = 2 * batching.SHORT_IN_COMPANY_S  # type: ignore[union-attr]
    now[0] += 2 * batching.COMPANY_S
    (waiting,) = ask(joined, instance, torch.ones(1, 4))
    # Others come, and go before they are run.
    queue_of(beside).request_s = batching.SHORT_IN_COMPANY_S / 2
    ask(joined, beside, torch.ones(1, 4))
    assert joined.cut(beside.key, NotReady("it goes")) == 1
    assert not joined.waits_here()
    waiting.result()


def test_a_batch_behind_one_that_took_long_is_run_by_others() -> None:
    """Fails if the thread that polls finds it too long for itself, and waits for calls."""
    now, on_poller = [0.0], threading.Event()

    class Looked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if on_poller.is_set():
                now[0] += 0.03
                eventually(
                    lambda: all(each.until_s == float("inf") for each in joined._idle),
                    "the others have seen that it runs",
                )
            return x

    gate = Gate(Looked())
    joined, instance = batcher(clock=lambda: now[0], apart=1), instance_of(gate, joins=False)
    joined.polled_here()
    first, second, third = ask(joined, instance, *[torch.ones(1, 4)] * 3)
    gate.wait_entered()
    gate.open.set()
    first.result()
    eventually(lambda: bool(joined._idle), "the second is left to this thread")
    on_poller.set()
    assert joined.waits_here()
    joined.run_here()
    on_poller.clear()
    second.result()
    instance.queue.request_s = 1.0  # type: ignore[union-attr]
    assert not joined.waits_here()
    third.result()


def come(joined: Batcher) -> None:
    """Wait as the thread that polls does, and take what was run elsewhere."""
    readable, _, _ = select.select([joined.fileno()], [], [], PATIENCE_S)
    assert readable, "nothing has come"
    joined.arrived()


def polls_for(joined: Batcher, instance: ManagedModel) -> None:
    """This thread polls, and knows the model's forwards to be short."""
    queue_of(instance).request_s = 0.001
    joined.polled_here()


def test_what_runs_elsewhere_keeps_no_thread_of_ours() -> None:
    """The thread that polls sends a batch, sends the next one as that ends, and answers both."""
    module, gate = mlp(), Gate(mlp())
    joined, instance = batcher(), instance_of(gate, apart=True, batch_size=2)
    polls_for(joined, instance)
    tensors = [torch.randn(1, 4) for _ in range(3)]
    asked = ask(joined, instance, *tensors)
    assert joined.waits_here()
    joined.run_here()
    gate.wait_entered()
    assert not joined.waits_here(), "a small one would run as long as the first one takes"
    gate.open.set()
    come(joined)
    assert not joined.waits_here()
    come(joined)
    for one, tensor in zip(asked, tensors, strict=True):
        torch.testing.assert_close(one.result(), module(tensor))
    assert gate.rows == [2, 1]
    assert not joined.has_work()
    assert instance.in_flight == 0


def test_one_bad_request_fails_alone_where_it_is_run_elsewhere() -> None:
    joined, instance = batcher(), instance_of(RefusesNan(), apart=True)
    polls_for(joined, instance)
    bad = torch.full((1, 4), float("nan"))
    good, refused = ask(joined, instance, torch.ones(1, 4), bad)
    joined.run_here()
    come(joined)
    assert torch.equal(good.result(), torch.full((1, 4), 2.0))
    with pytest.raises(ComputeFailed, match="model 'm' raised ValueError: NaN"):
        refused.result()
    eventually(lambda: not joined.has_work() and not instance.in_flight, "it is over")


class FirstRow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] * 2


def test_rows_that_are_missing_are_asked_for_one_by_one() -> None:
    joined, instance = batcher(), instance_of(FirstRow(), apart=True)
    polls_for(joined, instance)
    asked = ask(joined, instance, torch.full((1, 4), 1.0), torch.full((1, 4), 2.0))
    joined.run_here()
    come(joined)
    answers = [one.result() for one in asked]
    assert [answer[0, 0].item() for answer in answers] == [2.0, 4.0]
    assert not instance.queue.joins  # type: ignore[union-attr]


def test_what_takes_long_elsewhere_is_waited_for_by_a_thread_that_may() -> None:
    """Fails if nobody waits for it: its worker could never be ended for its callers' deadlines."""
    now, gate = [0.0], Gate(mlp())
    joined, instance = batcher(clock=lambda: now[0]), instance_of(gate, apart=True, batch_size=1)
    polls_for(joined, instance)
    (first,) = ask(joined, instance, torch.ones(1, 4))
    joined.run_here()
    gate.wait_entered()
    eventually(lambda: bool(joined._idle), "somebody will look at it")
    now[0] += LATE_S
    eventually(lambda: not joined._elsewhere._sent, "it is waited for")
    gate.open.set()
    first.result()
    eventually(lambda: not joined.has_work() and not instance.in_flight, "it is over")
    joined.arrived()


def test_nobody_waits_for_what_nobody_wants_any_more() -> None:
    joined, instance = batcher(), instance_of(mlp(), apart=True)
    polls_for(joined, instance)
    (gone,) = ask(joined, instance, torch.ones(1, 4))
    gone.wanted = False
    joined.run_here()
    with pytest.raises(DeadlinePassed):
        gone.result()
    assert not joined.has_work()
    assert not joined._began


def test_a_model_that_is_unloaded_as_its_batch_is_sent_refuses_it() -> None:
    joined, instance = batcher(), instance_of(mlp(), apart=True)
    polls_for(joined, instance)
    (late,) = ask(joined, instance, torch.ones(1, 4))
    instance.running = None
    joined.run_here()
    with pytest.raises(NotReady, match="is being unloaded"):
        late.result()
    eventually(lambda: not joined.has_work() and not instance.in_flight, "it is over")


def test_what_runs_elsewhere_is_waited_for_when_nobody_polls_any_more() -> None:
    """Fails if the threads go first: its lease would never be given back."""
    gate = Gate(mlp())
    joined, instance = batcher(), instance_of(gate, apart=True, joins=False)
    polls_for(joined, instance)
    both = ask(joined, instance, torch.ones(1, 4), torch.ones(1, 4))
    for _ in both:
        joined.run_here()
    gate.wait_entered()
    joined.stop()
    gate.open.set()
    for one in both:
        one.result()
    eventually(lambda: not instance.in_flight, "the leases are given back")


class Garbles(Apart):
    """Answers several requests with the rows of one, each by itself; a single one as it should."""

    def begin(self, parts: Sequence[Packed]) -> Begun:
        begun = super().begin(parts)
        if len(parts) > 1:
            finish = begun.finish

            def take() -> list[Rows]:
                finish()
                return [Output(torch.ones(1)).whole()]

            begun.take = take  # type: ignore[method-assign]
        return begun


def test_an_answer_that_is_none_leaves_nobody_waiting() -> None:
    """Fails if the thread that polls goes on without it: nobody would look at it again."""
    joined, instance = batcher(), instance_of(mlp(), apart=True)
    instance.running.function = Garbles(mlp())  # type: ignore[union-attr]
    polls_for(joined, instance)
    asked = ask(joined, instance, torch.ones(1, 4), torch.ones(1, 4))
    joined.run_here()
    come(joined)
    for one in asked:
        torch.testing.assert_close(one.result(), mlp()(torch.ones(1, 4)))
    eventually(lambda: not joined.has_work() and not instance.in_flight, "it is over")
