"""What runs at one moment, as values: what planning and admission look at.

Pure: nothing here changes, and nothing refers to a live instance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from splitlearn_manager.core.eviction import Resident
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.residency import safe_until_s


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance at one moment. Times are on the manager's monotonic clock, sizes in MB.

    Attributes:
        reserved_mb: while it is READY, what it holds and what a forward of its largest batch takes, or
            less of the latter as long as there is no room for it.
        measured_mb: its weights: what it holds while no request runs. None before it is READY, or tried.
        measured: all that its load measured, and what was estimated before; None until then, too.
        held: it takes no new requests for the time being, because others wait for its room.
        trial: how far it has come, while it is LOADING and tried beside the version that serves; else empty.
        followed: another version is loaded in its place as soon as its memory is back.
    """

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
    measured: Measurement | None = None
    held: bool = False
    draining_since_s: float | None = None
    followed: bool = False
    trial: str = ""

    @property
    def under_way(self) -> bool:
        """Whether no other operation on its model begins before this one has ended.

        Requests inside one that drains may never end. Once they have taken too long it holds its memory and
        its place, and nothing else up.
        """
        drains = self.state is State.UNLOADING and (self.followed or not self.drain_overdue)
        return drains or self.state is State.LOADING


_OPERATIONS = {
    State.LOADING: "being updated",
    State.UNLOADING: "its former version still drains",
}
"""Why what serves a model cannot be unloaded: another operation on the model has not ended."""


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


def residents(
    views: Sequence[InstanceView], newcomer: Owner, awaited: Collection[str] = ()
) -> list[Resident]:
    """The instances as admission sees them, for a newcomer that `newcomer` asks for.

    Args:
        awaited: ids of models that requests wait for: one that is READY now answers those before it goes.
    """
    under_way = {v.model_id: v.state for v in views if v.under_way}

    def kept(view: InstanceView) -> str:
        """Why it would stay if nobody used it."""
        if view.state is State.UNLOADING and view.drain_overdue:
            return "kept by requests that do not end"
        if view.state is not State.READY:
            return view.state.lower()
        if view.spec.config.pinned:
            return "pinned"
        if (state := under_way.get(view.model_id)) is not None:
            return _OPERATIONS[state]
        if newcomer is Owner.DIRECTORY and view.owner is Owner.API:
            return "loaded through the Python API"
        if view.model_id in awaited and not view.held:
            return "about to answer requests that waited for it"
        return ""

    def resident(view: InstanceView) -> Resident:
        stays = kept(view)
        in_use = view.state is State.READY and view.leases > 0
        late = view.drain_overdue and view.leases > 0
        return Resident(
            key=view.key,
            model_id=view.model_id,
            device=view.device,
            mb=view.reserved_mb,
            priority=view.spec.config.priority,
            last_used_s=view.last_used_s,
            evictable=not stays and not in_use,
            freeing=view.state is State.UNLOADING and not late,
            holding="in use" if in_use and stays != "pinned" else stays,
            busy=not stays and in_use,
            safe_until_s=safe_until_s(
                loading_since_s=view.loading_since_s,
                ready_since_s=view.ready_since_s,
                used=view.requests > 0 or view.leases > 0,
            ),
        )

    return [resident(view) for view in views if view.state is not State.GONE]
