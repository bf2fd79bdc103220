"""The state transitions of a node's instances.

Each is made under the book's one lock, held for microseconds, and starts nothing. Loading, closing, waiting
and user code are the model manager's, outside the lock.

What holds after every method:
- an instance holds a reservation from LOADING until GONE, and the ledger is never over its limits
  through a transition made here;
- of each model at most one instance is routed to (`current`), and at most one operation runs on it:
  a load (LOADING) or an unload (UNLOADING), those aside whose requests have not ended in time;
- `table` lists exactly the READY instances that grant leases; one that is held does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from splitlearn_manager.core.instance_book import InstanceBook, Successor
from splitlearn_manager.core.ledger import Ceiling
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.rollout import Trial
from splitlearn_manager.errors import (
    InsufficientMemory,
    OperationInProgress,
    SplitlearnError,
)

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel


class Instances(InstanceBook):
    """See the module's text."""

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

    def _adjust_tried(self, model_id: str, spec: ModelSpec) -> bool:
        """Under the lock: as `adjust`, for a version that is tried."""
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
