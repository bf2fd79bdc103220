"""Carries a plan out, as far as it can be started at this moment.

Each action is checked again by the manager when it begins; what it refuses is planned anew in the next
turn. Nothing here waits, and nothing is done that the plan does not say.

Loads take turns: so many are under way at a time that they do not slow each other down. One that has been
under way for `TURN_S` lends its turn to the next, so that what hangs, or comes from a slow disk, delays no
other; how many can be under way then is bounded by `max_models` and by memory, as ever. Nobody makes room for
a load whose turn has not come: until then requests may want what would go. And where room has to be made,
loads that are over soon take turns one by one: a place that is being filled serves nobody, and two loads side
by side are hardly faster than one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.errors import ModelUnavailable, OperationInProgress
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.actions import SOON_S, TURN_S, Action, Mode, Plan, Verb

log = logging.getLogger(__name__)

Told = tuple[str, str, str]
"""Model id, reason, message."""


def carry_out(
    made: Plan,
    manager: ModelManager,
    snapshot: Snapshot,
    max_parallel_loads: int,
    now_s: float,
    tell: Callable[[Told], None],
) -> tuple[Action, ...]:
    """Starts, in order, what can start now, and gives what was started.

    Args:
        max_parallel_loads: most loads that have a turn at a time.
        now_s: on the manager's clock.
        tell: told of what no event of the manager tells.
    """
    may_begin = _having_turns(made, snapshot.instances, max_parallel_loads, now_s)
    executed = []
    for action in made.actions:
        if action.after or (action.takes_turn and action.model_id not in may_begin):
            continue
        if action.makes_room_for and action.makes_room_for not in may_begin:
            continue
        try:
            done = _start(action, manager, tell)
        except (OperationInProgress, ModelUnavailable) as refusal:
            log_event(log, logging.DEBUG, "ActionSkipped", str(refusal), model=action.model_id)
            continue
        if done:
            executed.append(action)
    return tuple(executed)


def _having_turns(
    made: Plan, instances: Sequence[InstanceView], max_parallel_loads: int, now_s: float
) -> frozenset[str]:
    """The ids of those whose load, or whose making room, may begin now.

    A load that waits for memory takes no turn from one that could start. But nobody else makes room
    meanwhile, unless that memory takes long: requests hold it, or it has been on its way for `TURN_S`.
    """
    actions = {a.model_id: a for a in made.actions if a.takes_turn}
    coming = {a.makes_room_for for a in made.actions if a.makes_room_for}
    late = {v.model_id for v in instances if _frees_late(v, now_s)}
    starts = max_parallel_loads - len(_turns_end(instances, now_s, TURN_S))
    rooms = min(starts, 1 - len(_turns_end(instances, now_s, SOON_S)))
    begin: set[str] = set()
    for model_id in made.turns:
        after = actions[model_id].after
        if not after:
            if starts > 0:
                begin.add(model_id)
            starts, rooms = starts - 1, rooms - 1
        elif model_id in coming:
            if rooms > 0:
                begin.add(model_id)
            rooms -= 1
        elif not late.intersection(after):
            rooms -= 1
    return frozenset(begin)


def _frees_late(view: InstanceView, now_s: float) -> bool:
    if view.state is not State.UNLOADING:
        return False
    return view.leases > 0 or now_s - (view.draining_since_s or now_s) >= TURN_S


def next_turn_s(
    made: Plan, executed: Sequence[Action], instances: Sequence[InstanceView], now_s: float
) -> float | None:
    """When a load lends its turn to one that waits for it; None if none does."""
    left = [a for a in made.actions if a not in executed]
    ends: list[float] = []
    if any(a.takes_turn for a in left):
        ends += _turns_end(instances, now_s, TURN_S)
        freed = (v.draining_since_s for v in instances if v.state is State.UNLOADING)
        ends += [at + TURN_S for at in freed if at is not None and at + TURN_S > now_s]
    if any(a.makes_room_for for a in left):
        ends += _turns_end(instances, now_s, SOON_S)
    return min(ends, default=None)


def _turns_end(instances: Sequence[InstanceView], now_s: float, lasting_s: float) -> list[float]:
    """When the turns of `lasting_s` end of the loads that have one, on the manager's clock.

    A version that is unloaded for its successor to be loaded in its place has the successor's turn.
    """
    begun = [v.loading_since_s for v in instances if v.state is State.LOADING and not v.trial]
    begun += [v.draining_since_s or now_s for v in instances if v.followed]
    return [at + lasting_s for at in begun if at + lasting_s > now_s]


def _start(action: Action, manager: ModelManager, tell: Callable[[Told], None]) -> bool:
    model_id = action.model_id
    if action.verb is Verb.UNLOAD:
        return manager.begin_unload(model_id, action.reason, key=action.key)
    if action.verb is Verb.CANCEL:
        return manager.cancel_rollout(model_id, action.key or "")
    if action.verb is Verb.EVICT:
        return manager.begin_evict(model_id, action.key or "", action.reason)
    assert action.spec is not None
    if action.verb is Verb.ADJUST:
        return _adjust(action, action.spec, manager, tell)
    if action.mode is Mode.RECREATE:
        return manager.begin_replace(action.spec, action.device, action.mb, key=action.key)
    started = manager.begin_load(action.spec, Owner.DIRECTORY, action.device, action.mb)
    return started is not None


def _adjust(
    action: Action,
    spec: ModelSpec,
    manager: ModelManager,
    tell: Callable[[Told], None],
) -> bool:
    done = manager.adjust(spec)
    if done:
        log_event(log, logging.INFO, "Adjusted", action.detail, model=action.model_id)
        tell((action.model_id, "Adjusted", action.detail))
    return done
