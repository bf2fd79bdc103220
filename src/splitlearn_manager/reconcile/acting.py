"""Carries a plan out, as far as it can be started at this moment.

Each action is checked again by the manager when it begins; what it refuses is planned anew in the next
turn. Nothing here waits, and nothing is done that the plan does not say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.snapshot import Snapshot
from splitlearn_manager.errors import ModelUnavailable, OperationInProgress
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.actions import Action, Mode, Plan, Verb

log = logging.getLogger(__name__)


def carry_out(
    made: Plan,
    manager: ModelManager,
    snapshot: Snapshot,
    max_parallel_loads: int,
    record: Callable[[str, str, str], None],
) -> tuple[Action, ...]:
    """Starts, in order, what can start now, and gives what was started.

    Args:
        record: told of what no event of the manager tells: model id, reason, message.
    """
    loading = sum(v.state is State.LOADING for v in snapshot.instances)
    executed = []
    for action in made.actions:
        takes_turn = action.verb in (Verb.LOAD, Verb.UPDATE)
        if action.after or (takes_turn and loading >= max_parallel_loads):
            continue
        try:
            done = _start(action, manager, record)
        except (OperationInProgress, ModelUnavailable) as refusal:
            log_event(log, logging.DEBUG, "ActionSkipped", str(refusal), model=action.model_id)
            continue
        if done:
            executed.append(action)
            loading += takes_turn
    return tuple(executed)


def _start(action: Action, manager: ModelManager, record: Callable[[str, str, str], None]) -> bool:
    model_id = action.model_id
    if action.verb is Verb.UNLOAD:
        return manager.begin_unload(model_id, action.reason, key=action.key)
    if action.verb is Verb.EVICT:
        return manager.begin_evict(model_id, action.key or "", action.reason)
    assert action.spec is not None
    if action.verb is Verb.ADJUST:
        return _adjust(action, action.spec, manager, record)
    if action.mode is Mode.RECREATE:
        return manager.begin_replace(action.spec, action.device, action.mb, key=action.key)
    started = manager.begin_load(action.spec, Owner.DIRECTORY, action.device, action.mb)
    return started is not None


def _adjust(
    action: Action,
    spec: ModelSpec,
    manager: ModelManager,
    record: Callable[[str, str, str], None],
) -> bool:
    done = manager.adjust(spec)
    if done:
        log_event(log, logging.INFO, "Adjusted", action.detail, model=action.model_id)
        record(action.model_id, "Adjusted", action.detail)
    return done
