"""Planning's vocabulary, as values: what is wanted, what runs, what to do, what waits.

Pure data; `plan` makes it, the reconciler carries it out, the command line prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.snapshot import Snapshot
from splitlearn_manager.reconcile.backoff import Attempt

PARKED = "unloaded to make room, or because it was idle; the next request brings it back"
"""What an evicted model waits for, for people."""
RELIEF_SHOWS_S = 10.0
"""How long processes may still wait for memory after a model has given some back: they are watched over
the last 10 s."""
TURN_S = 30.0
"""A load that has been under way for so long no longer counts against `max_parallel_loads`."""
SOON_S = 1.0
"""A load is thought to be over so soon; one that is not waits for a disk, or a network, that may serve
others meanwhile."""


class Verb(StrEnum):
    """What an action does."""

    ADJUST = "adjust"
    UPDATE = "update"
    LOAD = "load"
    UNLOAD = "unload"
    EVICT = "evict"
    CANCEL = "cancel"


class Mode(StrEnum):
    """How an update goes: the new version beside the old one, or in its place."""

    SURGE = "surge"
    RECREATE = "recreate"


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests that wait for a model at one moment. Times are on the manager's clock.

    Attributes:
        waiting: how many they are.
        oldest_s: when the one came that has waited longest.
        urgent_s: from when on one of them waits no longer for others' time to be over, because half of its
            own is.
    """

    waiting: int
    oldest_s: float
    urgent_s: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that the directory declares, as planning needs it.

    Attributes:
        spec: accepted config, settled weights, generation.
        weights_ready: False while the files behind it are missing, which `weights_problem` then
            tells, or still changing for the first time.
        mb: what a load of it reserves, in MB.
        measured: what a load of that version measured; None if there was none, and `mb` is an estimate.
        devices: where it may go, GPUs by their numbers before the CPU.
        accepted_s: when its file was accepted, on the manager's clock.
        own_limit_problem: set if it is larger than its own max_memory_mb.
        suspended: people asked that it stays as it is.
    """

    spec: ModelSpec
    mb: float
    devices: tuple[str, ...]
    accepted_s: float
    weights_ready: bool = True
    weights_problem: str = ""
    own_limit_problem: str | None = None
    source: str = ""
    suspended: bool = False
    measured: Measurement | None = None


@dataclass(frozen=True)
class Observed:
    """What runs, and what is remembered of it.

    Attributes:
        attempts: failed loads, by model id.
        parked: when a model was evicted, by id; it comes back when requests wait for it, or its file is
            accepted anew.
        fallbacks: the version that served last, by id, where another one is wanted.
        limited: until when no load of a model is tried, by id, because too many have failed.
        demands: the requests that wait for models, by id.
    """

    snapshot: Snapshot
    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    parked: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Mapping[str, Wanted] = field(default_factory=dict)
    limited: Mapping[str, float] = field(default_factory=dict)
    demands: Mapping[str, Demand] = field(default_factory=dict)
    max_parallel_loads: int = 2
    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    Attributes:
        key: the instance that is acted on (not for a load); it is checked again when executed.
        after: model ids whose memory must be back first; empty if it can start now.
        detail: what changes, or why, for people.
        makes_room_for: of an eviction, the id of the model that is loaded in its place; else empty.
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
    makes_room_for: str = ""

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
        due_s: when something is due that its time has not come for yet, on the manager's clock: to park what
            is not idle for long enough, or to let others have the room of what was loaded a moment ago.
        turns: the ids of those that load, in the order in which they are given turns.
        held: keys of instances that take no new requests from now on, until they are idle and go; and the
            id of the model that each goes for.
        awaits_idle: requests wait for room that there is once somebody is idle.
    """

    actions: tuple[Action, ...]
    waiting: tuple[Waiting, ...]
    forecast: tuple[DeviceForecast, ...]
    due_s: float | None = None
    turns: tuple[str, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)
    awaits_idle: bool = False

    def waiting_for(self, model_id: str) -> Waiting | None:
        """The first reason why nothing is done for the model; None if there is none."""
        return self._waiting_by_id.get(model_id)

    @cached_property
    def _waiting_by_id(self) -> Mapping[str, Waiting]:
        return {w.model_id: w for w in reversed(self.waiting)}
