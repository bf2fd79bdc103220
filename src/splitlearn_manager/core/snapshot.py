"""What runs at one moment, as values: what planning and admission look at.

Pure: nothing here changes, and nothing refers to a live instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitlearn_manager.core.eviction import Resident
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance at one moment. Times are on the manager's monotonic clock, sizes in MB."""

    key: str
    model_id: str
    owner: Owner
    state: State
    spec: ModelSpec
    device: str
    reserved_mb: float
    measured_mb: float | None
    leases: int
    last_used_s: float
    loading_since_s: float
    ready_since_s: float | None
    drain_overdue: bool
    notes: tuple[str, ...]
    warmed: bool
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How the latest load of a model ended. `serial` grows with every outcome of the node."""

    model_id: str
    serial: int
    spec: ModelSpec
    reason: str | None
    message: str
    terminal: bool
    at_s: float
    owner: Owner = Owner.DIRECTORY

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All instances at one moment, with the ledger and the latest outcome of each model."""

    instances: tuple[InstanceView, ...]
    ledger: Ledger
    outcomes: Mapping[str, LoadOutcome]


def residents(views: Sequence[InstanceView], newcomer: Owner) -> list[Resident]:
    """The instances as admission sees them, for a newcomer that `newcomer` asks for."""
    updating = {v.model_id for v in views if v.state is State.LOADING}

    def holding(view: InstanceView) -> str:
        if view.state is not State.READY:
            return view.state.lower()
        if view.spec.config.pinned:
            return "pinned"
        if view.leases:
            return "in use"
        if view.model_id in updating:
            return "being updated"
        if newcomer is Owner.DIRECTORY and view.owner is Owner.API:
            return "loaded through the Python API"
        return ""

    return [
        Resident(
            key=view.key,
            model_id=view.model_id,
            device=view.device,
            mb=view.reserved_mb,
            priority=view.spec.config.priority,
            last_used_s=view.last_used_s,
            evictable=not holding(view),
            freeing=view.state is State.UNLOADING,
            holding=holding(view),
        )
        for view in views
        if view.state is not State.GONE
    ]
