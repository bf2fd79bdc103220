"""The loop: look at desired and observed state, plan, act; again when something may have changed.

Level-triggered: a turn looks at everything and decides afresh. Events from the file system, the
manager or a request only end the wait between turns. A turn never blocks on a load, an unload or a
request: it starts operations and looks at their outcome in a later turn.

What was accepted is written down before it is acted on. A turn that finds all as it was plans and tells
nothing, and the directory is looked at the less often the longer a look takes, unless something says
that it has changed.

What the loop remembers between turns is in `memory`, what people asked of it in `orders`, what outlives
the process in `keeping`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.rollout import Verdict
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredState, Instructions, Source
from splitlearn_manager.errors import ModelUnavailable
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.acting import Told, carry_out, next_turn_s
from splitlearn_manager.reconcile.actions import Action, Demand, Observed, Plan, Wanted
from splitlearn_manager.reconcile.keeping import Keeper
from splitlearn_manager.reconcile.memory import Memory
from splitlearn_manager.reconcile.observation import Observation
from splitlearn_manager.reconcile.orders import Orders
from splitlearn_manager.reconcile.plan import plan
from splitlearn_manager.reconcile.record import HistoryEntry
from splitlearn_manager.reconcile.standing import Basis, Standing, basis_of
from splitlearn_manager.reconcile.status import Facts, NodeInfo, StatusBook
from splitlearn_manager.reconcile.store import Store
from splitlearn_manager.reconcile.telling import (
    Found,
    ProblemLog,
    SituationLog,
    facts_of,
    names_of,
    node_facts,
    with_views,
)
from splitlearn_manager.reconcile.waiters import Waiter
from splitlearn_manager.reconcile.wanting import Wishes

log = logging.getLogger(__name__)

# Looking at the directory takes at most half a percent of the time while nothing asks for it.
_LOOKS_SHARE = 200.0
_PREVIEW_LOOKS = 10


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn found and did.

    Attributes:
        plan: what was planned; in a turn that found all as it was, what was planned before.
        executed: actions that were started.
        took_s: how long the turn took.
        next_s: seconds until the next turn is due; None if only an event makes one due.
        settled: nothing to do, nothing under way, nothing unsettled in the directory.
        looked: whether the directory was looked at.
        changed: whether anything was found that was not so in the turn before.
    """

    desired: DesiredState
    plan: Plan
    executed: tuple[Action, ...]
    took_s: float
    next_s: float | None
    settled: bool
    looked: bool = True
    changed: bool = True


class Reconciler:
    """See the module's text.

    Attributes:
        status: what is told of the models and of the node.
        names: ids of the declared models by endpoint and by id, as of the last turn.
        converged: whether everything once was as declared, or as near to it as it could be.
        last_turn_s: when the last turn ended, on the clock.

    Args:
        source: desired state.
        manager: observed state, and the operations.
        store: keeps over a restart what must be; None keeps nothing.
        resync_s: longest time between two turns, and between two looks at the directory while a look
            takes less than half a percent of it.
        max_parallel_loads: most loads that this loop has under way at a time, those aside that have
            taken longer than `acting.TURN_S`.
        draw: uniform random numbers in [0, 1) for the jitter of retries.
        on_turn: called with each turn.
        on_error: called when a turn ended in an unexpected error.
        about: what the node's server says of itself, for the status; asked each turn.
    """

    def __init__(
        self,
        source: Source,
        manager: ModelManager,
        clock: Clock,
        *,
        store: Store | None = None,
        resync_s: float = 1.0,
        max_parallel_loads: int = 2,
        draw: Callable[[], float] = random.random,
        on_turn: Callable[[Turn], None] | None = None,
        on_error: Callable[[], None] | None = None,
        about: Callable[[], NodeInfo] = NodeInfo,
    ) -> None:
        self.resync_s = resync_s
        self.max_parallel_loads = max_parallel_loads
        self._source = source
        self._manager = manager
        self._clock = clock
        self._on_turn = on_turn or (lambda turn: None)
        self._on_error = on_error or (lambda: None)
        self._about = about
        self.status = StatusBook(clock.wall)
        self._memory = Memory(clock.now, draw)
        self._orders = Orders()
        self._keeper = Keeper(store, clock)
        self._wishes = Wishes(manager)
        self._problem_log = ProblemLog()
        self._situation_log = SituationLog()
        self._wake = threading.Condition()
        self._woken = True
        self._look_asked = True
        self._look_due_s = clock.now()
        self._stopping = False
        self._turns_begun = 0
        self._turn_ended = 0
        self._restored = False
        self._desired = DesiredState()
        self._wanted: Mapping[str, Wanted] = {}
        self._suspended: frozenset[str] = frozenset()
        self._standing: Standing | None = None
        self._demands: Mapping[str, Demand] = {}
        self._found: Found | None = None
        self._facts: list[Facts] = []
        self._told_views: tuple[InstanceView, ...] = ()
        self.names: Mapping[str, tuple[str, ...]] = {}
        self.converged = False
        self.last_turn_s: float | None = None
        manager.on_change(self._turn_due)
        manager.on_event(self._memory.event)

    def restore(self) -> None:
        """Takes over what an earlier process kept; to be called once, before the first turn."""
        self._restored = True
        record = self._keeper.load()
        self._source.restore([kept.accepted for kept in record.models.values()])
        suspended = [model_id for model_id, kept in record.models.items() if kept.suspended]
        self._orders.restore(suspended, record.confirmed_prune)
        for model_id, kept in record.models.items():
            if (spec := kept.to_go_back_to) is not None:
                self._memory.served[model_id] = spec
            if (attempt := kept.ended_rollout) is not None:
                self._memory.attempts[model_id] = attempt
            if kept.measured:
                self._manager.restore_measurements(model_id, kept.measured)
                self._memory.measured.add(model_id)

    # Waking and waiting.

    def wake(self) -> None:
        """Makes a turn due at once that looks at the directory. Any thread may call it; calls before
        the turn are one."""
        with self._wake:
            self._woken = self._look_asked = True
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
                turn = self.next_turn()
                if until(turn):
                    return
                if turn.next_s is not None:
                    delay_s = min(turn.next_s, self.resync_s)
            except Exception:
                message = (
                    "a bug ended this turn; models go on serving, and the next turn starts afresh"
                )
                log_event(log, logging.ERROR, "TurnFailed", message, exc_info=True)
                self._manager.hold(())  # for room that nobody is given as long as this goes on
                self._on_error()
            with self._wake:
                if not self._woken and not self._stopping:
                    self._wake.wait(delay_s)
                if self._stopping:
                    return
                self._woken = False

    @contextmanager
    def waiting_for(self, model_id: str, timeout_s: float, name: str = "") -> Iterator[None]:
        """Asks for a model that is evicted or pending, and waits until it serves, under that name if any.

        Until the end of the block it stays, so that who has waited can take a lease on it.
        Raises ModelUnavailable if it does not serve `timeout_s` later, fails to load, or loses the name.
        """
        waiter = self.join(model_id, timeout_s)
        try:
            self.wait_until_serves(model_id, waiter.deadline_s, name)
            yield
        finally:
            self.leave(waiter)

    def wait_until_serves(self, model_id: str, deadline_s: float, name: str = "") -> None:
        """Waits for a model that somebody has asked for with `join`.

        Raises ModelUnavailable if it does not serve by then, or fails to load.

        Args:
            name: what requests call it, the model or its endpoint. What serves may have that name only once
                it is updated; where the files give it the name no more, nothing is left to wait for.
        """
        with self._wake:
            while not self._serves(model_id, name):
                left = deadline_s - self._clock.now()
                phase = self.status.phases.get(model_id)
                comes = phase is not None and self.status.comes(model_id)
                if left <= 0 or not comes or self._stopping:
                    state = self.status.in_short(model_id) if phase is not None else "gone"
                    raise ModelUnavailable(f"model {model_id!r} is {state}; try again")
                if name and model_id not in self.names.get(name, ()):
                    raise ModelUnavailable(
                        f"model {model_id!r} is not called {name!r} any more; try again"
                    )
                self._wake.wait(left)

    def _serves(self, model_id: str, name: str) -> bool:
        table = self._manager.table
        is_called_so = not name or name in table.by_endpoint or name in table.by_model
        return is_called_so and model_id in table.by_model

    def is_over(self, waiter: Waiter) -> bool:
        """Whether its time is."""
        return self._clock.now() >= waiter.deadline_s

    @property
    def parked(self) -> tuple[str, ...]:
        """The ids of the models that are parked, the last one first, as of the last turn."""
        parked = dict(self._memory.parked)
        return tuple(sorted(parked, key=lambda model_id: -parked[model_id]))

    def has_served(self, model_id: str) -> bool:
        """Whether some version of the model has served, in this process or an earlier one."""
        return model_id in self._memory.served

    def join(self, model_id: str, timeout_s: float) -> Waiter:
        """Notes that a request waits for the model from now on, for `timeout_s` at most."""
        now = self._clock.now()
        waiter = self._memory.waiters.join(model_id, now, now + timeout_s)
        self._turn_due()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Notes that it does not wait any more."""
        self._memory.waiters.leave(waiter)
        self._turn_due()

    def wait_converged(self, give_up: Callable[[], bool]) -> bool:
        """Waits until everything once was as declared, as near as it could be.

        False if `give_up` says so (it is asked after every turn) or the loop was stopped.
        """
        with self._wake:
            self._wake.wait_for(lambda: self.converged or self._stopping or give_up())
        return self.converged

    def await_turn(self, timeout_s: float) -> bool:
        """Waits until a turn that began after this call has ended; False if none did in time."""
        with self._wake:
            wanted = self._turns_begun + 1
            self._wake.wait_for(lambda: self._turn_ended >= wanted or self._stopping, timeout_s)
            return self._turn_ended >= wanted

    def _turn_due(self) -> None:
        """Makes a turn due at once; the directory is looked at if that is due as well."""
        with self._wake:
            self._woken = True
            self._wake.notify_all()

    # What people ask for; in force from the next turn on.

    def suspend(self, model_id: str) -> str:
        """Leaves a model as it is until it is resumed; says what follows. Raises ModelNotFound."""
        return self._ordered(self._orders.suspend(model_id))

    def resume(self, model_id: str) -> str:
        """Ends a suspension; says what follows. Raises ModelNotFound."""
        return self._ordered(self._orders.resume(model_id))

    def retry(self, model_id: str) -> str:
        """Tries a failed load again at once; says what follows. Raises ModelNotFound."""
        now = self._clock.now()
        until_s = self._memory.failure_rate.limited(now).get(model_id)
        limited_s = until_s - now if until_s is not None else None
        attempt = self._memory.attempts.get(model_id)
        if attempt is not None and attempt.superseded and limited_s is None:
            attempt = None
        return self._ordered(self._orders.retry(model_id, attempt, limited_s))

    def promote(self, model_id: str) -> str:
        """Has a version that is rolled out take over at once. Raises SplitlearnError (`NoRollout`)."""
        version = self._manager.order_rollout(model_id, Verdict.TAKE_OVER)
        return self._ordered(f"{version} of {model_id} takes over")

    def abort(self, model_id: str) -> str:
        """Takes back a version that is rolled out. Raises SplitlearnError (`NoRollout`)."""
        version = self._manager.order_rollout(model_id, Verdict.TAKE_BACK)
        return self._ordered(
            f"{version} of {model_id} is taken back; it is not tried again before its file or "
            f"its weights change, or `retry {model_id}`"
        )

    def confirm_prune(self, digest: str) -> str:
        """Lets the models go that a prune guard holds; says which. Raises SplitlearnError (reason
        `NothingToConfirm` or `DigestMismatch`)."""
        return self._ordered(self._orders.confirm_prune(digest))

    def history(self, model_id: str) -> tuple[HistoryEntry, ...]:
        """The versions of a model that were accepted, oldest first; none if it is not known."""
        return self._keeper.history(model_id)

    def _ordered(self, answer: str) -> str:
        self.wake()
        return answer

    # A turn.

    def next_turn(self) -> Turn:
        """A turn as `run` makes it: it looks at the directory if that is due or was asked for."""
        with self._wake:
            look = self._look_asked or self._clock.now() >= self._look_due_s
        return self.turn(look=look)

    def turn(self, *, look: bool = True) -> Turn:
        """Looks, plans, starts what can start, and says when the next turn is due.

        Args:
            look: False goes by what the latest look at the directory gave.
        """
        began_s = self._clock.now()
        with self._wake:
            self._turns_begun += 1
            number = self._turns_begun
            look = look or self._found is None
            if look:
                self._look_asked = False
        for model_id in self._orders.take_retries():
            self._memory.retry(model_id)
        # A step that ends with this tick must not get past a suspension that was answered before it. Those
        # that were resumed go on once the directory has said whether their version is still wanted.
        self._manager.pause_rollouts(self._suspended | self._orders.suspended)
        tick_s = self._manager.tick()
        # Before what runs: whoever does not wait any more shows there as a lease, or as an answer.
        self._demands = self._memory.waiters.at(began_s)
        snapshot = self._manager.snapshot()
        for event in self._memory.learn(snapshot, self._wanted):
            self.status.record(event.model_id, event.reason, event.message)
        desired = self._look(began_s) if look else self._desired
        basis = basis_of(
            desired, snapshot, self._memory.revision, self.max_parallel_loads, self._demands
        )
        changed = self._standing is None or not self._standing.holds(basis, snapshot, began_s)
        changed = changed or (look and self._wishes.asks_again)
        found = self._decide(basis, snapshot, recheck=look) if changed else self._unchanged(look)
        turn = self._summary(found, began_s, tick_s, looked=look, changed=changed)
        self._publish(found, turn, snapshot)
        self.last_turn_s = self._clock.now()
        self._on_turn(turn)
        with self._wake:
            self.converged = self.converged or turn.settled
            self._turn_ended = number
            self._wake.notify_all()
        return turn

    def _look(self, now_s: float) -> DesiredState:
        """Looks at the source, and sets when the next look is due."""
        memory, orders = self._memory, self._orders
        running = (v.model_id for v in self._manager.snapshot().instances)
        asked = memory.waiters.at(now_s)
        instructions = Instructions(
            suspended=orders.suspended,
            confirmed_prune=orders.confirmed_prune,
            watched=frozenset((*running, *memory.attempts, *asked)),
        )
        desired = self._source.look(now_s, instructions)
        took_s = self._clock.now() - now_s
        pause_s = max(self.resync_s, _LOOKS_SHARE * took_s)
        if desired.next_check_s is not None:
            pause_s = min(pause_s, desired.next_check_s)
        self._look_due_s = now_s + took_s + pause_s
        orders.looked(desired, instructions.confirmed_prune)
        self._keeper.confirm(orders.confirmed_prune)
        self._suspended = instructions.suspended
        self._problem_log.say(desired)
        self._desired = desired
        return desired

    def _decide(self, basis: Basis, snapshot: Snapshot, *, recheck: bool) -> Found:
        """Plans, writes down what is accepted, and acts."""
        desired, memory = self._desired, self._memory
        measured = memory.take_measured()
        wanted = self._wishes.of(desired.models, measured)
        memory.supersede(wanted)
        running = (v.model_id for v in snapshot.instances)
        for model_id in memory.forget_all_but({*wanted, *desired.undecided, *running}):
            self._manager.forget(model_id)
        self._manager.pause_rollouts(self._suspended)
        self._keeper.take(desired, self._suspended, memory.served)
        self._keeper.take_outcomes(snapshot, memory.attempts)
        self._keeper.take_measurements({m: self._manager.measurements(m) for m in measured})
        self._keeper.save(recheck=recheck)
        observed = self._observed(snapshot, wanted)
        standing, now_s = self._standing, observed.now_s
        made = standing.plan_for(wanted, basis, snapshot, now_s) if standing is not None else None
        made = made or plan(wanted, observed)
        self._manager.tells_idle = made.awaits_idle
        self._manager.hold(made.held)
        told: list[Told] = []
        executed = carry_out(
            made,
            self._manager,
            snapshot,
            self.max_parallel_loads,
            observed.now_s,
            told.append,
        )
        self._standing = Standing(made, basis, wanted, snapshot)
        if wanted is not self._wanted or not self.names:
            self.names = names_of(wanted)
        self._wanted = wanted
        self._found = Found(desired, wanted, observed, made, executed, tuple(told))
        return self._found

    def _unchanged(self, looked: bool) -> Found:
        """What was found before."""
        assert self._found is not None
        self._keeper.save(recheck=looked)
        if self._found.executed or self._found.desired is not self._desired:
            self._found = replace(self._found, executed=(), told=(), desired=self._desired)
        return self._found

    def _summary(
        self, found: Found, began_s: float, tick_s: float | None, *, looked: bool, changed: bool
    ) -> Turn:
        now, desired = self._clock.now(), found.desired
        # What an earlier process had accepted is all there is to go by while the directory is away.
        known = desired.complete or (not desired.source_available and bool(desired.models))
        pending = not known or desired.next_check_s is not None
        instances = found.observed.snapshot.instances
        times = [
            self._standing.due_s if self._standing else None,
            self._keeper.due_s,
            next_turn_s(found.plan, found.executed, instances, now),
        ]
        if desired.next_check_s is not None:
            times.append(self._look_due_s)
        due = [at - now for at in times if at is not None]
        if tick_s is not None:
            due.append(tick_s)
        busy = any(v.under_way for v in instances)
        return Turn(
            desired=desired,
            plan=found.plan,
            executed=found.executed,
            took_s=now - began_s,
            next_s=max(0.0, min(due)) if due else None,
            settled=not pending and not found.plan.actions and not busy,
            looked=looked,
            changed=changed,
        )

    def _publish(self, found: Found, turn: Turn, snapshot: Snapshot) -> None:
        node = node_facts(
            found,
            self._about(),
            asked=self._suspended,
            settled=turn.settled,
            converged=self.converged or turn.settled,
            state_problem=self._keeper.problem,
        )
        facts = self._facts
        if turn.changed:
            facts = facts_of(found, self.status.entries)
        elif snapshot.instances != self._told_views:
            facts = with_views(facts, snapshot)
        if facts is not self._facts or node != self.status.node_facts:
            self.status.publish(facts, node, self._clock.now())
        for event in found.told:  # after the acceptance that they follow from
            self.status.record(*event)
        if turn.changed:
            self._situation_log.say(facts, self.status.moment)
        self._facts, self._told_views = facts, snapshot.instances

    def _observed(self, snapshot: Snapshot, wanted: Mapping[str, Wanted]) -> Observed:
        now = self._clock.now()
        return Observed(
            snapshot=snapshot,
            attempts=dict(self._memory.attempts),
            parked=dict(self._memory.parked),
            fallbacks=self._wishes.fallbacks(self._memory.served, wanted),
            limited=self._memory.failure_rate.limited(now),
            demands=self._demands,
            max_parallel_loads=self.max_parallel_loads,
            now_s=now,
        )

    # Planning without acting.

    def preview(
        self, settle_s: float, node: Observation | None = None, confirmed_prune: str = ""
    ) -> tuple[DesiredState, Plan]:
        """What a turn would do, without doing or writing any of it (dry run).

        Looks that are `settle_s` apart on a clock of their own stand for waiting, so a preview does not
        wait.

        Args:
            node: another process's node, to plan for that one; None plans for this manager, with what
                the store kept.
            confirmed_prune: the digest of a prune guard, to plan for its confirmation.
        """
        if node is not None:
            self._source.restore(node.accepted())
            self._orders.restore(node.suspended(), "")
        elif not self._restored:
            self.restore()
        now = self._clock.now()
        instructions = Instructions(
            suspended=self._orders.suspended, confirmed_prune=confirmed_prune
        )
        desired = self._source.look(now, instructions)
        for _ in range(_PREVIEW_LOOKS):
            now += max(settle_s, desired.next_check_s or 0.0)
            desired = self._source.look(now, instructions)
            if desired.next_check_s is None:
                break
        wanted = self._wishes.of(desired.models)
        if node is None:
            self._manager.look_at_memory()
            return desired, plan(wanted, self._observed(self._manager.snapshot(), wanted))
        known = {m: node.as_known(w) for m, w in wanted.items()}
        return desired, plan(known, node.observed)

    def observe(self) -> Observation:
        """What planning needs to know of this node, as of the last turn. Any thread may ask."""
        found, wanted = self._found, self._wanted
        snapshot = self._manager.snapshot()
        observed = replace(
            found.observed if found is not None else Observed(snapshot),
            snapshot=snapshot,
            demands=self._memory.waiters.at(self._clock.now()),
            max_parallel_loads=self.max_parallel_loads,
            now_s=self._clock.now(),
        )
        measured = {m: self._manager.measurements(m) for m in wanted}
        return Observation.of(observed, wanted, measured, self._keeper.models)
