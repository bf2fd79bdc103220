"""Admission: whether a model may be loaded now, and which residents make room for it.

The rule, in order:
1. It fits beside all that is reserved: admitted.
2. It fits once memory that is being freed at this moment is back: it waits, and nobody else goes.
   (So one eviction never causes another.)
3. Idle, unpinned residents may go: those of lower priority, and those of equal priority whose last use
   is older than the demand for the newcomer. Least priority first, then least recently used, and only
   as many as are needed.
4. Otherwise it is refused, with what it needs, what there is, and who holds it.

The demand of a model is the time of the oldest request that waits for it, or of the acceptance of its
file. Comparing it with the residents' last use makes the resident set stable: a model that was evicted
for a newer demand has no claim on the room until somebody asks for it, so nothing is ever swapped back
and forth without requests.

Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn_manager.core.ledger import Ledger, Shortfall


@dataclass(frozen=True, slots=True)
class Resident:
    """An instance that holds memory, as admission sees it.

    Attributes:
        mb: its reservation, in MB.
        last_used_s: on the manager's monotonic clock.
        evictable: READY, idle, unpinned, and owned by somebody for whom the newcomer may evict.
        freeing: UNLOADING, so its memory will be back without anybody's doing.
        holding: for the refusal's message: why it stays (`in use`, `pinned`, …).
    """

    key: str
    model_id: str
    device: str
    mb: float
    priority: int
    last_used_s: float
    evictable: bool
    freeing: bool
    holding: str = ""


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A model that wants room.

    Attributes:
        devices: where it may go, best first.
        mb: what it will take, in MB.
        demanded_s: time of the demand for it, on the clock of `Resident.last_used_s`.
        replaces: key of its own instance whose memory comes back before the load (recreate), or None.
        may_evict: False to ask whether it fits without anybody's going.
    """

    model_id: str
    devices: tuple[str, ...]
    mb: float
    priority: int
    demanded_s: float
    replaces: str | None = None
    may_evict: bool = True


@dataclass(frozen=True, slots=True)
class Admitted:
    """It fits on `device` now."""

    device: str


@dataclass(frozen=True, slots=True)
class AwaitRoom:
    """It will fit on `device` when the memory of `freeing` (model ids) is back."""

    device: str
    freeing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """It will fit on `device` once `victims` are unloaded."""

    device: str
    victims: tuple[Resident, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """There is no room, and none can be made. `reason` is that of the matching typed error."""

    reason: str
    message: str


Decision = Admitted | AwaitRoom | MakeRoom | Refused

# From best to worst, for choosing among devices.
_RANK: dict[type, int] = {Admitted: 0, AwaitRoom: 1, MakeRoom: 2, Refused: 3}


def admit(ledger: Ledger, residents: Sequence[Resident], request: AdmissionRequest) -> Decision:
    """Decides by the rule above, trying the devices in turn; an earlier device wins a tie."""
    if not request.devices:
        return Refused("DeviceNotFound", f"no device for model {request.model_id!r}")
    decisions = [_admit_on(device, ledger, residents, request) for device in request.devices]
    return min(decisions, key=lambda decision: _RANK[type(decision)])


def _admit_on(
    device: str, ledger: Ledger, residents: Sequence[Resident], request: AdmissionRequest
) -> Decision:
    if device not in ledger.budgets_mb:
        known = ", ".join(sorted(ledger.budgets_mb)) or "none"
        return Refused("DeviceNotFound", f"device {device} is not on this node (it has: {known})")
    if request.replaces is not None:
        ledger = ledger.without((request.replaces,))
    missing = ledger.shortfall(device, request.mb)
    if not missing:
        return Admitted(device)

    freeing = [r for r in residents if r.freeing and r.key in ledger.reservations]
    after = ledger.without(r.key for r in freeing)
    missing_after = after.shortfall(device, request.mb)
    if not missing_after:
        return AwaitRoom(device, tuple(sorted({r.model_id for r in freeing})))
    if request.may_evict:
        victims = _victims(after, device, request, residents)
        if victims is not None:
            return MakeRoom(device, victims)
    return _refusal(ledger, device, residents, request, missing)


def may_displace(request: AdmissionRequest, resident: Resident) -> bool:
    """Whether `resident` may be evicted for the newcomer."""
    if not resident.evictable or resident.model_id == request.model_id:
        return False
    if resident.priority != request.priority:
        return resident.priority < request.priority
    return resident.last_used_s < request.demanded_s


def _victims(
    ledger: Ledger, device: str, request: AdmissionRequest, residents: Sequence[Resident]
) -> tuple[Resident, ...] | None:
    """The fewest that are enough, in eviction order; None if all that may go are not enough."""

    def missing_without(gone: Sequence[Resident]) -> Shortfall:
        return ledger.without(r.key for r in gone).shortfall(device, request.mb)

    order = sorted(
        (r for r in residents if may_displace(request, r)),
        key=lambda r: (r.priority, r.last_used_s, r.key),
    )
    chosen: list[Resident] = []
    missing = missing_without(chosen)
    for resident in order:
        if not missing:
            break
        if missing.places > 0 or resident.device == device:
            chosen.append(resident)
            missing = missing_without(chosen)
    if missing:
        return None
    # A later, larger victim may have made an earlier one needless: spare whoever can be spared,
    # beginning with the one that would be missed most.
    for resident in reversed(chosen.copy()):
        rest = [r for r in chosen if r is not resident]
        if not missing_without(rest):
            chosen = rest
    return tuple(chosen)


def _refusal(
    ledger: Ledger,
    device: str,
    residents: Sequence[Resident],
    request: AdmissionRequest,
    missing: Shortfall,
) -> Refused:
    def holders(of_device: bool) -> str:
        names = [
            f"{r.model_id} {r.mb:,.0f} MB" + (f" ({r.holding})" if r.holding else "")
            for r in sorted(residents, key=lambda r: (-r.mb, r.model_id, r.key))
            if not of_device or r.device == device
        ]
        return ", ".join(names) or ("those that come first" if ledger.reservations else "nobody")

    if missing.mb > 0:
        budget = ledger.budgets_mb[device]
        if request.mb > budget:
            return Refused(
                "InsufficientMemory",
                f"needs {request.mb:,.0f} MB on {device}, where all models together may take "
                f"{budget:,.0f} MB",
            )
        return Refused(
            "InsufficientMemory",
            f"needs {request.mb:,.0f} MB on {device}, where {max(0.0, ledger.free_mb(device)):,.0f} of "
            f"{budget:,.0f} MB are free and no more can be freed; held by: {holders(True)}",
        )
    return Refused(
        "MaxModels",
        f"max_models is {ledger.max_models} and none of the loaded models may be evicted for it; "
        f"loaded: {holders(False)}",
    )
