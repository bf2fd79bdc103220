"""I19: whether the evictions of a plan were allowed, in the right order, and needed.

Who is to go once idle, and takes no new requests until then, is judged like who goes: but that it may be in
use, and that a request must have waited for it.

Stated as conditions on the result, not as a way to find it: each victim might go; without any of them
the newcomer would not fit; and all that would be missed less than the most valued victim would not have
been enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from simulation.machine import Broken
from simulation.pressure import limits_mb, missing_mb
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Action, Mode, Observed, Plan, Verb, Wanted

EPSILON_MB = 1e-6
STAY_S = 0.1
"""So long stays at least what was loaded and is used, and as long as its load took."""
PATIENCE_S = 1.0
"""So long a request waits for what is in use, unless half of its time is over before."""


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
    """Raises Broken if an eviction that makes room, or is to make it, was not as it must be."""
    makes_room = any(a.verb is Verb.EVICT and a.reason == "MadeRoom" for a in made.actions)
    if not makes_room and not made.held:
        return
    views = {v.key: _as_wanted(v, wanted) for v in observed.snapshot.instances}
    ledger = observed.snapshot.ledger
    going = {
        v.key
        for v in views.values()
        if v.state is State.UNLOADING and not (v.drain_overdue and v.leases)
    }
    going |= {
        a.key
        for a in made.actions
        if a.key and (a.verb in (Verb.UNLOAD, Verb.UPDATE, Verb.CANCEL) or a.reason == "Idle")
    }
    promised = {
        f"{a.model_id} (update)": (a.device, a.mb) for a in made.actions if a.verb is Verb.UPDATE
    }
    loads = [a for a in made.actions if a.verb is Verb.LOAD]
    loads += [_to_come(m, wanted, observed, made) for m in sorted(set(made.held.values()))]
    kept = {m for m, w in wanted.items() if w.suspended}
    for load in sorted(loads, key=lambda a: _turn(wanted, observed, a)):
        victims = _victims_for(load, made)
        taken = {k: where for k, where in _taken(observed, made).items() if k not in going}
        room = Room({**taken, **promised}, limits_mb(ledger), ledger.max_models)
        if victims:
            newcomer = _newcomer(load, wanted, observed)
            stay = _Staying(
                kept, {v.model_id for v in views.values() if _occupies(v)}, going, observed, load
            )
            if any(key in made.held for key in victims):
                _check_patience(load, observed)
                stay = replace(stay, use_counts=False)
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
        room = Room({**_taken(observed, made), **others}, limits_mb(ledger), ledger.max_models)
        devices = [d for d in wanted[model_id].devices if d not in missing_mb(ledger)]
        if any(room.fits(device, update.mb, ()) for device in devices):
            raise Broken("I11", f"{model_id} is recreated, and its new version fits beside the old")


def _taken(observed: Observed, made: Plan) -> dict[str, tuple[str, float]]:
    """What is reserved by whom, once larger or smaller batches are let in, before anything is loaded."""
    held = observed.snapshot.ledger.reservations
    taken = {key: (r.device, r.mb) for key, r in held.items()}
    for action in made.actions:
        if action.verb is Verb.ADJUST and action.key:
            taken[action.key] = (action.device, action.mb)
    return taken


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


def _to_come(model_id: str, wanted: Mapping[str, Wanted], observed: Observed, made: Plan) -> Action:
    """The load that those are held for; of the version that is loaded once they are gone."""
    (device,) = {
        v.device for v in observed.snapshot.instances if made.held.get(v.key) == model_id
    } or {""}
    attempt = observed.attempts.get(model_id)
    found = wanted[model_id]
    if attempt is not None and attempt.concerns(found.spec) and model_id in observed.fallbacks:
        blocked = attempt.blocks(found.spec, observed.now_s)
        found = observed.fallbacks[model_id] if blocked else found
    return Action(Verb.LOAD, model_id, "", spec=found.spec, device=device, mb=found.mb)


def _check_patience(load: Action, observed: Observed) -> None:
    demand = observed.demands.get(load.model_id)
    if demand is None:
        raise Broken("I19", f"requests are kept from others for {load.model_id}, which none wants")
    if observed.now_s < min(demand.oldest_s + PATIENCE_S, demand.urgent_s):
        waited_s = observed.now_s - demand.oldest_s
        message = f"requests are kept from others for {load.model_id} after {waited_s:g} s"
        raise Broken("I19", message)


def _turn(
    wanted: Mapping[str, Wanted], observed: Observed, load: Action
) -> tuple[bool, int, bool, float, str]:
    """Where a load stands in line: what failed last, higher priority first, then the longest wait of a
    request, then what was accepted last."""
    assert load.spec is not None
    attempt = observed.attempts.get(load.model_id)
    failed = attempt is not None and attempt.concerns(load.spec)
    demand = observed.demands.get(load.model_id)
    accepted_s = _newcomer(load, wanted, observed).accepted_s
    since = -accepted_s if demand is None else demand.oldest_s
    priority = wanted[load.model_id].spec.config.priority
    return (failed, -priority, demand is None, since, load.model_id)


def _victims_for(load: Action, made: Plan) -> list[str]:
    return [
        a.key
        for a in made.actions
        if a.verb is Verb.EVICT
        and a.reason == "MadeRoom"
        and a.key
        and a.detail == f"makes room for {load.model_id}"
    ] + sorted(key for key, model_id in made.held.items() if model_id == load.model_id)


@dataclass(frozen=True)
class _Staying:
    """Who does not go for a load: ids that are suspended, or have an operation under way, keys that go
    already, and who has its time, or is about to answer.

    Attributes:
        use_counts: who is in use stays.
    """

    suspended: Collection[str]
    occupied: Collection[str]
    going: Collection[str]
    observed: Observed
    newcomer: Action
    use_counts: bool = True

    def why(self, view: InstanceView) -> str | None:
        if view.state is not State.READY or view.key in self.going:
            return f"{view.state}, or going already"
        if view.spec.config.pinned:
            return "pinned"
        if view.leases and self.use_counts:
            return "in use"
        if view.owner is not Owner.DIRECTORY:
            return "Python's"
        if view.model_id in self.occupied:
            return "being updated, or its former version drains"
        if view.model_id in self.observed.demands and not view.held:
            return "about to answer requests that waited for it"
        if self._has_its_time(view):
            return "in the time that it was loaded for"
        return "suspended" if view.model_id in self.suspended else None

    def _has_its_time(self, view: InstanceView) -> bool:
        demand = self.observed.demands.get(self.newcomer.model_id)
        if demand is not None and self.observed.now_s >= demand.urgent_s:
            return False
        if view.ready_since_s is None or not (view.requests or view.leases):
            return False
        stays_s = max(STAY_S, view.ready_since_s - view.loading_since_s)
        return self.observed.now_s < view.ready_since_s + stays_s


def _occupies(view: InstanceView) -> bool:
    drains = view.state is State.UNLOADING and not view.drain_overdue
    return drains or view.state is State.LOADING


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
        if why_not is None and not _may_go(victim, newcomer, priority, stay):
            why_not = "used since the newcomer was accepted, which no request wants"
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
        if stay.why(v) is None and _value(v) < worst and _may_go(v, newcomer, priority, stay)
    }
    if room.fits(load.device, load.mb, lesser):
        message = f"for {load.model_id}, {sorted(lesser)} would have been enough, not {keys}"
        raise Broken("I19", message)


def _may_go(view: InstanceView, newcomer: Wanted, priority: int, stay: _Staying) -> bool:
    theirs = view.spec.config.priority
    asked_for = newcomer.spec.model_id in stay.observed.demands
    older = asked_for or view.last_used_s < newcomer.accepted_s
    return theirs < priority or (theirs == priority and older)


def _value(view: InstanceView) -> tuple[int, float, str]:
    return (view.spec.config.priority, view.last_used_s, view.key)
