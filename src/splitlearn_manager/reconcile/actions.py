"""Planning's vocabulary, as values: what is wanted, what runs, what to do, what waits.

Pure data; `plan` makes it, the reconciler carries it out, the command line prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.snapshot import Snapshot
from splitlearn_manager.reconcile.backoff import Attempt

PARKED = "unloaded to make room, or because it was idle; the next request brings it back"
"""What an evicted model waits for, for people."""
TURN_S = 30.0
"""A load that has been under way for so long no longer counts against `max_parallel_loads`."""


class Verb(StrEnum):
    """What an action does."""

    ADJUST = "adjust"
    UPDATE = "update"
    LOAD = "load"
    UNLOAD = "unload"
    EVICT = "evict"


class Mode(StrEnum):
    """How an update goes: the new version beside the old one, or in its place."""

    SURGE = "surge"
    RECREATE = "recreate"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that the directory declares, as planning needs it.

    Attributes:
        spec: accepted config, settled weights, generation.
        weights_ready: False while the files behind it are missing, which `weights_problem` then
            tells, or still changing for the first time.
        mb: what a load of it reserves, in MB.
        devices: where it may go, best first.
        demanded_s: when its file was accepted, or a request last asked for it, whichever is later.
        own_limit_problem: set if it is larger than its own max_memory_mb.
        suspended: people asked that it stays as it is.
    """

    spec: ModelSpec
    mb: float
    devices: tuple[str, ...]
    demanded_s: float
    weights_ready: bool = True
    weights_problem: str = ""
    own_limit_problem: str | None = None
    source: str = ""
    suspended: bool = False


@dataclass(frozen=True)
class Observed:
    """What runs, and what is remembered of it.

    Attributes:
        attempts: failed loads, by model id.
        parked: when a model was evicted, by id; it comes back when a demand is newer than that.
        fallbacks: the version that served last, by id, where another one is wanted.
        limited: until when no load of a model is tried, by id, because too many have failed.
    """

    snapshot: Snapshot
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    parked: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, Wanted] = field(default_factory=dict)
    limited: Mapping[str, float] = field(default_factory=dict)
    max_parallel_loads: int = 2
    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    Attributes:
        key: the instance that is acted on (not for a load); it is checked again when executed.
        after: model ids whose memory must be back first; empty if it can start now.
        detail: what changes, or why, for people.
    """

    verb: Verb
    model_id: str
    detail: str
    spec: ModelSpec | None = None
    key: str | None = None
    device: str = ""
    mb: float = 0.0
    mode: Mode | None = None
    reason: str = ""
    after: tuple[str, ...] = ()
    source: str = ""

    @property
    def takes_turn(self) -> bool:
        """It is one of those of which only `max_parallel_loads` are begun at a time."""
        return self.verb in (Verb.LOAD, Verb.UPDATE)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing is done for a model that is not as desired.

    Attributes:
        until_s: when that ends by itself, on the manager's clock; None if something must happen.
        failed: its load failed, or is sure to: it does not just wait for room or its turn.
    """

    model_id: str
    reason: str
    message: str
    until_s: float | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class DeviceForecast:
    """MB reserved on a device now, at most on the way, and at the end."""

    device: str
    now_mb: float
    peak_mb: float
    after_mb: float
    budget_mb: float


@dataclass(frozen=True)
class Plan:
    """Actions in order, what waits, and the memory it will take.

    Attributes:
        due_s: when something is to be parked that is not idle for long enough yet, on the manager's clock.
    """

    actions: tuple[Action, ...]
    waiting: tuple[Waiting, ...]
    forecast: tuple[DeviceForecast, ...]
    due_s: float | None = None

    def waiting_for(self, model_id: str) -> Waiting | None:
        """The first reason why nothing is done for the model; None if there is none."""
        return self._waiting_by_id.get(model_id)

    @cached_property
    def _waiting_by_id(self) -> Mapping[str, Waiting]:
        return {w.model_id: w for w in reversed(self.waiting)}
