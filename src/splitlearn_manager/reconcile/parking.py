"""When a model that serves was idle for its keep_alive_s: a pure function."""

from __future__ import annotations

from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Action, Verb, Wanted


def park_if_idle(serving: InstanceView, wanted: Wanted, now_s: float) -> Action | float | None:
    """The eviction of what was idle for keep_alive_s; else when it can have been, or None for never."""
    config = wanted.spec.config
    # What serves stays pinned until its update, as for making room.
    if config.keep_alive_s is None or config.pinned or serving.spec.config.pinned:
        return None
    # While it is in use, that is the earliest moment at which it can have been idle for long enough.
    busy_until_s = now_s if serving.leases else serving.last_used_s
    idle_at_s = busy_until_s + config.keep_alive_s
    if serving.leases or now_s < idle_at_s:
        return idle_at_s
    return Action(
        Verb.EVICT,
        serving.model_id,
        f"idle for {config.keep_alive_s:g} s",
        key=serving.key,
        device=serving.device,
        mb=serving.reserved_mb,
        reason="Idle",
    )
