"""How much memory a list of actions will take on the way: a pure function."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.reconcile.actions import Action, DeviceForecast, Mode, Verb


def forecast(
    ledger: Ledger, actions: Sequence[Action], max_parallel_loads: int
) -> tuple[DeviceForecast, ...]:
    """MB on each device as the actions go by.

    Room that an update by surge or an unload gives back is counted back late, after as many further
    loads as may run beside it: the peak is what can be reached, not what is hoped for.
    """
    used = {device: ledger.used_mb(device) for device in ledger.budgets_mb}
    now, peak = dict(used), dict(used)
    held: list[tuple[str, float]] = []

    def settle(keep: int) -> None:
        while len(held) > keep:
            device, mb = held.pop(0)
            used[device] = used.get(device, 0.0) - mb

    for action in actions:
        old = ledger.reservations.get(action.key) if action.key else None
        if action.mode is Mode.RECREATE and old is not None:
            used[old.device] = used.get(old.device, 0.0) - old.mb
            old = None
        if action.verb is Verb.ADJUST and old is not None:
            used[old.device] = used.get(old.device, 0.0) + action.mb - old.mb
            peak[old.device] = max(peak.get(old.device, 0.0), used[old.device])
        if action.verb in (Verb.LOAD, Verb.UPDATE):
            settle(0 if action.after else max_parallel_loads - 1)
            used[action.device] = used.get(action.device, 0.0) + action.mb
            peak[action.device] = max(peak.get(action.device, 0.0), used[action.device])
        if old is not None and action.verb is not Verb.ADJUST:
            held.append((old.device, old.mb))
    settle(0)
    return tuple(
        DeviceForecast(device, now[device], peak[device], used[device], ledger.budgets_mb[device])
        for device in sorted(ledger.budgets_mb)
    )
