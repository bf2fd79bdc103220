"""A turn of the loop: look at desired and observed state, plan, act, tell.

Level-triggered: a turn looks at everything and decides afresh, whatever made it due. It never blocks on a
load, an unload or a request: it starts operations and looks at their outcome in a later turn.

What was accepted is written down before it is acted on. A turn that finds all as it was plans and tells
nothing.

What is remembered between turns is in `memory`, what people asked of it in `orders`, what outlives the
process in `keeping`. When turns are made is the loop's business (`reconciler`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredState, Instructions, Source
from splitlearn_manager.reconcile.acting import Told, carry_out, next_turn_s
from splitlearn_manager.reconcile.actions import Action, Demand, Observed, Plan, Wanted
from splitlearn_manager.reconcile.keeping import Keeper
from splitlearn_manager.reconcile.memory import Memory
from splitlearn_manager.reconcile.observation import Observation
from splitlearn_manager.reconcile.orders import Orders
from splitlearn_manager.reconcile.plan import plan
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


class Turns:
    """See the module's text.

    Attributes:
        status: what is told of the models and of the node.
        names: ids of the declared models by endpoint and by id, as of the last turn.
        converged: whether everything once was as declared, or as near to it as it could be.

    Args:
        source: desired state.
        manager: observed state, and the operations.
        store: keeps over a restart what must be; None keeps nothing.
        resync_s: longest time between two turns, and between two looks at the directory while a look
            takes less than half a percent of it.
        max_parallel_loads: most loads that this loop has under way at a time, those aside that have
            taken longer than `acting.TURN_S`.
        draw: uniform random numbers in [0, 1) for the jitter of retries.
        about: what the node's server says of itself, for the status; asked each turn.
    """

    def __init__(
        self,
        source: Source,
        manager: ModelManager,
        clock: Clock,
        *,
        store: Store | None,
        resync_s: float,
        max_parallel_loads: int,
        draw: Callable[[], float],
        about: Callable[[], NodeInfo],
    ) -> None:
        self.resync_s = resync_s
        self.max_parallel_loads = max_parallel_loads
        self._source = source
        self._manager = manager
        self._clock = clock
        self._about = about
        self.status = StatusBook(clock.wall)
        self._memory = Memory(clock.now, draw)
        self._orders = Orders()
        self._keeper = Keeper(store, clock)
        self._wishes = Wishes(manager)
        self._problem_log = ProblemLog()
        self._situation_log = SituationLog()
        self._look_due_s = clock.now()
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

    # A turn.

    def _turn(self, *, look: bool) -> Turn:
        """Looks, plans, starts what can start, and says when the next turn is due.

        Args:
            look: False goes by what the latest look at the directory gave.
        """
        began_s = self._clock.now()
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
