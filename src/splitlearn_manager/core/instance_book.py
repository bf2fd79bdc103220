"""What a node knows of its instances: their states, the ledger and the routing table, behind one short lock.

Every look takes the lock for microseconds. Requests never come here: they read `table`, an immutable value
that is swapped whole, and take a lease from the instance they find in it. What changes the book is in
`instances`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.eviction import AdmissionRequest, Decision, admit
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State, check_edge
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.snapshot import InstanceView, LoadOutcome, Snapshot, residents
from splitlearn_manager.errors import (
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


class InstanceBook:
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

    def serving(self, model_id: str) -> ManagedModel | None:
        """The READY instance that requests for the model go to."""
        with self._lock:
            return self._current.get(model_id)

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
