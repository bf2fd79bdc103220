"""What must hold after every step, turn, load and transition; the package's text says which property when.

The checks look at the product's data and never at how it decides; what they compare with (budgets,
demands, failures, what is in memory) is counted by the simulation itself. The rules for desired state are
the oracle's; those for the end of an episode are in `rest`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from simulation.admission import check_evictions, check_updates
from simulation.machine import Broken
from simulation.models import fingerprint_now, weights_now
from simulation.node import Node
from simulation.pressure import check_pressure, check_promise
from simulation.retries import Retries
from simulation.sizes import Sizes
from simulation.words import action_words, plan_words
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.lifecycle import EDGES, Owner, State
from splitlearn_manager.desired.state import DesiredState
from splitlearn_manager.reconcile.actions import Action, Observed, Plan, Verb, Wanted
from splitlearn_manager.reconcile.plan import plan as real_plan
from splitlearn_manager.reconcile.turns import Turn

if TYPE_CHECKING:
    from simulation.episode import Episode

EPSILON = 1e-6
UNDECIDED_SETTLES = 20
"""For so many settle times what was accepted before a restart, and is not declared, is not loaded."""

_TURNED_OUT = ("InsufficientMemory", "OverMemoryLimit")
"""Why a load fails that has measured more than there is for it."""

OVERDUE_S = 5.0
"""How late a load may be given up: the loop is late at times."""


@dataclass
class Planned:
    """One planning: what went in, and what came out."""

    wanted: Mapping[str, Wanted]
    observed: Observed
    made: Plan


class Checks:
    """See the module's text. One for an episode; `new_process` after each start of the node.

    Attributes:
        peak_mb, surprises: most MB reserved on each device, and loads that measured something else than
            was reserved for them, those that failed for it included, since `watch_memory`.
        good: the spec of each declared model that served last, until it cannot be loaded itself.
        evicted: when a model was evicted, on the node's clock, unless it was loaded since.
        causes, shared_causes: what I12 allows actions for, by model and for all.
    """

    def __init__(self, episode: Episode, rng: Random) -> None:
        self._episode = episode
        self._rng = rng
        self.causes: Counter[str] = Counter()
        self.effects: Counter[str] = Counter()
        self.shared_causes = 0
        self.good: dict[str, Any] = {}
        self.sizes = Sizes()
        self.new_process()

    def new_process(self) -> None:
        self._beside: dict[str, str] = {}
        self._tried_since: dict[str, float] = {}
        self._paused_at: dict[str, float] = {}
        self.promoted: set[str] = set()
        self.retries = Retries()
        self.states: dict[str, State] = {}
        self.owners: dict[str, Owner] = {}
        self.surging: set[str] = set()
        self.last_used: dict[str, float] = {}
        self.last_count = 0
        self.watch_memory()
        self._promised_mb: dict[str, float] = {}
        self.planned: Planned | None = None
        self.evicted: dict[str, float] = {}
        self._least_settle_s = float("inf")
        self._began_known = self._episode.state_is_known
        self.sizes.new_process(state_is_known=self._began_known)

    def watch_memory(self) -> None:
        """From now on it is noted what is reserved at most, and whether a load measures something else."""
        self.peak_mb = dict(self.last_used)
        self.surprises = 0

    # After every step.

    def step(self, node: Node) -> None:
        table = node.manager._instances.table
        self._memory_is_held(node)
        self._leases(node)
        routed = {i.key for i in table.all}
        operations: Counter[str] = Counter()
        for instance in node.manager._instances._instances.values():
            state = instance.state
            # One whose requests take too long holds nothing up.
            drains = state is State.UNLOADING and not instance.drain_overdue
            if state is State.LOADING or drains:
                operations[instance.model_id] += 1
            if (state is State.READY and not instance.held) != (instance.key in routed):
                raise Broken("I16", f"{instance!r} is routed to: {instance.key in routed}")
        for model_id, count in operations.items():
            if count > 1:
                raise Broken("I16", f"{count} operations on {model_id} at a time")

    def _memory_is_held(self, node: Node) -> None:
        """I10: no memory is in use, or about to be, that nobody holds a reservation for."""
        held = node.manager._instances._ledger.reservations
        for running in node.lab.open:
            if running.key not in held:
                raise Broken("I10", f"{running.key} is in memory without a reservation")
            serves = self.states.get(running.key) is State.READY
            if serves and held[running.key].mb < running.memory_mb - EPSILON:
                message = f"{running.key} holds {running.memory_mb:g} MB, and less is reserved"
                raise Broken("I10", message)
        for item in node.executor.waiting:
            if item.key not in held:
                raise Broken("I10", f"{item.name} is under way without a reservation")

    def _leases(self, node: Node) -> None:
        """I20."""
        for request in node.requests:
            if request.lease is not None:
                running: Any = request.lease.instance.running
                if running is None or running.closed:
                    raise Broken("I20", f"{request.lease.instance!r} was closed under a request")

    # At every transition.

    def _within_limits(self, node: Node) -> None:
        """I10: above its limits a node is only where they were lowered, and then takes no more."""
        ledger = node.manager._instances._ledger
        used: dict[str, float] = {}
        for reservation in ledger.reservations.values():
            used[reservation.device] = used.get(reservation.device, 0.0) + reservation.mb
        for device, mb in used.items():
            limit = max(ledger.budgets_mb.get(device, 0.0), self.last_used.get(device, 0.0))
            if mb > limit + EPSILON:
                message = f"{mb:g} MB are reserved on {device}, which has {limit:g}"
                node.machine.violated("I10", message)
        count = len(ledger.reservations)
        if count > max(ledger.max_models, self.last_count):
            message = f"{count} instances hold memory, max_models is {ledger.max_models}"
            node.machine.violated("I10", message)
        self.last_used, self.last_count = used, count
        for device, mb in used.items():
            self.peak_mb[device] = max(mb, self.peak_mb.get(device, 0.0))

    def transition(self, node: Node) -> None:
        """I16: only legal edges; I11: under surge somebody is READY throughout."""
        self._within_limits(node)
        table = node.manager._instances.table.by_model
        violated = node.machine.violated
        alive = set()
        for key, instance in list(node.manager._instances._instances.items()):
            alive.add(key)
            before, now = self.states.get(key), instance.state
            if before is not now:
                if before is not None and now not in EDGES[before]:
                    violated("I16", f"{key}: {before} → {now}")
                if before is None and now is State.LOADING and instance.model_id in table:
                    self.surging.add(instance.model_id)
                if before is State.LOADING:
                    self.surging.discard(instance.model_id)
                    if now is State.READY and instance.model_id not in table:
                        violated("I11", f"{key} is READY and not routed to")
                self.states[key] = now
                self.owners[key] = instance.owner
        for model_id in self.surging:
            if model_id not in table:
                violated("I11", f"nothing serves {model_id} while its new version loads")
        for key in [k for k in self.states if k not in alive]:
            if self.states.pop(key) is not State.UNLOADING:
                violated("I16", f"{key} vanished")
            self.owners.pop(key, None)

    def event(self, node: Node, event: ManagerEvent) -> None:
        """I14, I19, what is loaded from what, and what I12 counts."""
        model_id = event.model_id
        instance = node.manager._instances._instances.get(event.key)
        if event.kind in (EventKind.UNLOADED, EventKind.EVICTED, EventKind.LOADING):
            self.effects[model_id] += 1
        if instance is None:
            return
        of_directory = instance.owner is Owner.DIRECTORY
        if event.kind is EventKind.LOADING and of_directory:
            why_not = self.retries.why_not_now(instance.spec, node.machine.t)
            if why_not is not None:
                node.machine.violated("I14", why_not)
            self.retries.begun(instance.spec)
            self._promised_mb[event.key] = _reserved_mb(node, instance)
            if (why_not := self.sizes.why_not(instance, _reserved_mb(node, instance))) is not None:
                node.machine.violated("I10", why_not)
            self._is_declared(node, model_id)
            check_promise(node, instance)
            self._weights_stood_still(node, instance)
            if model_id in node.manager.table.by_model:
                self._beside[event.key] = instance.spec.spec_hash
        elif event.kind is EventKind.ROLLOUT:
            self._tried_since.setdefault(event.key, node.machine.t)
        elif event.kind is EventKind.LOADED:
            was_tried = event.key in self._tried_since
            self._tried_for_long_enough(node, instance)
            if self._promised_mb.get(event.key) != _reserved_mb(node, instance):
                self.surprises += 1
            if of_directory and model_id in self._episode.oracle.managed:
                self.sizes.loaded(instance)
            self._loaded(node, instance, was_tried=was_tried)
        elif event.kind is EventKind.LOAD_FAILED:
            self.causes[model_id] += 1
            if event.reason in _TURNED_OUT:
                self.surprises += 1
            if of_directory:
                good = self.good.get(model_id)
                if good is not None and good.version == instance.spec.version:
                    del self.good[model_id]
                self.retries.failed(instance.spec, event.reason, node.machine.t)
        elif event.kind is EventKind.EVICTED:
            self.evicted[model_id] = node.clock.now()
            if instance.in_flight or (instance.config.pinned and of_directory):
                message = f"{instance!r} is evicted; pinned: {instance.config.pinned}"
                node.machine.violated("I19", message)

    def _tried_for_long_enough(self, node: Node, instance: Any) -> None:
        """I11: an update with a rollout takes over when it has been tried for its time, or is promoted.

        Never while its model is suspended, nor with answers that its rules do not allow.
        """
        rollout = instance.config.rollout
        began_with = self._beside.pop(instance.key, None)
        since = self._tried_since.pop(instance.key, None)
        promoted = instance.model_id in self.promoted
        self.promoted.discard(instance.model_id)
        if rollout is None or began_with != instance.spec.spec_hash or promoted:
            return  # other rules were given meanwhile, or there was nothing to be tried beside
        tried_s = node.machine.t - since if since is not None else 0.0
        due_s = sum(stage.for_s for stage in rollout.stages)
        if instance.model_id in self._episode.oracle.suspended:
            node.machine.violated("I6", f"{instance.key} takes over, and its model is suspended")
        limit = instance.config.verify.max_difference if instance.config.verify else None
        apart = node.apart.get(instance.key, 0.0)
        if limit is not None and apart > limit:
            message = (
                f"{instance.key} takes over, whose answers are {apart:g} from the old version's"
            )
            node.machine.violated("I11", message)
        if since is None or tried_s < due_s - EPSILON:
            message = f"{instance.key} takes over after {tried_s:g} s of a rollout of {due_s:g} s"
            node.machine.violated("I11", message)

    def _is_declared(self, node: Node, model_id: str) -> None:
        """I5: what an earlier process had accepted is not loaded while it may be gone."""
        oracle = self._episode.oracle
        meant = oracle.may_mean.get(model_id)
        # A crash in the turn that wrote the suspension down leaves it open whether it counts.
        if meant is None or meant.value or model_id in oracle.ever_suspended:
            return
        if not self._began_known:
            return  # it may have been confirmed, or guarded, for all that anybody knows
        age_s = node.machine.t - node.started_at
        settle_s = min(self._least_settle_s, node.source.settle_s)
        if age_s < settle_s - EPSILON:
            is_doubtful = oracle.truth.whole.value[0] is not None
        else:
            # Not meant since the process began, by files of which each can be read and understood.
            is_doubtful = age_s < UNDECIDED_SETTLES * settle_s - EPSILON
            is_doubtful = is_doubtful and meant.since <= node.started_at and oracle.is_plain
            is_doubtful = is_doubtful and not any(model_id in ids for ids in oracle.guards.values())
        # A directory that cannot be looked at once is away: then all that is known is desired.
        if is_doubtful and node.machine.scan_faults == node.scan_faults_before:
            node.machine.violated("I5", f"{model_id} is loaded, and no file declares it")

    def _weights_stood_still(self, node: Node, instance: Any) -> None:
        """I7: no version of the weights is loaded that may still be on its way."""
        since = self._episode.world.weights.since(instance.config.model_path)
        least_s = min(self._least_settle_s, node.source.settle_s)
        if since is None or node.machine.t - since >= least_s - EPSILON:
            return
        if fingerprint_now(node.machine, instance.config) == instance.spec.weights:
            age_s = node.machine.t - since
            message = f"{instance!r} is loaded from weights that have been so for {age_s:.3f} s"
            node.machine.violated("I7", message)

    def _loaded(self, node: Node, instance: Any, *, was_tried: bool) -> None:
        """I18: what serves was made of the files as they are, or as they were before it was tried."""
        if instance.owner is Owner.DIRECTORY:  # Python's own load asks for nothing
            self.evicted.pop(instance.model_id, None)
        wanted = node.last.desired.models.get(instance.model_id) if node.last else None
        is_wanted = wanted is None or wanted.spec_hash == instance.spec.spec_hash
        self.retries.succeeded(instance.spec, is_wanted=is_wanted)
        if instance.owner is Owner.DIRECTORY and wanted is not None:
            self.good[instance.model_id] = instance.spec
        now = weights_now(node.machine, instance.config)
        if now is not None and instance.running.made_of != now and not was_tried:
            message = (
                f"{instance!r} is made of {instance.running.made_of!r}, its files hold {now!r}"
            )
            node.machine.violated("I18", message)

    # After every turn.

    def turn(self, node: Node, turn: Turn) -> None:
        planned, self.planned = self.planned, None
        self.sizes.turned(keeps_state=node.keeps_state)
        self._least_settle_s = min(self._least_settle_s, node.source.settle_s)
        self._in_planned_order(turn)
        for action in turn.executed:
            self._allowed(node, turn.desired, action)
            if action.verb in (Verb.LOAD, Verb.UPDATE) and action.spec is not None:
                self.retries.started(action.spec)
        self._given_up_in_time(node)
        if turn.changed:
            self.retries.check_counters(node.loop._memory.attempts, node.clock.now())
            if self._rng.random() < 0.5:
                self._ready_means_ready(node, turn)
        if planned is not None:
            if turn.executed or planned.made.held:
                check_evictions(planned.wanted, planned.observed, planned.made)
                check_updates(planned.wanted, planned.observed, planned.made)
            check_pressure(planned.wanted, planned.observed, planned.made)
            if turn.executed or self._rng.random() < 0.05:
                self._same_in_any_order(planned)

    def _in_planned_order(self, turn: Turn) -> None:
        """I17: what is executed is what was planned, in order."""
        rest = iter(turn.plan.actions)
        for action in turn.executed:
            if action not in rest:
                raise Broken(
                    "I17", f"{action_words(action)} was executed, and not planned, or not then"
                )

    def _allowed(self, node: Node, desired: DesiredState, action: Action) -> None:
        """I6: nothing desired is unloaded; nobody else's models are touched; suspended ones rest."""
        model_id = action.model_id
        if action.verb is Verb.UNLOAD and (
            model_id in desired.models or model_id in desired.undecided
        ):
            raise Broken("I6", f"{model_id} is desired, and was unloaded: {action_words(action)}")
        if action.key is not None and self.owners.get(action.key) is Owner.API:
            raise Broken(
                "I6", f"{model_id} was loaded through the Python API: {action_words(action)}"
            )
        model = desired.models.get(model_id)
        if model is not None and model.suspended and action.verb in (Verb.UPDATE, Verb.ADJUST):
            raise Broken("I6", f"{model_id} is suspended: {action_words(action)}")

    def _given_up_in_time(self, node: Node) -> None:
        """I3: no load hangs for ever."""
        for instance in node.instances:
            age = node.clock.now() - instance.loading_since_s
            rollout = instance.config.rollout if instance.trial is not None else None
            tried_s = sum(stage.for_s for stage in rollout.stages) if rollout is not None else 0.0
            longest_s = instance.config.load_timeout_s + tried_s + OVERDUE_S
            if instance.trial is not None and instance.trial.paused:
                # The time of its steps begins anew, at the latest, once it goes on.
                self._paused_at[instance.key] = node.clock.now()
            age = min(age, node.clock.now() - self._paused_at.get(instance.key, -math.inf))
            if instance.state is State.LOADING and age > longest_s:
                raise Broken("I3", f"{instance!r} has been loading for {age:g} s")

    def _ready_means_ready(self, node: Node, turn: Turn) -> None:
        """I18."""
        for described in node.loop.status.models():
            if described["owner"] != "directory":
                continue
            model_id = str(described["model_id"])
            ready = [c for c in described["conditions"] if c["type"] == "Ready"]
            if not ready or ready[0]["status"] != "True":
                continue
            model = turn.desired.models.get(model_id)
            if model is None or described["observed_generation"] != model.generation:
                raise Broken(
                    "I18",
                    f"{model_id} is said to be Ready at generation {described['generation']} and "
                    f"observed {described['observed_generation']}; accepted is "
                    f"{model.generation if model else None}",
                )

    def _same_in_any_order(self, planned: Planned) -> None:
        """I1."""
        wanted, observed = planned.wanted, planned.observed
        shuffled = _shuffled(self._rng, dict(wanted))
        views = list(observed.snapshot.instances)
        self._rng.shuffle(views)
        ledger = observed.snapshot.ledger
        again = real_plan(
            shuffled,
            replace(
                observed,
                snapshot=replace(
                    observed.snapshot,
                    instances=tuple(views),
                    ledger=replace(
                        ledger,
                        reservations=_shuffled(self._rng, dict(ledger.reservations)),
                        budgets_mb=_shuffled(self._rng, dict(ledger.budgets_mb)),
                    ),
                ),
            ),
        )
        if again.actions != planned.made.actions or again.waiting != planned.made.waiting:
            raise Broken(
                "I1",
                "the same in another order is planned differently: "
                f"{plan_words(planned.made)} and {plan_words(again)}",
            )

    def forget(self, model_id: str) -> None:
        """The model is desired no more: if it comes back, it is a new one."""
        self.good.pop(model_id, None)
        self.evicted.pop(model_id, None)
        self.sizes.forget(model_id)
        self.excuse(model_id)

    def excuse(self, model_id: str) -> None:
        """Something happened that lets the model be tried, or loaded, at once."""
        self.retries.excuse(model_id)

    # At the end.

    def no_flapping(self) -> None:
        """I12: actions on an id ≤ c × (accepted specs + faults + demands)."""
        for model_id, count in self.effects.items():
            causes = self.causes[model_id] + self.shared_causes
            if count > 3 * causes + 3:
                raise Broken("I12", f"{count} actions on {model_id} from {causes} causes")


def _reserved_mb(node: Node, instance: Any) -> float:
    return node.manager._instances._ledger.reservations[instance.key].mb


def _shuffled(rng: Random, of: dict[str, Any]) -> dict[str, Any]:
    keys = list(of)
    rng.shuffle(keys)
    return {key: of[key] for key in keys}
