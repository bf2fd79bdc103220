"""The transitions behind the lock: what each one changes, and what it refuses."""

from __future__ import annotations

import pytest

from splitlearn_manager.core.instance_book import Successor
from splitlearn_manager.core.instances import Instances
from splitlearn_manager.core.ledger import Ledger, LedgerError
from splitlearn_manager.core.lifecycle import IllegalTransition, ModelSpec, Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.errors import OperationInProgress, UntrustedCheckpoint
from support.fakes import FakeClock, FakeRunning, broken, model


class Changes:
    """The instances of a node with 100 MB and three places; counts what it is told."""

    def __init__(self) -> None:
        self.count = 0
        self.clock = FakeClock()
        ledger = Ledger({"cpu": 100.0}, 3)
        self.instances = Instances(ledger, self.clock, self._changed)

    def _changed(self) -> None:
        # Called outside the lock: a look from here must not wait for ever.
        self.instances.snapshot()
        self.count += 1

    def load(self, model_id: str, mb: float = 10.0, **keys: object) -> ManagedModel:
        instance = self.instances.add(spec(model_id, **keys), Owner.DIRECTORY, "cpu", mb)
        assert instance is not None
        return instance

    def serve(self, model_id: str, mb: float = 10.0, **keys: object) -> ManagedModel:
        instance = self.load(model_id, mb, **keys)
        self.ready(instance, mb)
        return instance

    def ready(self, instance: ManagedModel, mb: float = 10.0) -> ManagedModel | None:
        running = FakeRunning(instance.config, mb)
        return self.instances.ready(instance, running, instance.spec)  # type: ignore[arg-type]

    @property
    def used_mb(self) -> float:
        return self.instances.ledger.used_mb("cpu")


def spec(model_id: str, **keys: object) -> ModelSpec:
    return ModelSpec.of(model(model_id, **keys))


@pytest.fixture
def node() -> Changes:
    return Changes()


def test_a_loading_instance_holds_memory_and_gets_no_requests(node: Changes) -> None:
    instance = node.load("a", 30.0)
    assert instance.state is State.LOADING
    assert node.used_mb == 30.0
    assert not node.instances.table.all
    assert not instance.acquire(0.0)
    assert node.count == 1


def test_what_does_not_fit_is_not_added(node: Changes) -> None:
    node.load("a", 90.0)
    assert node.instances.add(spec("b"), Owner.DIRECTORY, "cpu", 20.0) is None
    node.load("b", 2.0)
    node.load("c", 2.0)
    assert node.instances.add(spec("d"), Owner.DIRECTORY, "cpu", 1.0) is None
    assert [i.model_id for i in node.instances.all()] == ["a", "b", "c"]


def test_ready_corrects_the_reservation_routes_and_drains_the_old_one(node: Changes) -> None:
    old = node.serve("a", 30.0)
    new = node.load("a", 10.0)
    assert node.instances.table.by_model["a"] is old
    assert node.ready(new, 20.0) is old
    assert node.instances.table.by_model["a"] is new
    assert (old.state, old.unload_reason) == (State.UNLOADING, "Replaced")
    assert node.used_mb == 50.0, "the old one's memory is not back yet"
    assert not old.acquire(0.0)
    assert new.acquire(0.0)


def test_ready_that_measures_more_than_fits_changes_nothing(node: Changes) -> None:
    instance = node.load("a", 10.0)
    with pytest.raises(LedgerError):
        node.ready(instance, 101.0)
    assert instance.state is State.LOADING
    assert node.used_mb == 10.0
    assert not node.instances.table.all


def test_a_load_that_was_given_up_cannot_become_ready(node: Changes) -> None:
    instance = node.load("a")
    assert node.instances.fail(instance, broken())
    with pytest.raises(OperationInProgress):
        node.ready(instance)
    assert not node.instances.fail(instance, broken()), "only the first failure counts"
    assert instance.state is State.FAILED
    assert node.used_mb == 10.0, "charged until the loader is back"
    node.instances.abandon(instance)
    assert node.instances.claim_close(instance)
    node.instances.gone(instance)
    assert node.used_mb == 0.0


def test_outcomes_say_how_the_latest_load_ended_and_whether_trying_again_may_help(
    node: Changes,
) -> None:
    node.serve("a")
    node.instances.fail(node.load("b"), broken("it is broken"))
    node.instances.fail(node.load("c"), UntrustedCheckpoint("it carries code"))
    outcomes = node.instances.snapshot().outcomes
    assert outcomes["a"].ok
    b, c = outcomes["b"], outcomes["c"]
    assert (b.reason, b.message, b.terminal) == ("LoadFailed", "it is broken", False)
    assert (c.reason, c.terminal) == ("UntrustedCheckpoint", True)
    assert outcomes["a"].serial < b.serial < c.serial
    node.instances.forget_outcome("b")
    assert "b" not in node.instances.snapshot().outcomes


def test_one_operation_a_model(node: Changes) -> None:
    node.load("a")
    with pytest.raises(OperationInProgress, match="'a' is LOADING"):
        node.load("a")
    node.serve("b")
    assert node.instances.begin_unload("b", "Requested") is not None
    with pytest.raises(OperationInProgress, match="'b' is UNLOADING"):
        node.load("b")
    assert node.instances.begin_unload("b", "Requested") is None, "it is on its way"


def test_an_unload_refuses_requests_at_once_and_closes_after_the_last_lease(node: Changes) -> None:
    instance = node.serve("a")
    assert instance.acquire(0.0)
    assert node.instances.begin_unload("a", "Requested") is instance
    assert not node.instances.table.all
    assert not instance.acquire(0.0)
    assert not node.instances.claim_close(instance)
    assert instance.release(1.0, duration_s=1.0, ok=True), "the last one of a draining instance"
    assert node.instances.claim_close(instance)
    assert not node.instances.claim_close(instance), "exactly one closes it"
    assert node.used_mb == 10.0
    node.instances.gone(instance)
    assert (node.used_mb, node.instances.all(), instance.state) == (0.0, (), State.GONE)


def test_an_eviction_takes_only_that_very_instance_and_only_if_it_is_idle(node: Changes) -> None:
    instance = node.serve("a")
    assert node.instances.begin_unload("a", "MadeRoom", key="a#99", only_if_idle=True) is None
    instance.acquire(0.0)
    assert node.instances.begin_unload("a", "MadeRoom", key=instance.key, only_if_idle=True) is None
    assert instance.state is State.READY
    assert instance.acquire(0.0), "a refused eviction leaves it open"
    instance.release(1.0, duration_s=1.0, ok=True)
    instance.release(1.0, duration_s=1.0, ok=True)
    assert node.instances.begin_unload("a", "MadeRoom", key=instance.key, only_if_idle=True)


def test_a_successor_takes_over_the_room_when_it_is_back(node: Changes) -> None:
    old = node.serve("a", 60.0)
    new = spec("a", trusted=True)
    assert node.instances.begin_unload("a", "Recreate", successor=Successor(new, "cpu", 101.0)) is (
        None
    )
    assert old.state is State.READY, "what would not fit even then touches nothing"
    assert node.instances.begin_unload("a", "Recreate", successor=Successor(new, "cpu", 70.0))
    assert node.instances.claim_close(old)
    following = node.instances.gone(old)
    assert following is not None
    assert (following.spec, following.state, node.used_mb) == (new, State.LOADING, 70.0)


def test_a_successor_that_no_longer_fits_is_a_failed_load(node: Changes) -> None:
    old = node.serve("a", 60.0)
    new = spec("a", trusted=True)
    node.instances.begin_unload("a", "Recreate", successor=Successor(new, "cpu", 70.0))
    node.instances.set_limits({"cpu": 50.0}, 3)
    node.instances.claim_close(old)
    assert node.instances.gone(old) is None
    outcome = node.instances.snapshot().outcomes["a"]
    assert (outcome.spec, outcome.reason) == (new, "InsufficientMemory")


def test_a_cancelled_successor_is_not_loaded(node: Changes) -> None:
    old = node.serve("a")
    node.instances.begin_unload("a", "Recreate", successor=Successor(spec("a"), "cpu", 10.0))
    node.instances.cancel_successor("a")
    node.instances.claim_close(old)
    assert node.instances.gone(old) is None
    assert node.used_mb == 0.0


def test_lowered_limits_keep_what_is_resident_and_refuse_what_is_new(node: Changes) -> None:
    node.serve("a", 60.0)
    node.instances.set_limits({"cpu": 50.0}, 1)
    assert "a" in node.instances.table.by_model
    assert node.instances.add(spec("b"), Owner.DIRECTORY, "cpu", 1.0) is None


def test_adjusting_replaces_the_spec_of_the_same_version_only(node: Changes) -> None:
    instance = node.serve("a")
    before = node.instances.table
    adjusted = spec("a", priority=3, endpoint="front")
    assert node.instances.adjust("a", adjusted)
    assert instance.spec is adjusted
    assert node.instances.table.by_endpoint["front"] == (instance,)
    assert "front" not in before.by_endpoint, "a table that somebody holds does not change"
    assert not node.instances.adjust("a", spec("a", trusted=True))
    assert not node.instances.adjust("b", spec("b"))
    assert instance.spec is adjusted


def test_get_prefers_the_one_that_serves_else_the_newest(node: Changes) -> None:
    assert node.instances.get("a") is None
    serving = node.serve("a")
    loading = node.load("a")
    assert node.instances.get("a") is serving
    node.instances.fail(loading, broken())
    node.instances.begin_unload("a", "Requested")
    assert node.instances.get("a") is loading


def test_illegal_edges_are_refused(node: Changes) -> None:
    instance = node.serve("a")
    with pytest.raises(IllegalTransition):
        node.instances.gone(instance)
    with pytest.raises(IllegalTransition):
        node.instances.abandon(node.load("b"))
