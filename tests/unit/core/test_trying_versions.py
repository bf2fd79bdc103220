"""A version that is tried, where two things happen to it at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.rollout import Verdict
from splitlearn_manager.errors import SplitlearnError, WorkerDied
from support.fakes import Bench, FakeRunning, model

DEADLINE_S = 20.0
STEPS = [{"percent": p, "for_s": 60} for p in (5, 20, 50)]
Tell = Callable[[SplitlearnError], None]


class Tried(Bench):
    """A manager with a model of which a new version is tried.

    Attributes:
        tell: tells that the new version's process has ended.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        told: list[Tell] = []
        monkeypatch.setattr(FakeRunning, "when_ended", lambda running, tell: told.append(tell))
        for generation, keys in [(1, {}), (2, {"trusted": True})]:
            config = model("m", rollout={"canary": STEPS, "min_requests": 0}, **keys)
            spec = ModelSpec.of(config, weights="w0", generation=generation)
            assert self.manager.begin_load(spec, Owner.DIRECTORY, "cpu", 10.0)
            self.executor.run_all()
        self.version: ManagedModel = next(
            i for i in self.manager._instances.all() if i.trial is not None
        )
        self.tell = told[-1]


def test_one_whose_process_ends_as_it_takes_over_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen to fail, with a dead process that serves, when it is only taken back."""
    tried = Tried(monkeypatch)
    instances = tried.manager._instances
    at_fail, has_taken_over = threading.Event(), threading.Event()
    ready, fail = instances.ready, instances.fail
    dying = threading.Thread(target=lambda: tried.tell(WorkerDied("it has ended")))

    def late_fail(*arguments: Any, **keys: Any) -> bool:
        at_fail.set()
        assert has_taken_over.wait(DEADLINE_S)
        return fail(*arguments, **keys)

    def ready_meanwhile(*arguments: Any) -> ManagedModel | None:
        dying.start()
        assert at_fail.wait(DEADLINE_S)
        old = ready(*arguments)
        has_taken_over.set()
        dying.join(DEADLINE_S)
        return old

    monkeypatch.setattr(instances, "ready", ready_meanwhile)
    monkeypatch.setattr(instances, "fail", late_fail)
    tried.manager.order_rollout("m", Verdict.TAKE_OVER)
    tried.manager.tick()
    assert not dying.is_alive()
    assert tried.version.state is State.UNLOADING
    assert "m" not in tried.manager.table.by_model


def test_two_that_look_at_the_same_time_begin_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python callers that wait keep the time-outs going too. Seen to fail when each begins one."""
    tried = Tried(monkeypatch)
    instances = tried.manager._instances
    next_step, looked = instances.next_step, []

    def after_another(*arguments: Any, **keys: Any) -> bool:
        if not looked:
            looked.append(True)
            tried.manager.tick()
        return next_step(*arguments, **keys)

    monkeypatch.setattr(instances, "next_step", after_another)
    tried.clock.advance(60.0)
    tried.manager.tick()
    assert looked
    assert tried.version.trial is not None
    assert (tried.version.trial.step, tried.version.trial.percent) == (1, 20.0)
