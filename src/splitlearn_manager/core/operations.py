"""What can be done with the models of a node; each operation starts something and returns.

What it promises:
- a load runs beside serving, in work of its own; one that fails, hangs or lies about its size
  disturbs nobody;
- a lease keeps its instance alive until the request has ended; an instance is closed when it drains
  and its last lease is back, never before;
- an update loads and warms the new version, switches, then drains the old one (surge), or drains and
  unloads the old one first where both do not fit (recreate).

It never decides which models are wanted: that is the reconciler's, or the caller's (`model_manager`).
The states and the lock are in `instances`; who makes room, in `eviction`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.clock import Clock, Executor, SystemClock, ThreadExecutor
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.instance_book import Successor
from splitlearn_manager.core.instance_work import InstanceWork, why_unloaded
from splitlearn_manager.core.instances import Instances
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.memory_watch import EVERY_S, MemoryWatch
from splitlearn_manager.core.model_files import ModelFiles
from splitlearn_manager.core.model_reader import ModelReader
from splitlearn_manager.core.placement import by_number
from splitlearn_manager.core.resource_manager import ResourceManager, budget_device
from splitlearn_manager.core.rollout import Verdict
from splitlearn_manager.core.snapshot import Snapshot
from splitlearn_manager.errors import (
    ModelNotFound,
    ModelUnavailable,
    RolloutSuperseded,
    SplitlearnError,
)
from splitlearn_manager.logs import log_event
from splitlearn_manager.routing.table import RoutingTable
from splitlearn_manager.runtime.system_memory import empty_caches

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import Runtime

log = logging.getLogger(__name__)

# Between reading the routing table and taking a lease the table may be swapped; the next read sees the
# new one. More rounds than this mean that the model is switched faster than a request can start.
_LEASE_ROUNDS = 1000


class Operations:
    """See the module's text. All arguments are optional and keyword-only.

    Args:
        max_models: most instances that hold memory at a time, the two of a surge included.
        resources: budgets of the devices; by default 80 % of what each has.
        runtime: where models run; by default in threads of this process.
        files: what is behind a model_path: sizes and fingerprints.
        clock, executor: time and threads; others for tests.

    Attributes:
        tells_idle: whether a model's becoming idle is told to the listeners of changes too.
    """

    def __init__(
        self,
        *,
        max_models: int = 5,
        resources: ResourceManager | None = None,
        runtime: Runtime | None = None,
        files: ModelFiles | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.resources = resources or ResourceManager()
        self._clock = clock or SystemClock()
        self._changed = threading.Condition()
        self._change_listeners: list[Callable[[], None]] = []
        self._event_listeners: list[Callable[[ManagerEvent], None]] = []
        self._closing = False
        self.tells_idle = False
        self._reader = ModelReader(runtime, files or ModelFiles())
        ledger = Ledger(self.resources.budgets_mb(), max_models)
        self._instances = Instances(ledger, self._clock, self._notify)
        self._memory = MemoryWatch(self.resources.readings, self._instances.views, self._clock)
        self._work = InstanceWork(
            self._instances, self._reader, executor or ThreadExecutor(), self._clock, self._report
        )

    def keep_compiled_in(self, directory: Path) -> None:
        """Names the directory for code that is compiled for models; to be called before the first load."""
        self._reader.cache_dir = directory

    # What others listen to.

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after every transition, outside all locks; it must return at once."""
        self._change_listeners.append(listener)

    def on_event(self, listener: Callable[[ManagerEvent], None]) -> None:
        """Calls `listener` with every event, outside all locks; it must return at once."""
        self._event_listeners.append(listener)

    # Looks.

    @property
    def table(self) -> RoutingTable[ManagedModel]:
        """The READY instances at this moment; an immutable value."""
        return self._instances.table

    def snapshot(self) -> Snapshot:
        """All instances, the ledger and the latest outcome of each model, at one moment."""
        return self._instances.snapshot()

    def size_mb(self, spec: ModelSpec) -> float:
        """What a load of the spec reserves, in MB: what it measured before, else the estimate, else 0.

        Raises WeightsNotFound if nothing is at its model_path.
        """
        return self._reader.size_mb(spec)

    def measured(self, spec: ModelSpec) -> Measurement | None:
        """What a load of that version measured, in this process or an earlier one; None if there was none."""
        return self._reader.measured(spec)

    def measurements(self, model_id: str) -> tuple[Measurement, ...]:
        """What loads of the model's versions measured, the latest load last: what to keep over a restart."""
        return self._reader.measurements(model_id)

    def restore_measurements(self, model_id: str, measurements: Sequence[Measurement]) -> None:
        """Takes over what an earlier process measured."""
        self._reader.restore(model_id, measurements)

    def devices_for(self, config: ModelConfig) -> tuple[str, ...]:
        """The devices that the config admits; admission places the model on one of them."""
        if config.device != "auto":
            return (budget_device(config.device),)
        return by_number(self._instances.ledger.budgets_mb)

    # What starts something.

    def begin_load(
        self, spec: ModelSpec, owner: Owner, device: str, mb: float
    ) -> ManagedModel | None:
        """Starts a load on a device with a reservation of `mb`; None if it does not fit any more.

        If another version serves, this is a surge: the new one takes its place once it is READY.
        Raises OperationInProgress while another operation on the model runs.
        """
        self._refuse_when_closing()
        instance = self._instances.add(spec, owner, device, mb)
        if instance is not None:
            self._work.load(instance)
        return instance

    def begin_replace(
        self, spec: ModelSpec, device: str, mb: float, *, key: str | None = None
    ) -> bool:
        """Starts an update by recreate: drain and unload what serves, then load `spec` in its room.

        False, with nothing touched, if nothing (or not `key`) serves the model, or the new version
        would not fit.
        """
        self._refuse_when_closing()
        instance = self._instances.begin_unload(
            spec.model_id, "Recreate", key=key, successor=Successor(spec, device, mb)
        )
        if instance is not None:
            self._work.close_if_drained(instance)
        return instance is not None

    def begin_unload(self, model_id: str, reason: str, *, key: str | None = None) -> bool:
        """Starts to drain and unload what serves the model; False if nothing (or not `key`) does."""
        instance = self._instances.begin_unload(model_id, reason, key=key)
        if instance is not None:
            self._work.close_if_drained(instance)
        return instance is not None

    def begin_evict(self, model_id: str, key: str, reason: str) -> bool:
        """As `begin_unload`, but only if that very instance is idle at this moment."""
        instance = self._instances.begin_unload(model_id, reason, key=key, only_if_idle=True)
        if instance is None:
            return False
        self._work.report(EventKind.EVICTED, instance, reason, f"evicted: {why_unloaded(reason)}")
        self._work.close_if_drained(instance)
        return True

    def hold(self, keys: Collection[str]) -> None:
        """Lets exactly these instances take no new requests: others wait for their room, and they are
        evicted once they are idle. Those that run go on."""
        self._instances.hold(keys)

    def adjust(self, spec: ModelSpec) -> bool:
        """Applies a spec that loads the same model in place; False if another version serves."""
        return self._instances.adjust(spec.model_id, spec)

    def cancel_rollout(self, model_id: str, key: str) -> bool:
        """Takes back a version that is tried because another one is wanted; False if it is not tried."""
        instance = self._tried(model_id)
        if instance is None or instance.key != key:
            return False
        why = RolloutSuperseded(f"model {model_id!r}: another version is wanted by now, or none")
        self._work.take_back(instance, why, is_outcome=False)
        return True

    def order_rollout(self, model_id: str, verdict: Verdict) -> str:
        """Has a version that is tried take over, or taken back, with the next tick; which, for people.

        Raises SplitlearnError (reason `NoRollout`) if none is.
        """
        instance = self._tried(model_id)
        if instance is None or (trial := instance.trial) is None:
            raise SplitlearnError(
                f"no version of {model_id!r} is being rolled out", reason="NoRollout"
            )
        trial.ordered = verdict
        self._notify()
        old = self._instances.serving(model_id)
        return instance.spec.named_beside(old.spec if old is not None else None)

    def pause_rollouts(self, model_ids: Collection[str]) -> None:
        """Has the rollouts of these models, and of no others, go no further; they may still be taken back."""
        if self._instances.pause_trials(model_ids):
            self._notify()

    def _tried(self, model_id: str) -> ManagedModel | None:
        return next(
            (i for i in self._instances.all() if i.model_id == model_id and i.trial is not None),
            None,
        )

    def forget(self, model_id: str) -> None:
        """Drops what is remembered of a model that nobody wants any more."""
        self._instances.forget_outcome(model_id)
        self._reader.forget(model_id)

    def set_limits(self, max_models: int) -> None:
        """Applies new limits (the budgets are the resource manager's) to what is loaded from now on."""
        self._instances.set_limits(self.resources.budgets_mb(), max_models)

    def tick(self) -> float | None:
        """Gives up loads past `load_timeout_s`, reports drains past `drain_timeout_s`, and looks at what
        memory others have left.

        Returns the seconds until it should be called again, or None while nothing is under way.
        """
        self.look_at_memory()
        pauses = [self._work.watch_time_limits(), self._memory.waits_s]
        if self._instances.ledger.pressed:
            pauses.append(EVERY_S)
        return min((pause for pause in pauses if pause is not None), default=None)

    def look_at_memory(self) -> None:
        """Reads what the devices really have left, unless that was read a moment ago."""
        if (ceilings := self._memory.look()) is not None:
            self._instances.set_ceilings(ceilings)

    # Leases.

    def lease(self, model_id: str) -> Lease:
        """A lease on the instance that serves the model, without waiting.

        Raises ModelNotFound if the manager does not know the id, ModelUnavailable if the model
        does not serve at the moment.
        """
        for _ in range(_LEASE_ROUNDS):
            instance = self._instances.table.by_model.get(model_id)
            if instance is None:
                break
            if (lease := self.try_lease(instance)) is not None:
                return lease
        known = self._instances.get(model_id)
        if known is None:
            raise ModelNotFound(f"no model {model_id!r} is loaded")
        raise ModelUnavailable(f"model {model_id!r} is {known.state}; try again")

    def try_lease(self, instance: ManagedModel) -> Lease | None:
        """A lease on this instance; None once it drains."""
        now = self._clock.now()
        return Lease(instance, now, self._release) if instance.acquire(now) else None

    def _release(self, lease: Lease) -> None:
        now = self._clock.now()
        instance = lease.instance
        drained = instance.release(
            now,
            duration_s=now - lease.started_s,
            ok=lease.ok,
            counts=lease.counts,
            plain=lease.plain,
        )
        if drained:
            self._work.close_if_drained(instance)
        if self.tells_idle and instance.idle:
            self._notify()

    def ran_out_of_memory(self, instance: ManagedModel, batch: int) -> None:
        """A batch found no memory: what it left is given back, and the largest batch halved.

        No request is refused for its size: a batch that failed may pass when others need less.
        """
        limit = instance.shrink_batches(batch)
        if limit is not None:
            message = (
                f"ran out of memory on a batch of {batch}; from now on requests are joined into batches of "
                f"at most {limit}"
            )
            self._work.report(EventKind.OUT_OF_MEMORY, instance, "OutOfMemory", message)
        empty_caches("mps" if instance.config.device == "mps" else instance.device)

    # Inside.

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise ModelUnavailable("the node is shutting down", reason="ShuttingDown")

    def _report(self, event: ManagerEvent) -> None:
        for listener in self._event_listeners:
            _tell(partial(listener, event))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for listener in self._change_listeners:
            _tell(listener)


def _tell(listener: Callable[[], None]) -> None:
    """Calls a listener; its errors are its own, and never those of a load or an unload."""
    try:
        listener()
    except Exception:
        log_event(log, logging.ERROR, "ListenerFailed", exc_info=True)
