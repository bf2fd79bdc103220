"""What must hold while others have taken the memory of a device (I10, I19).

    plan     nothing begins to load on a device under pressure; who goes for it might go, was the next, was
             needed, and goes alone; and if somebody might go, somebody goes
    load     what others have had for a while is not promised to a model

Stated as conditions on the result. The figures are those that the node has read; whether it has read
rightly is told by the last of them, which compares with what others really use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from simulation.machine import Broken
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Action, Mode, Observed, Plan, Verb, Wanted

if TYPE_CHECKING:
    from simulation.node import Node

EPSILON_MB = 1e-6
SEEN_AFTER_S = 0.6
"""A reading is half a second old at most when something is decided by it."""
SHOWS_S = 10.0
"""Where processes stand still, so long the effect of an eviction is waited for."""


def limits_mb(ledger: Ledger) -> dict[str, float]:
    """Up to what may be reserved anew on each device: its budget, or what others leave."""
    found = dict(ledger.budgets_mb)
    for device, ceiling in ledger.ceilings.items():
        left = ceiling.total_mb - ceiling.floor_mb - ceiling.others_mb
        found[device] = min(found.get(device, 0.0), max(0.0, left))
    return found


def missing_mb(ledger: Ledger) -> dict[str, float]:
    """What is promised on each device and not there; a device where processes stand still is in it, too."""
    found: dict[str, float] = {}
    for device, ceiling in ledger.ceilings.items():
        held = sum(r.mb for r in ledger.reservations.values() if r.device == device)
        left = max(0.0, ceiling.total_mb - ceiling.floor_mb - ceiling.others_mb)
        if held > left or ceiling.stalled:
            found[device] = max(0.0, held - left)
    return found


def check_pressure(wanted: Mapping[str, Wanted], observed: Observed, made: Plan) -> None:
    """Raises Broken."""
    missing = missing_mb(observed.snapshot.ledger)
    evictions = [a for a in made.actions if a.reason == "MemoryPressure"]
    for action in evictions:
        if action.device not in missing:
            raise Broken("I19", f"{action.model_id} goes for others, who leave enough")
    for device, mb in missing.items():
        for action in made.actions:
            if action.device == device and _begins(action):
                message = f"{action.model_id} is loaded on {device}, which is under pressure"
                raise Broken("I10", message)
        gone = [a for a in evictions if a.device == device]
        _check_relief(wanted, observed, made, device, mb, gone)


def _begins(action: Action) -> bool:
    return action.verb is Verb.LOAD or (
        action.verb is Verb.UPDATE and action.mode is not Mode.RECREATE
    )


def _check_relief(
    wanted: Mapping[str, Wanted],
    observed: Observed,
    made: Plan,
    device: str,
    missing_mb: float,
    gone: list[Action],
) -> None:
    going = {a.key for a in made.actions if a.key and a not in gone and a.verb is not Verb.ADJUST}
    here = [v for v in observed.snapshot.instances if v.device == device]
    on_its_way = any(v.state is State.UNLOADING and not v.leases for v in here)
    on_its_way = on_its_way or any(v.key in going and not v.leases for v in here)
    may_go = {v.key: v for v in here if v.key not in going and _may_go(v, wanted, observed)}
    if len(gone) > 1:
        raise Broken("I19", f"{[a.model_id for a in gone]} go at once for others on {device}")
    if not gone:
        shown_s = max(observed.parked.values(), default=float("-inf")) + SHOWS_S
        waits = missing_mb <= 0 and observed.now_s < shown_s
        if may_go and not on_its_way and not waits:
            message = f"others take {device}, {sorted(may_go)} might go, and nobody goes"
            raise Broken("I19", message)
        return
    if on_its_way:
        message = f"{gone[0].model_id} goes, and memory of {device} is on its way back"
        raise Broken("I19", message)
    victim = may_go.get(str(gone[0].key))
    if victim is None:
        raise Broken("I19", f"{gone[0].model_id} goes for others, and might not go")
    _check_order(victim, may_go.values(), missing_mb, wanted)


def _may_go(view: InstanceView, wanted: Mapping[str, Wanted], observed: Observed) -> bool:
    known = wanted.get(view.model_id)
    if view.owner is not Owner.DIRECTORY or view.state is not State.READY or view.leases:
        return False
    if view.spec.config.pinned:
        return False
    if known is not None and (known.spec.config.pinned or known.suspended):
        return False
    answers = view.model_id in observed.demands and not view.held
    occupied = any(
        v.model_id == view.model_id
        and (v.state is State.LOADING or (v.state is State.UNLOADING and not v.drain_overdue))
        for v in observed.snapshot.instances
    )
    return view.reserved_mb > 0 and not answers and not occupied


def _check_order(
    victim: InstanceView,
    may_go: Collection[InstanceView],
    missing_mb: float,
    wanted: Mapping[str, Wanted],
) -> None:
    """Those that would be missed less stay only where the rest of what would go is enough without them."""

    def value(view: InstanceView) -> tuple[int, float, str]:
        known = wanted.get(view.model_id)
        config = view.spec.config if known is None else known.spec.config
        return (config.priority, view.last_used_s, view.key)

    needed: list[InstanceView] = []
    for view in sorted(may_go, key=value):
        if needed and sum(v.reserved_mb for v in needed) >= missing_mb:
            break
        needed.append(view)
    if victim not in needed:
        raise Broken("I19", f"{victim.key} goes for others, and others would be missed less")
    rest = sum(v.reserved_mb for v in needed if value(v) >= value(victim))
    if victim is not min(needed, key=value) and rest < missing_mb - EPSILON_MB:
        message = f"{victim.key} goes for others, and one that would be missed less has to go, too"
        raise Broken("I19", message)


def check_promise(node: Node, instance: Any) -> None:
    """I10: a load begins. Raises Broken if it is promised what others have had for a while."""
    device, now = instance.device, node.machine.t
    others = node.lab.others
    total_mb = node.resources.totals_mb.get(device)
    if total_mb is None or now - others.since.get(device, 0.0) < SEEN_AFTER_S:
        return
    neighbours = [i for i in node.instances if i.device == device and i is not instance]
    if any(not _is_calm(i, node.clock.now()) for i in neighbours):
        return  # how much of its memory it holds already nobody can tell
    ledger = node.manager._instances._ledger
    held = sum(r.mb for r in ledger.reservations.values() if r.device == device)
    slack = max(4.0, total_mb / 256)
    if held + others.mb.get(device, 0.0) > total_mb + slack + EPSILON_MB:
        raise Broken(
            "I10",
            f"{instance.key} is loaded on {device}: {held:g} MB are promised to models, and others "
            f"have {others.mb[device]:g} of its {total_mb:g} MB",
        )


def check_others_are_gone(node: Node) -> None:
    """I3: once nobody else uses a device any more, the node knows it."""
    for device, ceiling in node.manager._instances._ledger.ceilings.items():
        if ceiling.stalled or ceiling.others_mb > max(4.0, ceiling.total_mb / 256) + EPSILON_MB:
            raise Broken("I3", f"nobody else uses {device}, and the node thinks: {ceiling}")


def _is_calm(instance: Any, now_s: float) -> bool:
    since = instance.ready_since_s
    return instance.state is State.READY and since is not None and now_s - since > SEEN_AFTER_S
