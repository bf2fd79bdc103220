"""The instances of a node: their states, the ledger and the routing table, behind one short lock.

Every method is a state transition or a look: it takes the lock for microseconds and starts nothing.
Loading, closing, waiting and user code are the model manager's, outside the lock. Requests never
come here: they read `table`, an immutable value that is swapped whole, and take a lease from the
instance they find in it.

What holds after every method:
- an instance holds a reservation from LOADING until GONE, and the ledger is never over its limits
  through a transition made here;
- of each model at most one instance is routed to (`current`), and at most one operation runs on it:
  a load (LOADING) or an unload (UNLOADING), those aside whose requests have not ended in time;
- `table` lists exactly the READY instances that grant leases; one that is held does not.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.eviction import AdmissionRequest, Decision, admit
from splitlearn_manager.core.ledger import Ceiling, Ledger
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State, check_edge
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.rollout import Trial
from splitlearn_manager.core.snapshot import InstanceView, LoadOutcome, Snapshot, residents
from splitlearn_manager.errors import (
    InsufficientMemory,
    OperationInProgress,
    SplitlearnError,
    TerminalLoadError,
)
from splitlearn_manager.routing.table import RoutingTable, Tried, build_table

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel


@dataclass(frozen=True, slots=True)
class Successor:
    """What is loaded in the place of an instance once its memory is back (update by recreate)."""

    spec: ModelSpec
    device: str
    mb: float


class Instances:
    """See the module's text. `on_change` is called outside the lock after every transition."""

    def __init__(self, ledger: Ledger, clock: Clock, on_change: Callable[[], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._instances: dict[str, ManagedModel] = {}
        self._current: dict[str, ManagedModel] = {}
        self._successors: dict[str, Successor] = {}
        self._outcomes: dict[str, LoadOutcome] = {}
        self._paused: frozenset[str] = frozenset()
        self._ledger = ledger
        self._serial = itertools.count(1)
        self.table: RoutingTable[ManagedModel] = build_table(())

    # Looks.

    def get(self, model_id: str) -> ManagedModel | None:
        """The instance that serves the model, else its newest one, else None."""
        with self._lock:
            if (current := self._current.get(model_id)) is not None:
                return current
            return next(
                (i for i in reversed(self._instances.values()) if i.model_id == model_id), None
            )

    def all(self) -> tuple[ManagedModel, ...]:
        with self._lock:
            return tuple(self._instances.values())

    def reserved_mb(self, instance: ManagedModel) -> float:
        held = self._ledger.reservations.get(instance.key)
        return held.mb if held else 0.0

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    def snapshot(self) -> Snapshot:
        with self._lock:
            return Snapshot(self._views(), self._ledger, dict(self._outcomes))

    def views(self) -> tuple[InstanceView, ...]:
        """The instances as they are at this moment."""
        with self._lock:
            return self._views()

    def decide(self, request: AdmissionRequest, newcomer: Owner) -> Decision:
        """What admission says of the request at this moment."""
        with self._lock:
            return admit(self._ledger, residents(self._views(), newcomer), request)

    # Transitions.

    def set_limits(self, budgets_mb: Mapping[str, float], max_models: int) -> None:
        with self._lock:
            self._ledger = self._ledger.with_limits(budgets_mb, max_models)
        self._on_change()

    def set_ceilings(self, ceilings: Mapping[str, Ceiling]) -> None:
        """What the devices really have by now; nothing happens if it is what was known."""
        with self._lock:
            if self._ledger.ceilings == ceilings:
                return
            self._ledger = self._ledger.with_ceilings(ceilings)
        self._on_change()

    def add(self, spec: ModelSpec, owner: Owner, device: str, mb: float) -> ManagedModel | None:
        """A new LOADING instance with a reservation of `mb`; None if it no longer fits.

        Raises OperationInProgress if an operation on the model has not ended.
        """
        with self._lock:
            self._refuse_if_occupied(spec.model_id)
            if self._ledger.shortfall(device, mb):
                return None
            instance = self._add(spec, owner, device, mb)
        self._on_change()
        return instance

    def ready(
        self,
        instance: ManagedModel,
        running: RunningModel,
        spec: ModelSpec,
        measured: Measurement | None = None,
    ) -> ManagedModel | None:
        """LOADING → READY: requests go to it from now on. Gives the old instance, which now drains.

        It reserves its weights and a forward of its largest batch; where there is room for the weights
        alone at the moment, those, until there is more (`adjust`): a model that is loaded already is not
        thrown away for what it takes while it answers. Raises OperationInProgress if the instance was
        given up meanwhile, LedgerError if what it measures does not fit its device's budget; in both
        cases nothing has changed.
        """
        now = self._clock.now()
        with self._lock:
            if instance.state is not State.LOADING:
                raise OperationInProgress(f"{instance.key} was given up")
            self._take(instance, running, spec, measured)
            instance.trial = None
            self._move(instance, State.READY)
            instance.ready_since_s = now
            instance.last_used_s = max(now, instance.last_used_s)
            instance.open_for_leases()
            old = self._current.get(instance.model_id)
            self._current[instance.model_id] = instance
            self._note_outcome(instance.owner, spec, None)
            self._publish()
            if old is not None:
                self._drain(old, "Replaced")
        self._on_change()
        return old

    def begin_trial(
        self,
        instance: ManagedModel,
        running: RunningModel,
        spec: ModelSpec,
        measured: Measurement | None,
    ) -> bool:
        """A LOADING instance is tried beside the version that serves; False if none does.

        It answers a share of the requests (or copies of them) from now on, and is LOADING until it takes
        over (`ready`) or is taken back (`fail`). Raises as `ready`.
        """
        with self._lock:
            if instance.state is not State.LOADING:
                raise OperationInProgress(f"{instance.key} was given up")
            old = self._current.get(instance.model_id)
            if old is None or old.spec.version == spec.version:
                return False
            self._take(instance, running, spec, measured)
            instance.trial = Trial(spec.config, self._clock.now(), old.traffic)
            instance.trial.paused = instance.model_id in self._paused
            instance.open_for_leases()
            self._publish()
        self._on_change()
        return True

    def serving(self, model_id: str) -> ManagedModel | None:
        """The READY instance that requests for the model go to."""
        with self._lock:
            return self._current.get(model_id)

    def next_step(self, instance: ManagedModel, *, after: int) -> bool:
        """The step of a trial begins that comes `after` that one; False if it is in another one by now."""
        with self._lock:
            if instance.trial is None or instance.trial.step != after:
                return False
            instance.trial.next_step(instance.config, self._clock.now(), instance.traffic)
            self._publish()
        self._on_change()
        return True

    def pause_trials(self, model_ids: Collection[str]) -> bool:
        """Has the trials of these models go no further, those that begin later too, and all others go on.

        Says whether any was otherwise.
        """
        changed = False
        with self._lock:
            self._paused = frozenset(model_ids)
            for instance in self._instances.values():
                trial = instance.trial
                if trial is not None and trial.paused != (instance.model_id in model_ids):
                    trial.paused, changed = not trial.paused, True
        return changed

    def fail(
        self, instance: ManagedModel, error: SplitlearnError, *, is_outcome: bool = True
    ) -> bool:
        """LOADING → FAILED; False if it was given up before. Its reservation stays until `gone`.

        Args:
            is_outcome: False if nothing was found out about the version.
        """
        with self._lock:
            if instance.state is not State.LOADING:
                return False
            instance.error = error
            self._move(instance, State.FAILED)
            if instance.trial is not None:
                instance.trial = None
                instance.stop_leases()
                self._publish()
            if is_outcome:
                self._note_outcome(instance.owner, instance.spec, error)
        self._on_change()
        return True

    def died(self, instance: ManagedModel, error: SplitlearnError) -> bool:
        """READY → FAILED: it has ended by itself. False if it does not serve any more.

        It drains then: the requests inside it fail, and it is closed after them.
        """
        with self._lock:
            if instance.state is not State.READY:
                return False
            instance.error = error
            instance.unload_reason = error.reason
            self._move(instance, State.FAILED)
            instance.stop_leases()
            if self._current.get(instance.model_id) is instance:
                del self._current[instance.model_id]
            self._note_outcome(instance.owner, instance.spec, error)
            self._publish()
        self._on_change()
        return True

    def begin_unload(
        self,
        model_id: str,
        reason: str,
        *,
        key: str | None = None,
        only_if_idle: bool = False,
        successor: Successor | None = None,
    ) -> ManagedModel | None:
        """READY → UNLOADING for the instance that serves the model: it drains from now on.

        None, with nothing changed, if the model is not served, serves with another instance than
        `key`, or is in use although `only_if_idle`. With a `successor`, its load takes over the
        reservation when this one is back. Raises OperationInProgress while another runs.
        """
        with self._lock:
            instance = self._current.get(model_id)
            if instance is None or (key is not None and instance.key != key):
                return None
            self._refuse_if_occupied(model_id)
            if successor is not None:
                after = self._ledger.without((instance.key,))
                if after.shortfall(successor.device, successor.mb):
                    return None
            if only_if_idle and not instance.stop_leases_if_idle():
                return None
            del self._current[model_id]
            self._publish()
            self._drain(instance, reason)
            if successor is not None:
                self._successors[instance.key] = successor
        self._on_change()
        return instance

    def hold(self, keys: Collection[str]) -> None:
        """Lets exactly these READY instances take no new requests; nothing happens if that is so."""
        with self._lock:
            changed = [i for i in self._current.values() if i.held != (i.key in keys)]
            for instance in changed:
                instance.hold_leases(instance.key in keys)
            if changed:
                self._publish()
        if changed:
            self._on_change()

    def abandon(self, instance: ManagedModel) -> None:
        """FAILED → UNLOADING: the loader has come back, what it left is being given back."""
        with self._lock:
            self._move(instance, State.UNLOADING)
            instance.draining_since_s = self._clock.now()
        self._on_change()

    def claim_close(self, instance: ManagedModel) -> bool:
        """True for exactly one caller, once the instance drains and no lease is left."""
        with self._lock:
            if instance.state is not State.UNLOADING or instance.close_started:
                return False
            if not instance.idle:
                return False
            instance.close_started = True
            return True

    def return_close(self, instance: ManagedModel) -> None:
        """Whoever claimed the close could not start it: somebody else may."""
        with self._lock:
            instance.close_started = False

    def gone(self, instance: ManagedModel) -> ManagedModel | None:
        """UNLOADING → GONE: the reservation is back. Gives the successor's instance, now LOADING."""
        with self._lock:
            self._move(instance, State.GONE)
            instance.running = None
            self._ledger = self._ledger.release(instance.key)
            del self._instances[instance.key]
            successor = self._successors.pop(instance.key, None)
            following = None
            if successor is not None:
                if self._ledger.shortfall(successor.device, successor.mb):
                    self._note_outcome(
                        instance.owner,
                        successor.spec,
                        InsufficientMemory(
                            "the room was taken while the old version unloaded: limits were lowered, or "
                            "others use the memory"
                        ),
                    )
                else:
                    following = self._add(
                        successor.spec, instance.owner, successor.device, successor.mb
                    )
        self._on_change()
        return following

    def cancel_successor(self, model_id: str) -> None:
        """Forgets what was to be loaded after the model's unload."""
        with self._lock:
            for key in [k for k in self._successors if self._instances[k].model_id == model_id]:
                del self._successors[key]

    def adjust(self, model_id: str, spec: ModelSpec) -> bool:
        """Applies a spec of the same version in place, and reserves what it takes with that.

        False, with nothing changed, if another version serves, or the spec asks for larger batches than
        there is room for.
        """
        with self._lock:
            instance = self._current.get(model_id)
            if instance is None or instance.spec.version != spec.version:
                return self._adjust_tried(model_id, spec)
            if instance.measured is not None:
                mb = instance.measured.total_mb(spec.config.batch_size)
                if self._ledger.fits_resized(instance.key, mb):
                    self._ledger = self._ledger.resize(instance.key, mb)
                elif mb > instance.measured.total_mb(instance.config.batch_size):
                    return False
            instance.spec = spec
            self._publish()
        self._on_change()
        return True

    def _adjust_tried(self, model_id: str, spec: ModelSpec) -> bool:
        for instance in self._instances.values():
            trial = instance.trial
            if instance.model_id == model_id and trial is not None:
                if instance.spec.version != spec.version or spec.config.rollout is None:
                    return False
                instance.spec = spec
                trial.adopt(spec.config, self._clock.now(), instance.traffic)
                self._publish()
                return True
        return False

    def mark_drain_overdue(self, instance: ManagedModel) -> bool:
        """True the first time it is called for an instance that still has leases.

        It holds up no other operation on its model from now on. What was to be loaded in its place is the
        loop's to decide anew, which may have room for it elsewhere; nobody else would decide for Python's.
        """
        with self._lock:
            if instance.drain_overdue or instance.state is not State.UNLOADING or instance.idle:
                return False
            instance.drain_overdue = True
            if instance.owner is Owner.DIRECTORY:
                self._successors.pop(instance.key, None)
            return True

    def forget_outcome(self, model_id: str) -> None:
        """Drops what is remembered of a model that nobody wants any more."""
        with self._lock:
            self._outcomes.pop(model_id, None)

    # Under the lock.

    def _refuse_if_occupied(self, model_id: str) -> None:
        for instance in self._instances.values():
            if instance.model_id == model_id and self._is_under_way(instance):
                raise OperationInProgress(
                    f"model {model_id!r} is {instance.state}: one operation at a time"
                )

    def _is_under_way(self, instance: ManagedModel) -> bool:
        """As of `InstanceView`."""
        # A failed instance whose loader has not come back yet holds memory that nobody can give back.
        if instance.state is State.UNLOADING:
            return not instance.drain_overdue or instance.key in self._successors
        return instance.state is State.LOADING

    def _add(self, spec: ModelSpec, owner: Owner, device: str, mb: float) -> ManagedModel:
        key = f"{spec.model_id}#{next(self._serial)}"
        self._ledger = self._ledger.reserve(key, device, mb)
        instance = ManagedModel(
            key, spec, owner=owner, device=device, loading_since_s=self._clock.now()
        )
        self._instances[key] = instance
        return instance

    def _take(
        self,
        instance: ManagedModel,
        running: RunningModel,
        spec: ModelSpec,
        measured: Measurement | None,
    ) -> None:
        """The instance is what was loaded, and reserves what that takes. Raises LedgerError."""
        mb = running.memory_mb
        if measured is not None:
            mb = self._to_reserve(instance.key, mb, measured.total_mb(spec.config.batch_size))
        self._ledger = self._ledger.resize(instance.key, mb)
        instance.running = running
        instance.measured_mb = running.memory_mb
        instance.measured = measured
        instance.spec = spec

    def _to_reserve(self, key: str, weights_mb: float, total_mb: float) -> float:
        """The total, or what is held or the weights alone where there is no room for it now."""
        held = self._ledger.reservations[key]
        could_fit = total_mb <= self._ledger.budgets_mb.get(held.device, 0.0)
        if self._ledger.fits_resized(key, total_mb) or not could_fit:
            return total_mb
        return max(weights_mb, held.mb)

    def _move(self, instance: ManagedModel, state: State) -> None:
        check_edge(instance.state, state)
        instance.state = state

    def _drain(self, instance: ManagedModel, reason: str) -> None:
        self._move(instance, State.UNLOADING)
        instance.unload_reason = reason
        instance.draining_since_s = self._clock.now()
        instance.stop_leases()

    def _publish(self) -> None:
        self.table = build_table(
            ((i, i.config.effective_endpoint) for i in self._current.values() if not i.held),
            [
                Tried(i, i.trial.percent, i.trial.shadow)
                for i in self._instances.values()
                if i.trial is not None and i.model_id in self._current
            ],
        )

    def _note_outcome(self, owner: Owner, spec: ModelSpec, error: SplitlearnError | None) -> None:
        self._outcomes[spec.model_id] = LoadOutcome(
            model_id=spec.model_id,
            serial=next(self._serial),
            spec=spec,
            reason=error.reason if error else None,
            message=error.message if error else "",
            terminal=isinstance(error, TerminalLoadError),
            at_s=self._clock.now(),
            owner=owner,
        )

    def _views(self) -> tuple[InstanceView, ...]:
        return tuple(
            InstanceView(
                key=i.key,
                model_id=i.model_id,
                owner=i.owner,
                state=i.state,
                spec=i.spec,
                device=i.device,
                reserved_mb=self.reserved_mb(i),
                measured_mb=i.measured_mb,
                measured=i.measured,
                leases=i.in_flight,
                last_used_s=i.last_used_s,
                loading_since_s=i.loading_since_s,
                ready_since_s=i.ready_since_s,
                drain_overdue=i.drain_overdue,
                notes=i.notes,
                warmed=i.running.warmed if i.running else False,
                requests=i.requests,
                errors=i.errors,
                held=i.held,
                draining_since_s=i.draining_since_s,
                followed=i.key in self._successors,
                trial=i.trial.note if i.trial is not None else "",
            )
            for i in self._instances.values()
        )
