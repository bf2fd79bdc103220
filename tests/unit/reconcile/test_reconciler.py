"""The loop, turned by hand over a manager whose time and work the test controls, and run for real."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.clock import SystemClock, ThreadExecutor
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.desired.state import DesiredState, Instructions
from splitlearn_manager.errors import ModelUnavailable
from splitlearn_manager.reconcile.actions import TURN_S, Verb
from splitlearn_manager.reconcile.observation import from_json, to_json
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.reconcile.turns import Turn
from support.fakes import Bench, FakeFiles, FakeRuntime, FakeSource, FixedBudgets, broken, model
from support.waiting import eventually

DEADLINE_S = 20.0


class Loop:
    """A loop that the test turns by hand."""

    def __init__(
        self, budget_mb: float = 100.0, max_models: int = 3, max_parallel_loads: int = 2
    ) -> None:
        self.bench = Bench(budgets_mb={"cpu": budget_mb}, max_models=max_models)
        self.source = FakeSource()
        self.loop = Reconciler(
            self.source,
            self.bench.manager,
            self.bench.clock,
            max_parallel_loads=max_parallel_loads,
            draw=lambda: 0.0,
        )

    def declare(self, model_id: str, *, weights: str | None = "w0", **keys: object) -> None:
        self.bench.clock.advance(1.0)
        if weights is not None:
            self.bench.files.fingerprints[model_id] = weights
        self.source.declare(model(model_id, **keys), at=self.bench.clock.now(), weights=weights)

    def settle(self) -> Turn:
        """Turns and lets work run until nothing is left to do."""
        for _ in range(50):
            turn = self.loop.turn()
            if turn.settled and not self.bench.executor.waiting:
                return turn
            self.bench.executor.run_all()
        raise AssertionError(f"did not settle: {turn.plan}")

    def settle_on_waiting(self) -> Turn:
        """The turn after which nothing is under way, though something waits."""
        self.settle()
        return self.loop.turn()

    def phases_but(self, *hanging: str) -> set[Phase]:
        """The phases of all others after a turn."""
        self.loop.turn()
        phases = self.loop.status.phases
        return {phase for model_id, phase in phases.items() if model_id not in hanging}

    def phase(self, model_id: str) -> Phase | None:
        return self.loop.status.phases.get(model_id)

    def sync(self, model_id: str) -> object:
        return self.loop.status.published[model_id]["sync"]

    def reason(self, model_id: str) -> object:
        return self.loop.status.published[model_id]["reason"]


def test_what_is_declared_is_served_and_what_no_longer_is_is_unloaded() -> None:
    loop = Loop()
    loop.declare("a")
    loop.settle()
    assert loop.phase("a") is Phase.READY
    assert loop.loop.converged
    loop.source.remove("a")
    loop.settle()
    assert loop.phase("a") is None
    assert not loop.bench.runtime.open_models


def test_no_more_than_max_parallel_loads_are_under_way_and_the_others_say_so() -> None:
    loop = Loop(max_parallel_loads=1)
    for model_id in ("a", "b"):
        loop.declare(model_id)
    loop.loop.turn()
    loop.loop.turn()
    assert len(loop.bench.executor.waiting) == 1
    assert (loop.phase("a"), loop.phase("b")) == (Phase.LOADING, Phase.PENDING)
    assert loop.reason("b") == "AwaitingTurn"
    loop.settle()
    assert (loop.phase("a"), loop.phase("b")) == (Phase.READY, Phase.READY)


def test_a_load_that_does_not_end_leaves_the_other_slot_to_the_others() -> None:
    loop = Loop(max_models=5)
    loop.declare("hangs", priority=1)
    for model_id in ("a", "b", "c"):
        loop.declare(model_id)
    for _ in range(10):
        loop.loop.turn()
        if len(loop.bench.executor.waiting) > 1:
            loop.bench.executor.run_one(1)
    assert loop.phase("hangs") is Phase.LOADING
    assert {loop.phase(m) for m in ("a", "b", "c")} == {Phase.READY}


def test_loads_that_take_long_lend_their_turns_so_that_no_other_waits_for_them() -> None:
    """With every turn taken by a load that hangs, the others wait for `TURN_S`, not for load_timeout_s."""
    loop = Loop(max_models=4)
    for model_id in ("hangs", "too"):
        loop.declare(model_id, priority=1)
    for model_id in ("a", "b"):
        loop.declare(model_id)
    loop.loop.turn()
    assert loop.reason("a") == loop.reason("b") == "AwaitingTurn"
    due_s = loop.loop.turn().next_s
    assert due_s == TURN_S
    loop.bench.clock.advance(due_s)
    assert len(loop.loop.turn().executed) == 2
    loop.loop.turn()
    assert {loop.phase(m) for m in ("a", "b")} == {Phase.LOADING}
    loop.bench.executor.run_one(2)
    loop.bench.executor.run_one(2)
    assert loop.phases_but("hangs", "too") == {Phase.READY}
    assert {loop.phase(m) for m in ("hangs", "too")} == {Phase.LOADING}


def test_turns_that_are_lent_make_no_more_room_than_there_is() -> None:
    loop = Loop(max_models=3)
    for model_id in ("hangs", "too"):
        loop.declare(model_id, priority=1)
    for model_id in ("a", "b"):
        loop.declare(model_id)
    loop.loop.turn()
    loop.bench.clock.advance(TURN_S)
    assert len(loop.loop.turn().executed) == 1
    loop.loop.turn()
    assert (loop.phase("b"), loop.reason("a")) == (Phase.LOADING, "MaxModels")


def test_failed_loads_are_retried_after_one_two_and_four_seconds() -> None:
    loop = Loop()
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a")
    for tries, wait_s in enumerate((1.0, 2.0, 4.0), start=1):
        turn = loop.settle()
        assert len(loop.bench.runtime.started) == tries
        assert (loop.phase("a"), loop.reason("a")) == (Phase.FAILED, "LoadFailed")
        assert turn.next_s == pytest.approx(wait_s)
        loop.bench.clock.advance(wait_s - 0.1)
        loop.settle()
        assert len(loop.bench.runtime.started) == tries
        loop.bench.clock.advance(0.2)
    loop.bench.runtime.failures.clear()
    loop.settle()
    assert loop.phase("a") is Phase.READY


def test_an_edit_ends_the_wait_for_a_retry() -> None:
    loop = Loop()
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a")
    loop.settle()
    loop.bench.runtime.failures.clear()
    loop.declare("a", weights="w1")
    loop.settle()
    assert loop.phase("a") is Phase.READY


def test_an_update_by_recreate_that_fails_goes_back_and_the_next_edit_is_tried() -> None:
    loop = Loop()
    loop.declare("a", update="recreate")
    loop.settle()
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a", update="recreate", trusted=True)
    loop.loop.turn()
    loop.bench.executor.run_all()  # The old one is gone, the new one has failed.
    assert not loop.bench.manager.table.all
    loop.bench.runtime.failures.clear()
    loop.settle()
    shown = loop.loop.status.published["a"]
    assert (shown["phase"], shown["health"]) == ("Ready", "Degraded")
    assert (shown["generation"], shown["observed_generation"]) == (2, 1)
    loop.bench.clock.advance(1e4)
    loads = len(loop.bench.runtime.started)
    loop.settle()
    assert len(loop.bench.runtime.started) == loads, "each further try would be an outage"
    loop.declare("a", update="recreate", batch_size=2, trusted=True)
    loop.settle()
    assert loop.loop.status.published["a"]["observed_generation"] == 3


def test_an_edit_that_is_taken_back_leaves_what_serves_as_the_generation_that_is_declared() -> None:
    """Seen to say for ever that generation 1 serves and generation 3 comes next."""
    loop = Loop()
    loop.declare("a")
    loop.settle()
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a", trusted=True)
    loop.settle()
    loop.declare("a")
    loop.settle()
    shown = loop.loop.status.published["a"]
    assert (shown["generation"], shown["observed_generation"]) == (3, 3)
    ready = next(c for c in shown["conditions"] if c["type"] == "Ready")  # type: ignore[attr-defined]
    assert ready["status"] == "True"
    assert loop.bench.runtime.started.count(("a", "cpu")) == 2, "it is loaded already"
    turn = loop.settle()
    assert not turn.plan.actions


def test_when_the_former_version_cannot_be_loaded_either_it_is_not_tried_for_ever() -> None:
    loop = Loop()
    loop.declare("a", update="recreate")
    loop.settle()
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a", update="recreate", trusted=True)
    loop.settle()
    assert (loop.phase("a"), loop.reason("a")) == (Phase.FAILED, "LoadFailed")
    loads = len(loop.bench.runtime.started)
    assert loads == 3, "the first version, the second, and the first again"
    assert loop.settle().plan.actions == ()
    loop.bench.runtime.failures.clear()
    loop.bench.clock.advance(1.0)
    loop.settle()
    assert loop.loop.status.published["a"]["observed_generation"] == 2


def wait_for(loop: Reconciler, model_id: str) -> None:
    """As a request does that waits for a model."""
    with loop.waiting_for(model_id, DEADLINE_S):
        pass


def wait_in_a_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[Exception]]:
    """Runs the call beside the test; the errors it raises are collected."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def test_a_version_is_accepted_before_what_follows_from_it_is_told() -> None:
    loop = Loop()
    loop.declare("a")
    loop.settle()
    loop.declare("a", priority=3)
    loop.settle()
    told, _ = loop.loop.status.events(model_id="a")
    assert [event["reason"] for event in told][-2:] == ["SpecAccepted", "Adjusted"]


def test_an_idle_model_is_parked_though_its_update_waits_for_room() -> None:
    loop = Loop(budget_mb=15.0)
    loop.declare("a", keep_alive_s=20.0, update="surge")
    loop.settle()
    loop.declare("a", keep_alive_s=20.0, update="surge", weights="w1")
    turn = loop.settle_on_waiting()
    assert loop.reason("a") == "InsufficientMemory"
    assert turn.next_s is not None
    loop.bench.clock.advance(turn.next_s)
    loop.settle()
    assert loop.phase("a") is Phase.EVICTED
    loop.bench.clock.advance(1.0)
    loop.loop.join("a", 30.0)
    loop.settle()
    assert loop.bench.manager.table.by_model["a"].spec.weights == "w1"


def test_a_demand_brings_an_evicted_model_back_and_evicts_the_least_recently_used() -> None:
    loop = Loop(max_models=1)
    loop.declare("a")
    loop.settle()
    loop.declare("b")
    loop.settle()
    assert (loop.phase("a"), loop.phase("b")) == (Phase.EVICTED, Phase.READY)
    loads = len(loop.bench.runtime.started)
    for _ in range(3):
        loop.bench.clock.advance(100.0)
        assert loop.settle().plan.actions == ()
    assert len(loop.bench.runtime.started) == loads, "nobody asked for it"

    thread, raised = wait_in_a_thread(lambda: wait_for(loop.loop, "a"))
    eventually(lambda: loop.loop._memory.waiters.at(0.0), "the wait is noted")
    loop.settle()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert not raised
    assert (loop.phase("a"), loop.phase("b")) == (Phase.READY, Phase.EVICTED)


def test_a_demand_for_a_model_that_fails_to_load_ends_with_that() -> None:
    loop = Loop()
    loop.declare("a", weights=None)
    loop.loop.turn()
    assert loop.phase("a") is Phase.PENDING
    thread, raised = wait_in_a_thread(lambda: wait_for(loop.loop, "a"))
    eventually(lambda: loop.loop._memory.waiters.at(0.0), "the wait is noted")
    loop.bench.runtime.failures["a"] = broken()
    loop.declare("a")
    loop.settle()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert [type(error) for error in raised] == [ModelUnavailable]
    assert "Failed" in str(raised[0])


def test_a_demand_ends_when_its_time_is_over_and_when_the_loop_stops() -> None:
    loop = Loop()
    loop.declare("a", weights=None)
    loop.loop.turn()
    with pytest.raises(ModelUnavailable, match="Pending"), loop.loop.waiting_for("a", 0.0):
        pytest.fail("it serves")
    thread, raised = wait_in_a_thread(lambda: wait_for(loop.loop, "a"))
    loop.loop.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_names_are_endpoints_first_and_ids_where_no_endpoint_has_that_name() -> None:
    loop = Loop()
    loop.declare("a", endpoint="shared")
    loop.declare("b", endpoint="shared")
    loop.declare("c")
    loop.declare("d", endpoint="c")
    loop.loop.turn()
    assert loop.loop.names == {
        "shared": ("a", "b"),
        "c": ("c", "d"),
        "a": ("a",),
        "b": ("b",),
        "d": ("d",),
    }


def test_problems_are_logged_once_each_and_so_is_that_they_are_resolved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="splitlearn_manager")
    loop = Loop()
    problem = Problem("a.yaml", 3, 16, "max_memory_mb", 'expected an integer, got "4gb"')
    loop.source.state = replace(loop.source.state, problems=(problem,))
    for _ in range(3):
        loop.loop.turn()
    loop.source.state = replace(loop.source.state, problems=())
    for _ in range(3):
        loop.loop.turn()
    lines = [record.getMessage() for record in caplog.records]
    text = 'a.yaml:3:16  max_memory_mb: expected an integer, got \\"4gb\\"'
    assert lines == [
        f'event=Problem meanwhile="left out until that is corrected" msg="{text}"',
        f'event=Resolved msg="{text}"',
    ]


def test_a_missing_directory_is_a_problem_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Loop()
    loop.declare("a")
    loop.settle()
    before = loop.source.state
    loop.source.state = replace(
        before, source_available=False, source_message="desired does not exist"
    )
    assert loop.settle().plan.actions == ()
    assert loop.sync("a") == "Unknown"
    assert "desired does not exist" in caplog.text
    loop.source.state = before
    loop.settle()
    assert loop.sync("a") == "Synced"


class RealLoop:
    """The loop in its own thread, over a manager with real threads and models without torch."""

    def __init__(self) -> None:
        self.source = FakeSource()
        self.runtime = FakeRuntime()
        clock = SystemClock()
        self.manager = ModelManager(
            resources=FixedBudgets({"cpu": 100.0}),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=FakeFiles(),  # type: ignore[arg-type]
            clock=clock,
            executor=ThreadExecutor(),
        )
        self.errors = threading.Semaphore(0)
        self.loop = Reconciler(
            self.source, self.manager, clock, resync_s=0.01, on_error=self.errors.release
        )
        self.thread = threading.Thread(target=self.loop.run, daemon=True)

    def __enter__(self) -> RealLoop:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.manager.shutdown()


def test_an_unexpected_error_ends_a_turn_and_not_the_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with RealLoop() as real:
        assert real.loop.wait_converged(lambda: False)

        def explode(now: float, instructions: Instructions) -> DesiredState:
            raise RuntimeError("a bug in the source")

        monkeypatch.setattr(real.source, "look", explode)
        for _ in range(3):
            assert real.errors.acquire(timeout=DEADLINE_S)
        monkeypatch.undo()
        real.source.declare(model("a"), at=0.0)
        eventually(lambda: real.loop.status.phases.get("a") is Phase.READY, "the loop goes on")
    assert "event=TurnFailed msg=" in caplog.text
    assert "a bug in the source" in caplog.text
    told = [getattr(record, "fields", {}) for record in caplog.records if record.exc_info]
    assert {fields.get("event") for fields in told} == {"TurnFailed"}, "as JSON it is one too"


def test_waking_makes_a_turn_due_at_once() -> None:
    with RealLoop() as real:
        assert real.loop.wait_converged(lambda: False)
        real.loop.resync_s = 3600.0
        real.loop.wake()
        real.source.declare(model("a"), at=0.0)
        real.loop.wake()
        eventually(lambda: real.loop.status.phases.get("a") is Phase.READY, "it is served")


def test_a_plan_made_elsewhere_from_what_the_node_tells_is_that_of_the_node() -> None:
    loop = Loop()
    for model_id in ("kept", "edited", "removed"):
        loop.declare(model_id)
    loop.settle()
    loop.declare("edited", trusted=True)
    loop.source.remove("removed")
    elsewhere = Reconciler(loop.source, Loop().bench.manager, loop.bench.clock)
    node = from_json(to_json(loop.loop.observe()))
    _, made = elsewhere.preview(0.25, node)
    _, its_own = loop.loop.preview(0.25)
    assert made == its_own
    assert [(a.verb, a.model_id) for a in made.actions] == [
        (Verb.UPDATE, "edited"),
        (Verb.UNLOAD, "removed"),
    ]


def test_a_plan_made_elsewhere_counts_with_what_loads_measured() -> None:
    """A version that turned out too large is not foretold to fit once a key beside it is edited."""
    loop = Loop(budget_mb=100.0)
    loop.declare("grows")
    loop.settle()
    loop.bench.runtime.sizes_mb["grows"] = 150.0
    loop.declare("grows", weights="w1")
    loop.loop.turn()
    loop.bench.executor.run_all()
    loop.loop.turn()
    loop.declare("grows", weights="w1", priority=3)
    elsewhere = Reconciler(loop.source, Loop().bench.manager, loop.bench.clock)
    node = from_json(to_json(loop.loop.observe()))
    _, made = elsewhere.preview(0.25, node)
    _, its_own = loop.loop.preview(0.25)
    assert made == its_own
    assert [(w.model_id, w.reason) for w in made.waiting] == [("grows", "InsufficientMemory")]


def test_models_of_the_python_api_are_shown_and_left_alone() -> None:
    loop = Loop()
    loop.declare("mine")
    spec = ModelSpec.of(loop.source.state.models["mine"].config, weights="w0")
    loop.source.remove("mine")
    loop.bench.manager.begin_load(spec, Owner.API, "cpu", 10.0)
    loop.bench.executor.run_all()
    loop.settle()
    instance = loop.bench.manager.get_model("mine")
    assert instance is not None
    assert instance.state is State.READY
    shown = loop.loop.status.published["mine"]
    assert (shown["owner"], shown["phase"], shown["sync"]) == ("api", "Ready", "Synced")
