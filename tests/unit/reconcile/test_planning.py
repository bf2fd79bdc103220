"""What is planned in each situation; the situations are made with a real manager over fakes."""

from __future__ import annotations

from dataclasses import replace

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.reconcile.actions import (
    Action,
    Demand,
    Mode,
    Observed,
    Plan,
    Verb,
    Wanted,
)
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.plan import plan
from splitlearn_manager.reconcile.updating import describe_changes
from support.fakes import Bench, model


class Node:
    """Desired and observed state, as the test makes them; `made` is the plan."""

    def __init__(self, budget_mb: float = 100.0, max_models: int = 5) -> None:
        self.bench = Bench(budgets_mb={"cpu": budget_mb}, max_models=max_models)
        self.desired: dict[str, Wanted] = {}
        self.attempts: dict[str, Attempt] = {}
        self.parked: dict[str, float] = {}
        self.fallbacks: dict[str, Wanted] = {}
        self.limited: dict[str, float] = {}
        self.demands: dict[str, Demand] = {}

    def want(
        self, model_id: str, *, weights: str = "w0", mb: float = 10.0, **keys: object
    ) -> Wanted:
        """Declares the model now, with these keys of its file."""
        self.bench.clock.advance(1.0)
        spec = ModelSpec.of(model(model_id, **keys), weights=weights)
        self.desired[model_id] = Wanted(
            spec, mb, ("cpu",), self.bench.clock.now(), source=f"{model_id}.yaml"
        )
        return self.desired[model_id]

    def change(self, model_id: str, **attributes: object) -> None:
        """Sets attributes of what is wanted, such as `own_limit_problem`."""
        self.desired[model_id] = replace(self.desired[model_id], **attributes)  # type: ignore[arg-type]

    def begin(self, model_id: str, owner: Owner = Owner.DIRECTORY) -> None:
        """Begins to load what is wanted of the model."""
        it = self.desired[model_id]
        self.bench.files.fingerprints[model_id] = it.spec.weights
        self.bench.runtime.sizes_mb[model_id] = it.mb
        assert self.bench.manager.begin_load(it.spec, owner, "cpu", it.mb)

    def serve(self, model_id: str, owner: Owner = Owner.DIRECTORY, **keys: object) -> None:
        """Declares and loads it."""
        self.want(model_id, **keys)  # type: ignore[arg-type]
        self.begin(model_id, owner)
        self.bench.executor.run_all()
        assert model_id in self.bench.manager.table.by_model

    def ask(self, model_id: str, *, for_s: float = 30.0) -> None:
        """A request waits for the model from now on."""
        now = self.bench.clock.now()
        self.demands[model_id] = Demand(1, now, now + for_s / 2)

    def fail(self, model_id: str, *, retry_in_s: float | None = 30.0) -> None:
        """The wanted version has failed once."""
        retry_at = None if retry_in_s is None else self.bench.clock.now() + retry_in_s
        spec = self.desired[model_id].spec
        self.attempts[model_id] = Attempt(spec, 1, retry_at, "LoadFailed", "it is broken")

    @property
    def made(self) -> Plan:
        return plan(
            self.desired,
            Observed(
                snapshot=self.bench.manager.snapshot(),
                attempts=self.attempts,
                parked=self.parked,
                fallbacks=self.fallbacks,
                limited=self.limited,
                demands=self.demands,
                now_s=self.bench.clock.now(),
            ),
        )

    @property
    def actions(self) -> list[tuple[Verb, str]]:
        return [(action.verb, action.model_id) for action in self.made.actions]

    def only_action(self) -> Action:
        (action,) = self.made.actions
        return action

    def reason(self, model_id: str) -> str:
        waiting = self.made.waiting_for(model_id)
        return waiting.reason if waiting else ""


def test_what_serves_as_wanted_gets_nothing() -> None:
    node = Node()
    node.serve("a")
    assert not node.made.actions
    assert not node.made.waiting


def test_what_is_not_served_is_loaded_higher_priority_first() -> None:
    node = Node()
    node.want("a")
    node.want("b", priority=1)
    assert node.actions == [(Verb.LOAD, "b"), (Verb.LOAD, "a")]
    assert node.made.actions[0].detail == "10 MB on cpu"


def test_keys_that_apply_in_place_adjust_and_others_update_by_surge() -> None:
    node = Node()
    node.serve("a")
    node.serve("b")
    node.want("a", priority=2)
    node.want("b", trusted=True)
    adjust, update = node.made.actions
    assert (adjust.verb, adjust.model_id, adjust.detail) == (Verb.ADJUST, "a", "priority 0 → 2")
    assert (update.verb, update.model_id, update.mode) == (Verb.UPDATE, "b", Mode.SURGE)
    assert (update.detail, update.reason) == ("trusted false → true", "SpecChanged")


def test_new_weights_are_an_update() -> None:
    node = Node()
    node.serve("a")
    node.want("a", weights="w1")
    action = node.only_action()
    assert (action.verb, action.reason, action.detail) == (
        Verb.UPDATE,
        "WeightsChanged",
        "weights changed",
    )


def test_an_update_goes_by_recreate_where_both_do_not_fit() -> None:
    node = Node(budget_mb=15.0)
    node.serve("a")
    node.want("a", trusted=True)
    assert node.only_action().mode is Mode.RECREATE


def test_update_recreate_goes_by_recreate_though_both_fit() -> None:
    node = Node()
    node.serve("a", update="recreate")
    node.want("a", update="recreate", trusted=True)
    assert node.only_action().mode is Mode.RECREATE


def test_update_surge_waits_for_room_rather_than_going_down() -> None:
    node = Node(budget_mb=15.0)
    node.serve("a", update="surge")
    node.want("a", update="surge", trusted=True)
    assert node.actions == []
    assert node.reason("a") == "InsufficientMemory"


def test_what_no_file_declares_is_unloaded() -> None:
    node = Node()
    node.serve("a")
    node.desired.clear()
    action = node.only_action()
    assert (action.verb, action.reason) == (Verb.UNLOAD, "Pruned")


def test_what_was_loaded_through_the_python_api_is_left_alone() -> None:
    node = Node()
    node.serve("a", owner=Owner.API)
    node.want("a", trusted=True)
    assert (node.actions, node.reason("a")) == ([], "OwnedByApi")
    node.desired.clear()
    assert node.actions == []


def test_while_an_operation_is_under_way_nothing_is_planned_for_the_model() -> None:
    node = Node()
    node.want("a")
    node.begin("a")
    assert (node.actions, node.reason("a")) == ([], "Loading")
    node.bench.executor.run_all()
    node.bench.manager.begin_unload("a", "Requested")
    assert (node.actions, node.reason("a")) == ([], "Unloading")


def test_a_failed_version_waits_for_its_retry_and_another_does_not() -> None:
    node = Node()
    node.want("a")
    node.fail("a")
    waiting = node.made.waiting_for("a")
    assert waiting is not None
    assert (waiting.reason, waiting.failed) == ("LoadFailed", True)
    assert waiting.until_s == node.bench.clock.now() + 30.0
    node.bench.clock.advance(30.0)
    assert node.actions == [(Verb.LOAD, "a")]
    node.fail("a", retry_in_s=None)
    node.bench.clock.advance(1e6)
    assert node.actions == []
    node.want("a", load_timeout_s=900)
    assert node.actions == [(Verb.LOAD, "a")], "any key may be what a failure waits for"


def test_no_second_load_is_begun_beside_a_loader_that_hangs() -> None:
    """Each would hold a place and a thread until it returns, so retries would fill the node."""
    node = Node()
    node.want("a", load_timeout_s=5)
    node.begin("a")
    node.bench.clock.advance(6.0)
    node.bench.manager.tick()
    assert [v.state for v in node.bench.manager.snapshot().instances] == [State.FAILED]
    node.fail("a", retry_in_s=1.0)
    node.bench.clock.advance(100.0)
    assert (node.actions, node.reason("a")) == ([], "LoadFailed")
    node.bench.executor.run_all()  # The loader comes back at last; what it gave is thrown away.
    assert node.actions == [(Verb.LOAD, "a")]


def test_another_version_is_loaded_although_the_loader_of_the_first_hangs() -> None:
    node = Node()
    node.want("a", load_timeout_s=5)
    node.begin("a")
    node.bench.clock.advance(6.0)
    node.bench.manager.tick()
    node.fail("a", retry_in_s=1.0)
    node.want("a", trusted=True)
    assert node.actions == [(Verb.LOAD, "a")]


def test_after_a_failed_recreate_the_former_version_is_loaded() -> None:
    node = Node()
    former = node.want("a", update="recreate")
    node.want("a", update="recreate", trusted=True)
    node.fail("a")
    node.fallbacks["a"] = former
    action = node.only_action()
    assert (action.verb, action.spec) == (Verb.LOAD, former.spec)
    assert node.reason("a") == "LoadFailed"


def test_while_the_former_version_serves_a_failed_recreate_is_not_tried_again() -> None:
    """Each try would be an outage; a change of the file is another version."""
    node = Node()
    node.serve("a", update="recreate")
    node.want("a", update="recreate", trusted=True)
    node.fail("a")
    node.bench.clock.advance(1e6)
    assert (node.actions, node.reason("a")) == ([], "LoadFailed")
    node.want("a", update="recreate", batch_size=4, trusted=True)
    assert node.only_action().mode is Mode.RECREATE


def test_a_failed_recreate_promises_no_next_try_while_the_backoff_lasts_either() -> None:
    """Seen: a message that named a time, at which then nothing was tried."""
    node = Node()
    node.serve("a", update="recreate")
    broken = node.want("a", update="recreate", trusted=True)
    later_s = node.bench.clock.now() + 9.0
    node.attempts["a"] = Attempt(broken.spec, 1, later_s, "LoadFailed", "it is broken")
    (waiting,) = node.made.waiting
    assert (waiting.reason, waiting.until_s) == ("LoadFailed", None)
    assert node.made.actions == ()


def test_a_load_that_failed_and_still_gives_back_its_memory_says_when_it_is_tried_again() -> None:
    """Seen: for that moment it was said that it waits for a change of its file."""
    node = Node()
    broken = node.want("a")
    node.begin("a")
    later_s = node.bench.clock.now() + 9.0
    (loading,) = node.bench.manager.snapshot().instances
    failed = replace(loading, state=State.FAILED)
    for reason, until_s in (("LoadFailed", later_s), ("LoadTimeout", None)):
        attempt = Attempt(broken.spec, 1, later_s, reason, "it is broken")
        snapshot = replace(node.bench.manager.snapshot(), instances=(failed,))
        now_s = node.bench.clock.now()
        observed = Observed(snapshot=snapshot, attempts={"a": attempt}, now_s=now_s)
        (waiting,) = plan(node.desired, observed).waiting
        assert (waiting.reason, waiting.until_s) == (reason, until_s)


def test_a_failed_update_that_fits_beside_says_when_it_is_tried_again() -> None:
    node = Node()
    node.serve("a")
    broken = node.want("a", trusted=True)
    later_s = node.bench.clock.now() + 9.0
    node.attempts["a"] = Attempt(broken.spec, 1, later_s, "LoadFailed", "it is broken")
    (waiting,) = node.made.waiting
    assert waiting.until_s == later_s
    assert node.made.actions == ()


def test_after_a_failed_recreate_the_former_version_is_loaded_whatever_the_file_says_by_then() -> (
    None
):
    node = Node()
    node.fallbacks["a"] = node.want("a", update="recreate")
    node.want("a", trusted=True)
    node.change("a", weights_ready=False, weights_problem="nothing is at /models/a.pt")
    assert node.only_action().spec == node.fallbacks["a"].spec
    assert node.reason("a") == "WeightsNotFound"


def test_a_failed_surge_is_tried_again_when_its_wait_is_over() -> None:
    node = Node()
    node.serve("a")
    node.want("a", trusted=True)
    node.fail("a")
    assert node.actions == []
    node.bench.clock.advance(30.0)
    assert node.actions == [(Verb.UPDATE, "a")]


def test_missing_and_changing_weights_are_told_apart() -> None:
    node = Node()
    node.want("a")
    node.change("a", weights_ready=False)
    changing = node.made.waiting_for("a")
    assert changing is not None
    assert (changing.reason, changing.failed) == ("WeightsNotReady", False)
    node.change("a", weights_problem="nothing is at /models/a.pt")
    missing = node.made.waiting_for("a")
    assert missing is not None
    assert (missing.reason, missing.message, missing.failed) == (
        "WeightsNotFound",
        "nothing is at /models/a.pt",
        True,
    )


def test_a_model_over_its_own_limit_is_neither_loaded_nor_adjusted_nor_updated() -> None:
    node = Node()
    node.want("new")
    node.serve("adjusted")
    node.want("adjusted", max_memory_mb=5)
    node.serve("updated")
    node.want("updated", trusted=True)
    for model_id in node.desired:
        node.change(model_id, own_limit_problem="takes 10 MB, its max_memory_mb is 5")
    assert node.actions == []
    for model_id in node.desired:
        waiting = node.made.waiting_for(model_id)
        assert waiting is not None
        assert (waiting.reason, waiting.failed) == ("OverMemoryLimit", True)


def test_an_idle_model_is_parked_after_keep_alive_s_and_stays_so_until_it_is_asked_for() -> None:
    node = Node()
    node.serve("a", keep_alive_s=60)
    waiting = node.made.waiting_for("a")
    assert waiting is not None
    assert (waiting.reason, waiting.until_s) == ("KeepAlive", node.bench.clock.now() + 60.0)
    node.bench.clock.advance(60.0)
    action = node.only_action()
    assert (action.verb, action.reason) == (Verb.EVICT, "Idle")
    assert node.bench.manager.begin_evict("a", action.key or "", action.reason)
    node.bench.executor.run_all()
    node.parked["a"] = node.bench.clock.now()
    assert (node.actions, node.reason("a")) == ([], "Evicted")
    node.ask("a")
    assert node.actions == [(Verb.LOAD, "a")]


def test_a_model_in_use_or_pinned_is_not_parked() -> None:
    node = Node()
    node.serve("a", keep_alive_s=60)
    node.serve("b", keep_alive_s=60, pinned=True)
    with node.bench.manager.lease("a"):
        node.bench.clock.advance(1e6)
        assert node.actions == []


def test_room_is_made_by_evicting_the_least_recently_used_and_the_load_waits_for_it() -> None:
    node = Node(max_models=2)
    node.serve("a")
    node.serve("b")
    node.bench.clock.advance(1.0)
    node.bench.manager.lease("a").release()
    node.want("c")
    evict, load = node.made.actions
    assert (evict.verb, evict.model_id, evict.detail) == (Verb.EVICT, "b", "makes room for c")
    assert (load.verb, load.model_id, load.after) == (Verb.LOAD, "c", ("b",))
    assert node.reason("c") == "AwaitingMemory"


def test_room_that_is_made_for_a_request_is_not_for_a_model_that_waited_before() -> None:
    node = Node(max_models=1)
    node.want("a")
    node.want("c")
    node.begin("c")
    node.bench.executor.run_all()
    assert (node.actions, node.reason("a")) == ([], "MaxModels")
    node.want("b")
    evict, load = node.made.actions
    assert (evict.model_id, load.model_id) == ("c", "b")
    assert node.bench.manager.begin_evict("c", evict.key or "", evict.reason)
    node.parked["c"] = node.bench.clock.now()
    assert [a.model_id for a in node.made.actions if a.verb is Verb.LOAD] == ["b"]
    node.bench.executor.run_all()
    assert (node.actions, node.reason("a")) == ([(Verb.LOAD, "b")], "MaxModels")


def test_loads_that_fit_side_by_side_begin_in_the_order_of_priority_and_id() -> None:
    node = Node()
    for model_id, priority in (("b", 0), ("a", 0), ("d", 1), ("c", 1)):
        node.want(model_id, priority=priority)
    assert [model_id for _, model_id in node.actions] == ["c", "d", "a", "b"]


def test_without_room_and_without_anybody_to_go_the_model_waits_and_says_who_holds_it() -> None:
    node = Node(budget_mb=25.0)
    node.serve("a", mb=20.0, pinned=True)
    node.want("b")
    waiting = node.made.waiting_for("b")
    assert waiting is not None
    assert (waiting.reason, waiting.failed) == ("InsufficientMemory", False)
    assert "a 20 MB (pinned)" in waiting.message


def test_the_room_of_an_unload_is_waited_for_and_nobody_is_evicted_for_it() -> None:
    node = Node(max_models=2)
    node.serve("a")
    node.serve("b")
    del node.desired["a"]
    node.want("c")
    assert node.actions == [(Verb.UNLOAD, "a"), (Verb.LOAD, "c")]
    assert node.made.actions[1].after == ("a",)


def test_the_room_of_a_rollout_that_is_cancelled_is_waited_for_and_nobody_is_evicted_for_it() -> (
    None
):
    node = Node(max_models=3)
    node.serve("a")
    node.serve("b")
    rollout = {"canary": [{"percent": 5, "for_s": 60}]}
    node.want("a", trusted=True, rollout=rollout)
    node.begin("a")
    node.bench.executor.run_all()
    node.want("c")
    assert node.actions == [(Verb.EVICT, "b"), (Verb.LOAD, "c")]
    node.want("a")
    assert node.actions == [(Verb.CANCEL, "a"), (Verb.LOAD, "c")]
    assert node.made.actions[1].after == ("a",)


def test_a_version_that_is_tried_is_taken_back_if_it_breaks_its_own_new_limit() -> None:
    """Seen to fail, with a version that takes over and breaks it, when the limit is only adopted."""
    node = Node()
    node.serve("a")
    rollout = {"canary": [{"percent": 5, "for_s": 60}]}
    node.want("a", trusted=True, rollout=rollout)
    node.begin("a")
    node.bench.executor.run_all()
    node.want("a", trusted=True, rollout=rollout, max_memory_mb=5)
    assert node.actions == [(Verb.ADJUST, "a")]
    node.change("a", own_limit_problem="it takes 10 MB, its max_memory_mb is 5")
    action = node.only_action()
    assert (action.verb, action.model_id) == (Verb.CANCEL, "a")
    assert "its max_memory_mb is 5" in action.detail
    assert node.bench.manager.cancel_rollout("a", str(action.key))
    node.bench.executor.run_all()
    assert (node.actions, node.reason("a")) == ([], "OverMemoryLimit")


def test_a_former_version_that_is_loaded_first_and_finds_no_room_says_that_it_does_not() -> None:
    """Seen to fail, with a status that says for ever that it is loaded first, when both are told."""
    node = Node(budget_mb=40.0)
    former = node.want("a", mb=60.0)
    node.want("a", mb=10.0, trusted=True, rollout={"canary": [{"percent": 5, "for_s": 60}]})
    node.fallbacks["a"] = former
    for suspended in (False, True):
        node.change("a", suspended=suspended)
        assert node.actions == []
        (waiting,) = node.made.waiting
        assert waiting.reason == "InsufficientMemory"
        assert waiting.message.startswith(
            "generation 1, which served last, is loaded first: needs 60 MB on cpu"
        )


def test_the_forecast_counts_a_surges_two_copies_at_its_peak() -> None:
    node = Node()
    node.serve("a", mb=10.0)
    node.want("a", mb=30.0, trusted=True)
    (device,) = node.made.forecast
    assert (device.now_mb, device.peak_mb, device.after_mb) == (10.0, 40.0, 30.0)
    assert device.budget_mb == 100.0


def test_changes_are_described_as_a_person_wrote_them() -> None:
    old = ModelSpec.of(model("a", config={"dtype": "float16"}), weights="w0")
    new = ModelSpec.of(model("a", config={"dtype": "bfloat16"}), weights="w1")
    assert describe_changes(old, new) == "dtype float16 → bfloat16, weights changed"


def test_a_suspended_model_that_serves_is_left_as_it_is() -> None:
    node = Node()
    node.serve("a")
    node.want("a", trusted=True, keep_alive_s=1.0)
    node.change("a", suspended=True)
    node.bench.clock.advance(100.0)
    assert not node.made.actions
    assert node.reason("a") == "Suspended"


def test_a_suspended_model_is_not_evicted_for_another() -> None:
    node = Node(max_models=1)
    node.serve("a")
    node.change("a", suspended=True)
    node.want("b", priority=5)
    assert not node.made.actions
    waiting = node.made.waiting_for("b")
    assert waiting is not None
    assert waiting.reason == "MaxModels"
    assert "(suspended)" in waiting.message


def test_a_suspended_model_is_loaded_and_after_a_failure_left_alone() -> None:
    node = Node()
    node.want("a")
    node.change("a", suspended=True)
    assert node.actions == [(Verb.LOAD, "a")]
    node.fail("a", retry_in_s=0.0)
    node.bench.clock.advance(1.0)
    assert not node.made.actions
    waiting = node.made.waiting_for("a")
    assert waiting is not None
    assert (waiting.reason, waiting.failed, waiting.until_s) == ("LoadFailed", True, None)
    assert "suspended" in waiting.message


def test_a_suspended_model_comes_back_in_the_version_that_served_last() -> None:
    """Not in one that was accepted before the suspension, and never served."""
    node = Node()
    old = node.want("a")
    node.want("a", trusted=True)
    node.change("a", suspended=True)
    node.fallbacks["a"] = old
    assert node.only_action().spec == old.spec


def test_what_failed_before_is_tried_after_all_others() -> None:
    """Or its load, which may take as long as the last one, would hold up the rest."""
    node = Node()
    node.serve("updates-again")
    node.serve("updates")
    for model_id in ("updates-again", "updates"):
        node.want(model_id, trusted=True)
    node.want("loads-again", priority=9)
    node.want("loads")
    node.fail("loads-again", retry_in_s=0.0)
    node.fail("updates-again", retry_in_s=0.0)
    node.bench.clock.advance(1.0)
    assert [model_id for _, model_id in node.actions] == [
        "updates",
        "loads",
        "updates-again",
        "loads-again",
    ]


def test_what_failed_before_does_not_take_the_room_of_what_never_did() -> None:
    node = Node(max_models=1)
    node.want("again", priority=9)
    node.want("fresh")
    assert node.actions == [(Verb.LOAD, "again")]
    node.fail("again", retry_in_s=0.0)
    node.bench.clock.advance(1.0)
    assert node.actions == [(Verb.LOAD, "fresh")]


def test_when_too_many_loads_have_failed_none_is_tried_whatever_is_wanted() -> None:
    node = Node()
    old = node.want("a")
    node.want("a", trusted=True)
    node.fallbacks["a"] = old
    until_s = node.bench.clock.now() + 30.0
    node.limited["a"] = until_s
    node.want("b")
    assert node.actions == [(Verb.LOAD, "b")]
    waiting = node.made.waiting_for("a")
    assert waiting is not None
    assert (waiting.reason, waiting.failed, waiting.until_s) == ("RateLimited", True, until_s)
    node.bench.clock.advance(30.0)
    assert (Verb.LOAD, "a") in node.actions


def test_an_update_is_not_tried_either_when_too_many_loads_have_failed() -> None:
    node = Node()
    node.serve("a")
    node.want("a", trusted=True)
    node.limited["a"] = node.bench.clock.now() + 30.0
    assert not node.made.actions
    assert node.reason("a") == "RateLimited"


def test_weights_that_are_still_changing_are_waited_for_and_not_gone_back_from() -> None:
    node = Node()
    old = node.want("a")
    node.want("a", weights="", trusted=True)
    node.change("a", weights_ready=False)
    node.fallbacks["a"] = old
    assert not node.made.actions
    assert node.reason("a") == "WeightsNotReady"
    node.change("a", weights_problem="nothing is at /models/a.pt")
    assert node.only_action().spec == old.spec


def test_thousands_that_wait_for_room_are_told_the_same() -> None:
    node = Node(max_models=1)
    node.serve("a")
    for number in range(50):
        node.want(f"m{number:02d}")
    node.bench.manager.table.by_model["a"].last_used_s = node.bench.clock.now() + 1.0
    made = node.made
    assert not made.actions
    assert len({id(made.waiting_for(f"m{n:02d}").message) for n in range(50)}) == 1  # type: ignore[union-attr]
