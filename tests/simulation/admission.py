"""I19: whether the evictions of a plan were allowed, in the right order, and needed.

Stated as conditions on the result, not as a way to find it: each victim might go; without any of them
the newcomer would not fit; and all that would be missed less than the most valued victim would not have
been enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from simulation.machine import Broken
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Action, Mode, Observed, Plan, Verb, Wanted

EPSILON_MB = 1e-6


@dataclass(frozen=True)
class Room:
    """What is taken when it is a newcomer's turn: reservations that stay, and those promised."""

    taken: Mapping[str, tuple[str, float]]
    budgets_mb: Mapping[str, float]
    max_models: int

    def fits(self, device: str, mb: float, without: Collection[str]) -> bool:
        left = [where for key, where in self.taken.items() if key not in without]
        used = sum(size for on, size in left if on == device)
        free = self.budgets_mb.get(device, 0.0) - used
        return len(left) + 1 <= self.max_models and mb <= free + EPSILON_MB


def check_evictions(wanted: Mapping[str, Wanted], observed: Observed, made: Plan) -> None:
    """Raises Broken if an eviction that makes room was not as it must be."""
    if not any(a.verb is Verb.EVICT and a.reason == "MadeRoom" for a in made.actions):
        return
    views = {v.key: _as_wanted(v, wanted) for v in observed.snapshot.instances}
    ledger = observed.snapshot.ledger
    going = {v.key for v in views.values() if v.state is State.UNLOADING}
    going |= {
        a.key
        for a in made.actions
        if a.key and (a.verb in (Verb.UNLOAD, Verb.UPDATE) or a.reason == "Idle")
    }
    promised = {
        f"{a.model_id} (update)": (a.device, a.mb) for a in made.actions if a.verb is Verb.UPDATE
    }
    loads = [a for a in made.actions if a.verb is Verb.LOAD]
    kept = {m for m, w in wanted.items() if w.suspended}
    for load in sorted(loads, key=lambda a: _turn(wanted, observed, a)):
        victims = _victims_for(load, made)
        taken = {k: (r.device, r.mb) for k, r in ledger.reservations.items() if k not in going}
        room = Room({**taken, **promised}, ledger.budgets_mb, ledger.max_models)
        if victims:
            newcomer = _newcomer(load, wanted, observed)
            stay = _Staying(kept, {v.model_id for v in views.values() if _loads(v)}, going)
            _check_group(load, newcomer, [views[key] for key in victims], views, stay, room)
        going |= set(victims)
        promised[f"{load.model_id} (load)"] = (load.device, load.mb)


def check_updates(wanted: Mapping[str, Wanted], observed: Observed, made: Plan) -> None:
    """Raises Broken if an update was of nothing, or took away what could have stayed meanwhile (I11)."""
    views = {view.key: view for view in observed.snapshot.instances}
    ledger = observed.snapshot.ledger
    for update in made.actions:
        if update.verb is not Verb.UPDATE or update.spec is None:
            continue
        model_id = update.model_id
        if views[str(update.key)].spec.version == update.spec.version:
            raise Broken("I12", f"{model_id} is updated to what it is")
        setting = update.spec.config.update
        if update.mode is not Mode.RECREATE or setting == "recreate":
            continue
        if setting == "surge":
            raise Broken("I11", f"{model_id} has update: surge, and is recreated")
        others = {
            f"{a.model_id} ({a.verb})": (a.device, a.mb)
            for a in made.actions
            if a.verb in (Verb.UPDATE, Verb.LOAD) and a is not update
        }
        taken = {key: (r.device, r.mb) for key, r in ledger.reservations.items()}
        room = Room({**taken, **others}, ledger.budgets_mb, ledger.max_models)
        if any(room.fits(device, update.mb, ()) for device in wanted[model_id].devices):
            raise Broken("I11", f"{model_id} is recreated, and its new version fits beside the old")


def _as_wanted(view: InstanceView, wanted: Mapping[str, Wanted]) -> InstanceView:
    """Priority counts as it is declared now; pinned is who is, or has been until now."""
    known = wanted.get(view.model_id)
    if known is None or view.owner is not Owner.DIRECTORY:
        return view
    now, before = known.spec.config, view.spec.config
    if now.priority == before.priority and now.pinned == before.pinned:
        return view
    changes = {"priority": now.priority, "pinned": now.pinned or before.pinned}
    config = before.model_copy(update=changes)
    return replace(view, spec=replace(view.spec, config=config))


def _newcomer(load: Action, wanted: Mapping[str, Wanted], observed: Observed) -> Wanted:
    """The wanted version, or what served before it and is loaded again."""
    assert load.spec is not None
    found = wanted[load.model_id]
    if found.spec.version == load.spec.version:
        return found
    return observed.fallbacks[load.model_id]


def _turn(
    wanted: Mapping[str, Wanted], observed: Observed, load: Action
) -> tuple[bool, int, float, str]:
    """Where a load stands in line: what failed last, higher priority first, the latest demand first."""
    assert load.spec is not None
    attempt = observed.attempts.get(load.model_id)
    failed = attempt is not None and attempt.concerns(load.spec)
    demanded_s = _newcomer(load, wanted, observed).demanded_s
    return (failed, -wanted[load.model_id].spec.config.priority, -demanded_s, load.model_id)


def _victims_for(load: Action, made: Plan) -> list[str]:
    return [
        a.key
        for a in made.actions
        if a.verb is Verb.EVICT
        and a.reason == "MadeRoom"
        and a.key
        and a.detail == f"makes room for {load.model_id}"
    ]


@dataclass(frozen=True)
class _Staying:
    """Who does not go, whatever comes: ids that are suspended or being updated, keys that go already."""

    suspended: Collection[str]
    updating: Collection[str]
    going: Collection[str]

    def why(self, view: InstanceView) -> str | None:
        if view.state is not State.READY or view.key in self.going:
            return f"{view.state}, or going already"
        if view.spec.config.pinned:
            return "pinned"
        if view.leases:
            return "in use"
        if view.owner is not Owner.DIRECTORY:
            return "Python's"
        if view.model_id in self.updating:
            return "being updated"
        return "suspended" if view.model_id in self.suspended else None


def _loads(view: InstanceView) -> bool:
    return view.state is State.LOADING


def _check_group(
    load: Action,
    newcomer: Wanted,
    victims: list[InstanceView],
    views: Mapping[str, InstanceView],
    stay: _Staying,
    room: Room,
) -> None:
    assert load.spec is not None
    priority = load.spec.config.priority
    for victim in victims:
        why_not = stay.why(victim)
        if why_not is None and victim.spec.config.priority > priority:
            why_not = "of higher priority"
        if why_not is None and not _may_go(victim, newcomer, priority):
            why_not = "used since the newcomer was asked for"
        if why_not is not None:
            raise Broken("I19", f"{victim.key} goes for {load.model_id}, and is {why_not}")
    keys = {v.key for v in victims}
    if not room.fits(load.device, load.mb, keys):
        raise Broken("I19", f"{sorted(keys)} go for {load.model_id}, which does not fit even then")
    for key in keys:
        if room.fits(load.device, load.mb, keys - {key}):
            raise Broken("I19", f"{key} goes for {load.model_id}, which fits without that")
    worst = max(_value(v) for v in victims)
    lesser = {
        v.key
        for v in views.values()
        if stay.why(v) is None and _value(v) < worst and _may_go(v, newcomer, priority)
    }
    if room.fits(load.device, load.mb, lesser):
        message = f"for {load.model_id}, {sorted(lesser)} would have been enough, not {keys}"
        raise Broken("I19", message)


def _may_go(view: InstanceView, newcomer: Wanted, priority: int) -> bool:
    theirs = view.spec.config.priority
    return theirs < priority or (theirs == priority and view.last_used_s < newcomer.demanded_s)


def _value(view: InstanceView) -> tuple[int, float, str]:
    return (view.spec.config.priority, view.last_used_s, view.key)
