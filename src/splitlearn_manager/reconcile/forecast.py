"""How much memory a list of actions will take on the way: a pure function.

What nobody can know beforehand is how long each piece of work takes. The figures are those of a run in which
all loads take the same short time, and memory comes back a little after that: later than the next load
begins, but within its time. So beside a load there are the old versions of the updates that are under way,
and of those that have just ended. Room is made when no load is under way, for one after the other. A load
that waits for memory begins as soon as there is enough, be it that more is on its way.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.reconcile.actions import Action, DeviceForecast, Mode, Verb

_COMES_BACK = 0.5
"""When memory is back that is given up, in times of a load; any part of one gives the same figures."""
_ONE_AFTER_THE_OTHER = 1e-6
"""What happens at the same time happens in the order of the actions, each of which does all of its part."""
_AFTER_A_LOAD_BEGINS = 1e-3
_ROUNDING_MB = 1e-6

Change = tuple[float, str, float, int]
"""When, on which device, how many MB more, and how many models more."""


def forecast(
    ledger: Ledger, actions: Sequence[Action], max_parallel_loads: int
) -> tuple[DeviceForecast, ...]:
    """MB on each device as the actions go by, in order.

    Args:
        max_parallel_loads: at least 1.
    """
    now = {device: ledger.used_mb(device) for device in ledger.budgets_mb}
    used, peak = dict(now), dict(now)
    for _, device, mb, _ in sorted(_changes(ledger, actions, max_parallel_loads)):
        used[device] = used.get(device, 0.0) + mb
        peak[device] = max(peak.get(device, 0.0), used[device])
    return tuple(
        DeviceForecast(device, now[device], peak[device], used[device], ledger.budgets_mb[device])
        for device in sorted(ledger.budgets_mb)
    )


def _changes(ledger: Ledger, actions: Sequence[Action], max_parallel_loads: int) -> list[Change]:
    """What changes, in no order."""
    changes: list[Change] = []
    turns = [0.0] * max_parallel_loads
    held = dict(ledger.reservations)
    back: dict[str, float] = {}
    all_ended = 0.0

    def change(at: float, device: str, mb: float, places: int) -> None:
        changes.append((at + len(changes) * _ONE_AFTER_THE_OTHER, device, mb, places))

    def has_room(at: float, device: str, mb: float) -> bool:
        now = at + len(changes) * _ONE_AFTER_THE_OTHER
        done = [found for found in changes if found[0] <= now]
        used_mb = ledger.used_mb(device) + sum(m for _, d, m, _ in done if d == device)
        places = len(ledger.reservations) + sum(found[3] for found in done)
        return used_mb + mb <= ledger.limit_mb(device) + _ROUNDING_MB and places < ledger.max_models

    for action in actions:
        old = held.get(action.key) if action.key else None
        if action.verb is Verb.ADJUST:
            if old is not None:
                change(0.0, old.device, action.mb - old.mb, 0)
                held[old.key] = replace(old, mb=action.mb)
            continue
        if not action.takes_turn:
            returns = _COMES_BACK
            if action.makes_room_for:
                # What goes at the same time for another reason is gone when the load begins.
                returns += all_ended + 2 * _AFTER_A_LOAD_BEGINS
            back[action.model_id] = returns
            if old is not None:
                change(returns, old.device, -old.mb, -1)
            continue
        freed = max((back.get(model_id, _COMES_BACK) for model_id in action.after), default=0.0)
        begins = heapq.heappop(turns)
        if freed > begins:
            between = sorted(at for at, *_ in changes if begins < at < freed)
            soonest = (at for at in (begins, *between) if has_room(at, action.device, action.mb))
            begins = next(soonest, freed)
        recreates = action.mode is Mode.RECREATE
        # Of an update that is ready when another load begins, the old version is still there.
        returns = begins + _COMES_BACK + (0 if recreates else 1 + _AFTER_A_LOAD_BEGINS)
        begins = returns if recreates else begins
        if old is not None and recreates:
            change(returns, old.device, -old.mb, -1)
        change(begins, action.device, action.mb, 1)
        if old is not None and not recreates:
            change(returns, old.device, -old.mb, -1)
        back[action.model_id] = returns
        heapq.heappush(turns, begins + 1)
        all_ended = max(all_ended, begins + 1)
    return changes
