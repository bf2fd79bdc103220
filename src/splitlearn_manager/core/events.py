"""What happened to an instance, as a value: for metrics, status and logs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class EventKind(StrEnum):
    """What happened to an instance."""

    LOADING = "Loading"
    LOADED = "Loaded"
    LOAD_FAILED = "LoadFailed"
    DIED = "Died"
    DRAIN_OVERDUE = "DrainOverdue"
    UNLOADED = "Unloaded"
    EVICTED = "Evicted"
    OUT_OF_MEMORY = "OutOfMemory"
    ROLLOUT = "Rollout"


@dataclass(frozen=True, slots=True)
class ManagerEvent:
    """Something that happened to an instance.

    `reason` is stable, `message` is for people, `at_s` is on the manager's monotonic clock.
    """

    kind: EventKind
    model_id: str
    key: str
    reason: str
    message: str
    at_s: float
