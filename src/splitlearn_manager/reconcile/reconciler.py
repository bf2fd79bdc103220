"""The loop: look at desired and observed state, plan, act; again when something may have changed.

Level-triggered: a turn looks at everything and decides afresh. Events from the file system, the
manager or a request only end the wait between turns. A turn never blocks on a load, an unload or a
request: it starts operations and looks at their outcome in a later turn.

What it remembers between turns is in `memory`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.model_reader import over_own_limit
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredModel, DesiredState, Source
from splitlearn_manager.errors import ModelUnavailable, OperationInProgress, SplitlearnError
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.actions import (
    Action,
    Mode,
    Observed,
    Plan,
    Verb,
    Waiting,
    Wanted,
)
from splitlearn_manager.reconcile.memory import Memory
from splitlearn_manager.reconcile.observation import Observation, with_held
from splitlearn_manager.reconcile.plan import plan
from splitlearn_manager.reconcile.status import Facts, Phase, StatusBook

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn found and did.

    Attributes:
        executed: actions that were started.
        took_s: how long the turn took.
        next_s: seconds until the next turn is due; None if only an event makes one due.
        settled: nothing to do, nothing under way, nothing unsettled in the directory.
    """

    desired: DesiredState
    plan: Plan
    executed: tuple[Action, ...]
    took_s: float
    next_s: float | None
    settled: bool


class Reconciler:
    """See the module's text.

    Attributes:
        names: ids of the declared models by endpoint and by id, as of the last turn.
        converged: whether everything once was as declared, or as near to it as it could be.
        last_turn_s: when the last turn ended, on the clock.

    Args:
        source: desired state.
        manager: observed state, and the operations.
        resync_s: longest time between two looks at the directory.
        max_parallel_loads: most loads that this loop has under way at a time.
        draw: uniform random numbers in [0, 1) for the jitter of retries.
        on_turn: called with each turn.
        on_error: called when a turn ended in an unexpected error.
    """

    def __init__(
        self,
        source: Source,
        manager: ModelManager,
        clock: Clock,
        *,
        resync_s: float = 1.0,
        max_parallel_loads: int = 2,
        draw: Callable[[], float] = random.random,
        on_turn: Callable[[Turn], None] | None = None,
        on_error: Callable[[], None] | None = None,
    ) -> None:
        self.resync_s = resync_s
        self.max_parallel_loads = max_parallel_loads
        self._source = source
        self._manager = manager
        self._clock = clock
        self._on_turn = on_turn or (lambda turn: None)
        self._on_error = on_error or (lambda: None)
        self.status = StatusBook(clock.wall)
        self._memory = Memory(clock.now, draw)
        self._problems: frozenset[str] = frozenset()
        self._latest_wanted: Mapping[str, Wanted] = {}
        self._wake = threading.Condition()
        self._woken = True
        self._stopping = False
        self.names: Mapping[str, tuple[str, ...]] = {}
        self.converged = False
        self.last_turn_s: float | None = None
        manager.on_change(self.wake)
        manager.on_event(self._memory.event)

    # Waking and waiting.

    def wake(self) -> None:
        """Makes a turn due at once. Any thread may call it; calls before the turn are one."""
        with self._wake:
            self._woken = True
            self._wake.notify_all()

    def stop(self) -> None:
        """Ends `run` after the turn that is under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def run(self, until: Callable[[Turn], bool] = lambda turn: False) -> None:
        """Turns until `stop`, or until a turn satisfies `until`.

        An unexpected error ends a turn, never the loop.
        """
        while True:
            delay_s: float | None = self.resync_s
            try:
                turn = self.turn()
                if until(turn):
                    return
                if turn.next_s is not None:
                    delay_s = min(turn.next_s, self.resync_s)
            except Exception:
                log.exception('event=TurnFailed msg="the next one starts afresh"')
                self._on_error()
            with self._wake:
                if not self._woken and not self._stopping:
                    self._wake.wait(delay_s)
                if self._stopping:
                    return
                self._woken = False

    def demand(self, model_id: str, timeout_s: float) -> None:
        """Asks for a model that is evicted or pending, and waits until it serves.

        Raises ModelUnavailable if it does not serve `timeout_s` later, or fails to load.
        """
        self._memory.ask_for(model_id)
        self.wake()
        deadline = self._clock.now() + timeout_s
        with self._wake:
            while model_id not in self._manager.table.by_model:
                left = deadline - self._clock.now()
                phase = self.status.phases.get(model_id)
                if left <= 0 or phase in (None, Phase.FAILED) or self._stopping:
                    raise ModelUnavailable(f"model {model_id!r} is {phase or 'gone'}; try again")
                self._wake.wait(left)

    def wait_converged(self, give_up: Callable[[], bool]) -> bool:
        """Waits until everything once was as declared, as near as it could be.

        False if `give_up` says so (it is asked after every turn) or the loop was stopped.
        """
        with self._wake:
            self._wake.wait_for(lambda: self.converged or self._stopping or give_up())
        return self.converged

    # A turn.

    def turn(self) -> Turn:
        """Looks, plans, starts what can start, and says when the next turn is due."""
        began_s = self._clock.now()
        tick_s = self._manager.tick()
        snapshot = self._manager.snapshot()
        happened = self._memory.learn(snapshot)
        desired = self._source.look(began_s)
        wanted = self._wanted_of(desired)
        for event in happened:
            self.status.record(event.model_id, event.reason, event.message)
        known = {*wanted, *(view.model_id for view in snapshot.instances)}
        for model_id in self._memory.forget_all_but(known):
            self._manager.forget(model_id)
        made = plan(wanted, self._observed(snapshot))
        executed = tuple(self._execute(made, snapshot))
        self._publish(desired, wanted, snapshot, made, executed)
        self._log_problems(desired)
        busy = any(v.state in (State.LOADING, State.UNLOADING) for v in snapshot.instances)
        turn = self._summary(desired, made, executed, busy, began_s, tick_s)
        self.last_turn_s = self._clock.now()
        self._on_turn(turn)
        with self._wake:
            self.converged = self.converged or turn.settled
            self._wake.notify_all()
        return turn

    def preview(
        self, settle_s: float, node: Observation | None = None
    ) -> tuple[DesiredState, Plan]:
        """What a turn would do, without doing any of it (dry run).

        Two looks stand for two that are `settle_s` apart, so a preview does not wait.

        Args:
            node: another process's node, to plan for that one; None plans for this manager.
        """
        now = self._clock.now()
        self._source.look(now)
        desired = self._source.look(now + settle_s)
        if node is None:
            wanted = self._wanted_of(desired)
            return desired, plan(wanted, self._observed(self._manager.snapshot()))
        desired = with_held(desired, node)
        wanted = {m: _as_known_to(node, w) for m, w in self._wanted_of(desired).items()}
        return desired, plan(wanted, node.observed)

    def observe(self) -> Observation:
        """What planning needs to know of this node, as of the last turn. Any thread may ask."""
        wanted = self._latest_wanted
        snapshot = self._manager.snapshot()
        return Observation(
            observed=self._observed(snapshot),
            demands={m: (w.spec.spec_hash, w.demanded_s) for m, w in wanted.items()},
            sizes_mb={m: (w.spec.spec_hash, w.mb) for m, w in wanted.items() if w.weights_ready},
            base_dirs={
                v.key: str(base) if (base := v.spec.config.base_dir) is not None else None
                for v in snapshot.instances
            },
            sources={m: w.source for m, w in wanted.items()},
        )

    def _observed(self, snapshot: Snapshot) -> Observed:
        return Observed(
            snapshot=snapshot,
            attempts=dict(self._memory.attempts),
            parked=dict(self._memory.parked),
            fallbacks=dict(self._memory.fallbacks),
            max_parallel_loads=self.max_parallel_loads,
            now_s=self._clock.now(),
        )

    def _wanted_of(self, desired: DesiredState) -> dict[str, Wanted]:
        return {model_id: self._wanted(model) for model_id, model in desired.models.items()}

    def _summary(
        self,
        desired: DesiredState,
        made: Plan,
        executed: tuple[Action, ...],
        busy: bool,
        began_s: float,
        tick_s: float | None,
    ) -> Turn:
        now = self._clock.now()
        waits = [w.until_s - now for w in made.waiting if w.until_s is not None]
        due = [s for s in (desired.next_check_s, tick_s, *waits) if s is not None]
        pending = not desired.complete or desired.next_check_s is not None
        settled = not pending and not made.actions and not busy
        next_s = max(0.0, min(due)) if due else None
        return Turn(desired, made, executed, now - began_s, next_s, settled)

    def _wanted(self, model: DesiredModel) -> Wanted:
        config = model.config
        spec = ModelSpec(
            config, model.spec_hash, model.load_hash, model.weights or "", model.generation
        )
        problem = model.weights_problem or ""
        mb, ready = 0.0, model.weights is not None
        if ready:
            try:
                mb = self._manager.size_mb(spec)
            except SplitlearnError as error:
                ready, problem = False, error.message
        return Wanted(
            spec=spec,
            mb=mb,
            devices=self._manager.devices_for(config),
            demanded_s=max(model.accepted_at, self._memory.demands.get(config.model_id, 0.0)),
            weights_ready=ready,
            weights_problem=problem,
            own_limit_problem=over_own_limit(config, mb),
            source=model.source.file,
        )

    # Acting.

    def _execute(self, made: Plan, snapshot: Snapshot) -> list[Action]:
        """Starts, in order, what can start now. What a check refuses is planned anew next turn."""
        loading = sum(v.state is State.LOADING for v in snapshot.instances)
        executed = []
        for action in made.actions:
            takes_turn = action.verb in (Verb.LOAD, Verb.UPDATE)
            if action.after or (takes_turn and loading >= self.max_parallel_loads):
                continue
            try:
                done = self._start(action, snapshot)
            except (OperationInProgress, ModelUnavailable) as refusal:
                log_event(log, logging.DEBUG, "ActionSkipped", str(refusal), model=action.model_id)
                continue
            if done:
                executed.append(action)
                loading += takes_turn
        return executed

    def _start(self, action: Action, snapshot: Snapshot) -> bool:
        manager, model_id = self._manager, action.model_id
        if action.verb is Verb.UNLOAD:
            return manager.begin_unload(model_id, action.reason, key=action.key)
        if action.verb is Verb.EVICT:
            return manager.begin_evict(model_id, action.key or "", action.reason)
        assert action.spec is not None
        if action.verb is Verb.ADJUST:
            return self._adjust(action, action.spec)
        if action.mode is Mode.RECREATE:
            return self._recreate(action, action.spec, snapshot)
        started = manager.begin_load(action.spec, Owner.DIRECTORY, action.device, action.mb)
        return started is not None

    def _adjust(self, action: Action, spec: ModelSpec) -> bool:
        done = self._manager.adjust(spec)
        if done:
            log_event(log, logging.INFO, "Adjusted", action.detail, model=action.model_id)
            self.status.record(action.model_id, "Adjusted", action.detail)
        return done

    def _recreate(self, action: Action, spec: ModelSpec, snapshot: Snapshot) -> bool:
        old = next((v for v in snapshot.instances if v.key == action.key), None)
        if old is None or not self._manager.begin_replace(spec, action.device, action.mb):
            return False
        self._memory.fallbacks[action.model_id] = Wanted(
            spec=old.spec,
            mb=old.reserved_mb,
            devices=(old.device,),
            demanded_s=self._clock.now(),
            source=action.source,
        )
        return True

    # Telling.

    def _publish(
        self,
        desired: DesiredState,
        wanted: Mapping[str, Wanted],
        snapshot: Snapshot,
        made: Plan,
        executed: tuple[Action, ...],
    ) -> None:
        views: dict[str, list[InstanceView]] = {}
        for view in snapshot.instances:
            views.setdefault(view.model_id, []).append(view)
        turns = _awaiting_turn(made, executed, self.max_parallel_loads)
        self.status.publish(
            [
                Facts(
                    model_id=model_id,
                    wanted=wanted.get(model_id),
                    views=tuple(views.get(model_id, ())),
                    attempt=self._memory.attempts.get(model_id),
                    parked=model_id in self._memory.parked,
                    waiting=made.waiting_for(model_id) or turns.get(model_id),
                    held=(desired.models[model_id].held or "") if model_id in wanted else "",
                    source_available=desired.source_available,
                )
                for model_id in sorted({*wanted, *views})
            ],
            self._clock.now(),
        )
        self._latest_wanted = wanted
        self.names = _names(wanted)

    def _log_problems(self, desired: DesiredState) -> None:
        """Says once, in one line each, what is wrong in the directory, and when it is well again."""
        problems = {str(problem) for problem in desired.problems}
        if not desired.source_available:
            problems.add(desired.source_message)
        for problem in sorted(problems - self._problems):
            log_event(log, logging.ERROR, "Problem", problem)
        for problem in sorted(self._problems - problems):
            log_event(log, logging.INFO, "Resolved", problem)
        self._problems = frozenset(problems)


def _awaiting_turn(
    made: Plan, executed: tuple[Action, ...], max_parallel_loads: int
) -> dict[str, Waiting]:
    """What is said of the models whose loads fit, and were not started for want of a slot."""
    message = f"{max_parallel_loads} models may be loaded at a time (max_parallel_loads)"
    return {
        action.model_id: Waiting(action.model_id, "AwaitingTurn", message)
        for action in made.actions
        if action.verb in (Verb.LOAD, Verb.UPDATE) and action not in executed
    }


def _as_known_to(node: Observation, wanted: Wanted) -> Wanted:
    """A wanted model with what a running node knows of that very spec."""
    model_id, spec_hash = wanted.spec.model_id, wanted.spec.spec_hash
    mb = node.size_mb(model_id, spec_hash)
    return replace(
        wanted,
        mb=wanted.mb if mb is None else mb,
        demanded_s=node.demanded_s(model_id, spec_hash, wanted.demanded_s),
    )


def _names(wanted: Mapping[str, Wanted]) -> Mapping[str, tuple[str, ...]]:
    """The declared models by every name that a request may use: endpoint or model id, endpoint first."""
    names: dict[str, list[str]] = {}
    for model_id in sorted(wanted):
        names.setdefault(wanted[model_id].spec.config.effective_endpoint, []).append(model_id)
    for model_id in sorted(wanted):
        names.setdefault(model_id, [model_id])
    return {name: tuple(ids) for name, ids in names.items()}
