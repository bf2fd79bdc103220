"""From a request's model_id to the instance that answers it, and what each refusal looks like."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import monotonic

import pytest
import torch

from splitlearn_comm.core.errors import (
    ComputeError,
    DeadlinePassed,
    NotReady,
    OutOfMemory,
    UnknownTarget,
)
from splitlearn_comm.server.statuses import status_of
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.errors import (
    InsufficientMemory,
    ModelNotFound,
    ModelUnavailable,
    OperationInProgress,
)
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.routing.router import ModelRouter
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.compute_service import MOST_WAITING, ManagedBackend
from splitlearn_manager.server.refusals import refusal_of
from splitlearn_manager.server.threads import ThreadPlan
from support.fakes import Bench, FakeRunning, FakeSource, broken, model
from support.inferences import Asked
from support.waiting import eventually


class Server:
    """A backend over a manager and a loop whose work the test does by hand."""

    def __init__(
        self, max_waiters: int = 2, max_models: int = 5, most_waiting: int = MOST_WAITING
    ) -> None:
        self.bench = Bench(max_models=max_models)
        self.manager = self.bench.manager
        self.source = FakeSource()
        self.reconciler = Reconciler(self.source, self.manager, self.bench.clock)
        self.observed: list[tuple[str, str, float]] = []
        self.waits: list[tuple[bool, float]] = []
        self.backend = ManagedBackend(
            self.manager,
            ModelRouter(),
            self.reconciler,
            Batcher(ThreadPlan(2, lambda: 1)),
            version="9.9",
            max_waiters=max_waiters,
            most_waiting=most_waiting,
            observe=lambda *seen: self.observed.append(seen),
            observe_wait=lambda *seen: self.waits.append(seen),
        )

    def begin_load(self, model_id: str, **keys: object) -> None:
        """As the Python API does; the load itself waits for the executor."""
        self.manager.begin_load(ModelSpec.of(model(model_id, **keys)), Owner.API, "cpu", 10.0)

    def load(self, model_id: str, **keys: object) -> None:
        self.begin_load(model_id, **keys)
        self.bench.executor.run_all()

    def declare(self, model_id: str, **keys: object) -> None:
        self.source.declare(model(model_id, **keys), at=self.bench.clock.now())

    def settle(self) -> None:
        """Turns and works until nothing is left to do."""
        while True:
            turn = self.reconciler.turn()
            if not self.bench.executor.waiting and not turn.executed:
                return
            self.bench.executor.run_all()

    def answers(self, model_id: str) -> str:
        """Which model a request is given to that may wait, while the loop turns."""
        opened: list[str] = []

        def ask() -> None:
            with self.backend.open(model_id, remaining_s=60.0) as target:
                opened.append(target.model_id)

        asking = threading.Thread(target=ask)
        asking.start()

        def turned() -> bool:
            self.settle()
            return not asking.is_alive()

        eventually(turned, "it was answered or refused")
        return "".join(opened)

    def refusal(self, model_id: str, remaining_s: float | None = 0.0) -> ComputeError:
        opening = self.backend.open(model_id, remaining_s=remaining_s)
        with pytest.raises(ComputeError) as refused, opening:
            pytest.fail("it was opened")
        return refused.value


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModelNotFound("who?"), UnknownTarget),
        (ModelUnavailable("not now"), NotReady),
        (OperationInProgress("busy"), NotReady),
        (InsufficientMemory("full"), NotReady),
    ],
)
def test_only_an_unknown_name_is_a_refusal_that_is_not_retried(
    error: ModelNotFound | ModelUnavailable, kind: type[ComputeError]
) -> None:
    refusal = refusal_of(error)
    assert type(refusal) is kind
    assert (refusal.message, refusal.reason) == (error.message, error.reason)


def test_a_lease_is_held_for_as_long_as_the_model_is_open(server: Server) -> None:
    server.load("m")
    with server.backend.open("m") as opened:
        assert opened.model_id == "m"
        assert server.manager.get_model_info("m")["in_flight"] == 1
        server.manager.begin_unload("m", "Requested")
        server.bench.executor.run_all()
        assert server.bench.runtime.open_models, "it was closed under a request"
    server.bench.executor.run_all()
    assert not server.bench.runtime.open_models


def test_what_a_version_that_is_tried_is_never_asked_is_no_traffic_to_compare(
    server: Server,
) -> None:
    """Seen to fail when training, and requests with a cache, count as plain forwards do."""
    server.load("m")
    with server.backend.open("m"):
        pass
    one = Asked(torch.ones(1, 4))
    assert server.backend.enter("m", one)
    one.result()
    served = server.manager.get_model("m")
    assert served is not None
    eventually(lambda: served.idle, "both have ended")
    assert (served.requests, served.traffic.requests) == (2, 1)


def test_the_lease_is_given_back_when_the_request_fails(server: Server) -> None:
    server.load("m")
    with pytest.raises(ArithmeticError), server.backend.open("m"):
        raise ArithmeticError
    info = server.manager.get_model_info("m")
    assert (info["in_flight"], info["error_count"]) == (0, 1)


def test_a_batch_without_memory_halves_the_largest_that_is_thought_to_fit(server: Server) -> None:
    server.load("m")
    (instance,) = server.manager.table.all
    told = []
    server.manager.on_event(lambda event: told.append((event.reason, event.message)))

    def fails_on(batch: int) -> int | None:
        with pytest.raises(OutOfMemory), server.backend.open("m"):
            raise OutOfMemory("no memory", batch)
        return instance.largest_batch

    assert [fails_on(batch) for batch in (64, 100, 33, 20, 1, 1)] == [32, 32, 16, 10, 1, 1]
    assert [reason for reason, _ in told] == ["OutOfMemory"] * 4
    assert told[0][1] == (
        "ran out of memory on a batch of 64; from now on requests are joined into batches of at most 32"
    )
    info = server.manager.get_model_info("m")
    assert info["notes"] == ["ran out of memory: batches of at most 1 are thought to fit"]
    assert (info["state"], info["in_flight"], info["error_count"]) == ("READY", 0, 6)
    (view,) = server.manager.snapshot().instances
    assert view.notes == ("ran out of memory: batches of at most 1 are thought to fit",)


def test_without_an_id_the_ready_models_take_turns(server: Server) -> None:
    for model_id in ("a", "b"):
        server.load(model_id)
    chosen = []
    for _ in range(4):
        with server.backend.open("") as opened:
            chosen.append(opened.model_id)
    assert sorted(chosen) == ["a", "a", "b", "b"]


def test_an_endpoint_leads_to_the_models_that_share_it(server: Server) -> None:
    for model_id in ("a", "b"):
        server.load(model_id, endpoint="shared")
    server.load("c")
    chosen = set()
    for _ in range(4):
        with server.backend.open("shared") as opened:
            chosen.add(opened.model_id)
    assert chosen == {"a", "b"}


def test_an_unknown_name_does_not_exist(server: Server) -> None:
    server.load("m")
    refusal = server.refusal("n")
    assert isinstance(refusal, UnknownTarget)
    assert "'n'" in refusal.message


def test_a_forward_that_no_model_is_known_for_does_not_exist(server: Server) -> None:
    server.load("m")
    with pytest.raises(UnknownTarget, match="lost"), server.backend.open("", forward_id="lost"):
        pytest.fail("it was opened")


def test_a_model_that_loads_answers_try_again(server: Server) -> None:
    server.begin_load("m")
    refusal = server.refusal("m")
    assert isinstance(refusal, NotReady)
    assert "LOADING" in refusal.message


def test_without_any_model_ready_it_answers_try_again(server: Server) -> None:
    assert "no model is READY" in server.refusal("").message
    assert status_of(server.refusal("")).name == "UNAVAILABLE"


def test_a_declared_model_that_failed_answers_try_again_and_says_so(server: Server) -> None:
    server.bench.runtime.failures["m"] = broken()
    server.declare("m")
    server.settle()
    refusal = server.refusal("m")
    assert isinstance(refusal, NotReady)
    assert "m is Failed" in refusal.message


def test_an_endpoint_of_which_none_is_ready_names_them_all(server: Server) -> None:
    for model_id in ("a", "b"):
        server.bench.runtime.failures[model_id] = broken()
        server.declare(model_id, endpoint="shared")
    server.settle()
    message = server.refusal("shared").message
    assert "a is Failed" in message
    assert "b is Failed" in message


def with_a_parked_model(max_waiters: int, most_waiting: int = MOST_WAITING) -> Server:
    """A server whose declared model `m` was parked a second ago."""
    server = Server(max_waiters=max_waiters, most_waiting=most_waiting)
    server.declare("m", keep_alive_s=10.0)
    server.settle()
    server.bench.clock.advance(11.0)
    server.settle()
    assert server.reconciler.status.phases["m"] == "Evicted"
    server.bench.clock.advance(1.0)
    return server


@pytest.fixture
def parked() -> Iterator[Server]:
    """The same, with one place to wait."""
    server = with_a_parked_model(max_waiters=1)
    yield server
    server.reconciler.stop()


def test_a_request_wakes_a_parked_model_and_waits_for_it(parked: Server) -> None:
    assert parked.answers("m") == "m"
    assert [model_id for model_id, _ in parked.bench.runtime.started] == ["m", "m"]


def test_a_request_that_meets_a_model_being_parked_brings_it_back() -> None:
    server = Server()
    server.declare("m")
    server.settle()
    served = server.manager.get_model("m")
    assert served is not None
    server.manager.begin_evict("m", served.key, "KeepAlive")
    server.bench.clock.advance(0.001)
    # No turn has ended since: the status still says what it said before.
    assert server.reconciler.status.phases["m"] == "Ready"
    assert server.answers("m") == "m"


def test_a_request_joins_those_that_wait_while_the_model_loads() -> None:
    parked = with_a_parked_model(max_waiters=2)
    opened: list[str] = []

    def ask() -> None:
        with parked.backend.open("m", remaining_s=60.0) as target:
            opened.append(target.model_id)

    first = threading.Thread(target=ask)
    first.start()

    def loading() -> bool:
        parked.reconciler.turn()
        return parked.reconciler.status.phases.get("m") == "Loading"

    eventually(loading, "its load is under way")
    second = threading.Thread(target=ask)
    second.start()
    eventually(lambda: parked.backend._awaited["m"] == 2, "both wait")
    parked.settle()
    eventually(lambda: len(opened) == 2, "both are answered")
    first.join()
    second.join()
    assert not parked.backend._awaited


def test_more_requests_than_may_wait_answer_try_again(parked: Server) -> None:
    refusals: list[ComputeError] = []

    def ask() -> None:
        refusals.append(parked.refusal("m", remaining_s=60.0))

    waiting = threading.Thread(target=ask)
    waiting.start()
    eventually(
        lambda: "asked for by many" in parked.refusal("m").message, "the second is turned away"
    )
    assert waiting.is_alive()
    parked.reconciler.stop()
    waiting.join(30)
    assert [type(refusal) for refusal in refusals] == [NotReady]


def test_whoever_waited_until_its_deadline_makes_room_for_the_next(parked: Server) -> None:
    for _ in range(3):
        assert parked.refusal("m").message == "model 'm' is Evicted; try again"


def test_plain_forwards_wait_without_a_thread_each_and_are_answered_together() -> None:
    parked = with_a_parked_model(max_waiters=1)
    asked = [Asked(torch.ones(1, 4)) for _ in range(40)]
    before = threading.active_count()
    for one in asked:
        assert parked.backend.enter("m", one)
    # One for the model; others may come and go meanwhile, but not one for each.
    assert threading.active_count() < before + len(asked) // 2

    def all_ended() -> bool:
        parked.settle()
        return all(one.ended.is_set() for one in asked)

    eventually(all_ended, "all are answered")
    assert not any(one.error for one in asked)
    assert len(parked.waits) == 40
    assert not any(in_vain for in_vain, _ in parked.waits)
    assert parked.manager.get_model_info("m")["in_flight"] == 0
    eventually(lambda: not parked.backend._is_awaited("m"), "nobody waits any more")
    assert [model_id for model_id, _ in parked.bench.runtime.started] == ["m", "m"]


def test_more_plain_forwards_than_may_wait_answer_try_again() -> None:
    parked = with_a_parked_model(max_waiters=1, most_waiting=2)
    first, second, third = (Asked(torch.ones(1, 4)) for _ in range(3))
    for one in (first, second):
        assert parked.backend.enter("m", one)
    with pytest.raises(NotReady, match="2 requests wait already"):
        parked.backend.enter("m", third)
    parked.reconciler.stop()
    for one in (first, second):
        with pytest.raises(NotReady):
            one.result()
    eventually(lambda: not parked.backend._is_awaited("m"), "their places are free")


def test_a_request_that_nobody_wants_any_more_gives_its_place_to_another() -> None:
    """Seen to fail: it kept its place for as long as some request before it waited."""
    parked = with_a_parked_model(max_waiters=1, most_waiting=2)
    patient, unwanted, later = (Asked(torch.ones(1, 4)) for _ in range(3))
    assert parked.backend.enter("m", patient)
    assert parked.backend.enter("m", unwanted)
    unwanted.wanted = False

    def entered() -> bool:
        try:
            return parked.backend.enter("m", later)
        except NotReady:
            return False

    eventually(entered, "the place is free")
    with pytest.raises(DeadlinePassed):
        unwanted.result()
    eventually(lambda: [parked.settle(), later.ended.is_set()][1], "the later one is answered")
    for one in (patient, later):
        one.result()
    eventually(lambda: not parked.backend._is_awaited("m"), "nobody waits any more")
    assert parked.backend._room._count == 0


def test_a_plain_forward_waits_until_its_deadline_while_others_go_on_waiting(
    parked: Server,
) -> None:
    patient, hasty = Asked(torch.ones(1, 4)), Asked(torch.ones(1, 4), monotonic())
    for one in (hasty, patient):
        assert parked.backend.enter("m", one)
    with pytest.raises(NotReady, match="model 'm' is Evicted; try again"):
        hasty.result()
    assert not patient.ended.is_set()
    eventually(lambda: [parked.settle(), patient.ended.is_set()][1], "it is answered")
    patient.result()


def test_one_that_cannot_be_entered_holds_up_nobody_behind_it(parked: Server) -> None:
    """Seen to fail, with requests that wait for ever, when the error ends the thread that attends them."""
    odd, good = Asked(torch.ones(1, 4)), Asked(torch.ones(1, 4))
    odd.check_wanted = lambda: [][0]  # type: ignore[method-assign]
    for one in (odd, good):
        assert parked.backend.enter("m", one)
    eventually(lambda: [parked.settle(), good.ended.is_set()][1], "the other one is answered")
    good.result()
    with pytest.raises(ComputeError, match="IndexError"):
        odd.result()


def test_a_plain_forward_for_a_model_that_fails_is_refused(parked: Server) -> None:
    one = Asked(torch.ones(1, 4))
    parked.bench.runtime.failures["m"] = broken()
    assert parked.backend.enter("m", one)
    eventually(lambda: [parked.settle(), one.ended.is_set()][1], "it is refused")
    with pytest.raises(NotReady, match="Failed"):
        one.result()


def test_a_plain_forward_is_refused_if_no_thread_can_be_started_that_waits(
    parked: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: it and all later ones waited for ever, because only the first starts the thread."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one, later = (Asked(torch.ones(1, 4)) for _ in range(2))
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        assert parked.backend.enter("m", one)
    with pytest.raises(NotReady, match="can't start new thread to wait for it; try again"):
        one.result()
    assert not parked.backend._is_awaited("m")
    assert parked.backend.enter("m", later)
    eventually(lambda: [parked.settle(), later.ended.is_set()][1], "the later one is answered")
    later.result()


def test_an_evicted_model_whose_load_failed_once_is_tried_again(parked: Server) -> None:
    """Seen to fail: it was Failed for good, as evicted ones wait for requests and failed ones refuse them."""
    one, later = (Asked(torch.ones(1, 4)) for _ in range(2))
    parked.bench.runtime.failures["m"] = broken()
    assert parked.backend.enter("m", one)
    eventually(lambda: [parked.settle(), one.ended.is_set()][1], "it is refused")
    parked.bench.runtime.failures.clear()
    parked.bench.clock.advance(1.5)
    parked.settle()
    assert parked.reconciler.status.phases["m"] == "Ready"
    assert parked.backend.enter("m", later)
    later.result()


def test_a_request_makes_room_for_a_model_whose_load_failed_before() -> None:
    """Seen to fail: in the turn that made room the model counted as failed, and the request was refused."""
    server = Server(max_models=1)
    server.bench.runtime.failures["m"] = broken()
    server.declare("m")
    server.settle()
    server.bench.runtime.failures.clear()
    server.declare("other", priority=1)
    server.settle()
    server.declare("other")
    server.settle()
    for _ in range(3):
        server.bench.clock.advance(30.0)
        assert server.answers("other") == "other"
    assert server.reconciler.status.phases["m"] == "Failed"
    one = Asked(torch.ones(1, 4))
    assert server.backend.enter("m", one)
    eventually(lambda: [server.settle(), one.ended.is_set()][1], "it is answered")
    one.result()


def test_one_that_asks_by_the_name_of_the_next_version_waits_for_that_and_costs_nothing() -> None:
    """Seen to fail, with a thread that tries it all the time, when it waits for the model alone."""
    server = Server()
    server.declare("m", endpoint="old")
    server.settle()
    server.declare("m", endpoint="new", config={"kwargs": {"v": 2}})
    for _ in range(2):
        server.reconciler.turn()
    assert server.reconciler.status.phases["m"] == "Updating"
    one, tries = Asked(torch.ones(1, 4)), []
    one.check_wanted = lambda: tries.append(1)  # type: ignore[method-assign]
    assert server.backend.enter("new", one)
    for _ in range(100):
        server.reconciler.turn()
    eventually(lambda: [server.settle(), one.ended.is_set()][1], "it is answered")
    one.result()
    # Once before it is entered, once by the batcher.
    assert len(tries) == 2


def test_one_that_waits_by_a_name_that_the_model_loses_is_refused() -> None:
    """Seen to fail, with requests that wait for their deadlines, when it waits for the model alone."""
    server = Server()
    server.declare("m", endpoint="old", keep_alive_s=10.0)
    server.settle()
    server.bench.clock.advance(11.0)
    server.settle()
    one = Asked(torch.ones(1, 4))
    assert server.backend.enter("old", one)
    server.bench.clock.advance(1.0)
    server.declare("m", endpoint="new")
    eventually(lambda: [server.settle(), one.ended.is_set()][1], "it is refused")
    with pytest.raises(NotReady, match="'m' is not called 'old' any more"):
        one.result()


@pytest.mark.parametrize(("name", "kind"), [("nobody", UnknownTarget), ("", NotReady)])
def test_a_plain_forward_for_which_nobody_can_be_waited_for_is_refused_at_once(
    server: Server, name: str, kind: type[ComputeError]
) -> None:
    with pytest.raises(kind):
        server.backend.enter(name, Asked(torch.ones(1, 4)))


def test_health_says_how_many_are_ready_and_when_it_drains(server: Server) -> None:
    assert server.backend.health().status == "ok"
    server.load("m")
    assert server.backend.health().message == "1 models ready"
    server.backend.draining = True
    assert server.backend.health().status == "draining"


def test_service_info_names_what_is_served(server: Server) -> None:
    assert server.backend.service_info().device == "cpu"
    for model_id in ("a", "b"):
        server.load(model_id)
    info = server.backend.service_info()
    assert info.custom_info["models"].split(",") == ["a", "b"]
    assert info.custom_info["model.a"] == "READY on cpu"
    assert server.backend.version == "9.9"


def test_what_was_answered_is_observed(server: Server) -> None:
    server.backend.observe("m", "OK", 0.5)
    assert server.observed == [("m", "OK", 0.5)]


def test_it_opens_what_the_instance_runs(server: Server) -> None:
    server.load("m")
    with server.backend.open("m") as opened:
        running = opened.function
        assert isinstance(running, FakeRunning)
        assert running.config.model_id == "m"
