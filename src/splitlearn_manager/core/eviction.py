"""Admission: whether a model may be loaded now, and which residents make room for it.

The rule, in order:
1. It fits beside all that is reserved: admitted.
2. It fits once memory that is being freed at this moment is back: it waits, and nobody else goes.
   (So one eviction never causes another.)
3. Idle, unpinned residents may go: those of lower priority, and those of equal priority if requests wait
   for the newcomer, or their last use is older than its acceptance. Least priority first, then least
   recently used, and only as many as are needed. Who was loaded a moment ago is spared (`residency`).
4. Otherwise it is refused, with what it needs, what there is, and who holds it.
A device under pressure is left out: others have taken its memory, and `relief` says who goes for them.

Each step looks at all the devices that the model may go to before the next one is tried: a model that
fits on the CPU evicts nobody from a GPU. Which of several devices it is, `placement` says.

A model for which no request waits has a claim to the room of those alone that nobody has used since its
file was accepted. That makes the resident set stable: a model that was evicted has no claim until somebody
asks for it, so nothing is ever swapped back and forth without requests.

Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from splitlearn_manager.core.ledger import Ledger, Shortfall
from splitlearn_manager.core.placement import by_number, by_room, placed_on


@dataclass(frozen=True, slots=True)
class Resident:
    """An instance that holds memory, as admission sees it.

    Attributes:
        mb: its reservation, in MB.
        last_used_s: on the manager's monotonic clock.
        evictable: READY, idle, unpinned, and owned by somebody for whom the newcomer may evict.
        freeing: UNLOADING, so its memory will be back without anybody's doing; not if that takes too long.
        holding: for the refusal's message: why it stays (`in use`, `pinned`, …).
        busy: it would be evictable if no request used it.
        safe_until_s: until then newcomers that spare others spare it.
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
    busy: bool = False
    safe_until_s: float = -inf


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A model that wants room.

    Attributes:
        devices: where it may go, in any order.
        mb: what it will take, in MB.
        demanded_s: when it was accepted, on the clock of `Resident.last_used_s`.
        replaces: key of its own instance whose memory comes back before the load (recreate), or None.
        may_evict: False to ask whether it fits without anybody's going.
        asked_for: requests wait for it at this moment.
        spares_at_s: the time now, to spare those whose `safe_until_s` is later; None spares nobody.
        takes_busy: True to ask who would go if those in use were idle.
    """

    model_id: str
    devices: tuple[str, ...]
    mb: float
    priority: int
    demanded_s: float
    replaces: str | None = None
    may_evict: bool = True
    asked_for: bool = False
    spares_at_s: float | None = None
    takes_busy: bool = False


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


def admit(ledger: Ledger, residents: Sequence[Resident], request: AdmissionRequest) -> Decision:
    """Decides by the rule above."""
    if not request.devices:
        return Refused("DeviceNotFound", f"no device for model {request.model_id!r}")
    pressed = [device for device in request.devices if ledger.under_pressure(device)]
    if request.replaces is not None:
        ledger = ledger.without((request.replaces,))
    devices = by_room(ledger, request.devices)
    if not devices:
        known = ", ".join(sorted(ledger.budgets_mb)) or "none"
        wanted = " or ".join(by_number(request.devices))
        return Refused("DeviceNotFound", f"device {wanted} is not on this node (it has: {known})")

    devices, left_out = (
        tuple(device for device in devices if (device in pressed) is is_pressed)
        for is_pressed in (False, True)
    )
    if (device := placed_on(ledger, devices, request.mb)) is not None:
        return Admitted(device)
    freeing = [r for r in residents if r.freeing and r.key in ledger.reservations]
    after = ledger.without(r.key for r in freeing)
    if (device := placed_on(after, devices, request.mb)) is not None:
        return AwaitRoom(device, tuple(sorted({r.model_id for r in freeing})))
    if request.may_evict and (room := _make_room(after, devices, request, residents)) is not None:
        return room
    device = _most_able(ledger, (*devices, *left_out), request.mb)
    if device in left_out:
        return Refused("MemoryPressure", pressure_in_words(ledger, device, request.mb))
    return _refusal(ledger, device, residents, request)


def _make_room(
    ledger: Ledger,
    devices: Sequence[str],
    request: AdmissionRequest,
    residents: Sequence[Resident],
) -> MakeRoom | None:
    """Who goes, on the first device on which enough may go; None if there is none.

    Where only places are missing, the room that victims leave may make another device the better one.
    The device that is named is the one that the model will really go to once they are gone.
    """
    options = [
        MakeRoom(device, victims)
        for device in devices
        if (victims := _victims(ledger, device, request, residents)) is not None
    ]
    for option in options:
        then = ledger.without(r.key for r in option.victims)
        if placed_on(then, devices, request.mb) == option.device:
            return option
    return options[0] if options else None


def _most_able(ledger: Ledger, devices: Sequence[str], mb: float) -> str:
    """The device to tell of in a refusal: one that could hold the model if it were empty, or the largest."""
    could = (d for d in devices if mb <= ledger.budgets_mb[d])
    return next(could, max(devices, key=lambda d: ledger.budgets_mb[d]))


def may_displace(request: AdmissionRequest, resident: Resident) -> bool:
    """Whether `resident` may be evicted for the newcomer."""
    may_go = resident.evictable or (request.takes_busy and resident.busy)
    if not may_go or resident.model_id == request.model_id:
        return False
    if request.spares_at_s is not None and request.spares_at_s < resident.safe_until_s:
        return False
    if resident.priority != request.priority:
        return resident.priority < request.priority
    return request.asked_for or resident.last_used_s < request.demanded_s


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
) -> Refused:
    def holders(of_device: bool) -> str:
        names = [
            f"{r.model_id} {r.mb:,.0f} MB" + (f" ({r.holding})" if r.holding else "")
            for r in sorted(residents, key=lambda r: (-r.mb, r.model_id, r.key))
            if not of_device or r.device == device
        ]
        return ", ".join(names) or ("those that come first" if ledger.reservations else "nobody")

    if ledger.shortfall(device, request.mb).mb > 0:
        budget, limit = ledger.budgets_mb[device], ledger.limit_mb(device)
        if limit < budget and request.mb <= budget:
            return Refused(
                "MemoryPressure",
                f"needs {request.mb:,.0f} MB on {device}, where {ledger.ceilings[device]}: models may "
                f"take {limit:,.0f} MB of their {budget:,.0f} MB, and "
                f"{max(0.0, ledger.free_mb(device)):,.0f} MB are left; held by: {holders(True)}",
            )
        if request.mb > budget:
            return Refused(
                "InsufficientMemory",
                f"needs {request.mb:,.0f} MB on {device}, where all models together may take "
                f"{budget:,.0f} MB; held by: {holders(True)}",
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


def pressure_in_words(ledger: Ledger, device: str, mb: float) -> str:
    """Why nothing is loaded on a device under pressure."""
    ceiling = ledger.ceilings[device]
    if (excess := ledger.excess_mb(device)) > 0:
        short = f"models hold {excess:,.0f} MB more than is left for them"
    else:
        short = "processes stand still because memory is short"
    return f"needs {mb:,.0f} MB on {device}, where {ceiling}, and {short}; no load begins before that is over"
