"""What is going on with each model, in the terms that people know: phase, conditions, events.

`phase_of`, `sync_of`, `health_of` and `conditions_of` are pure. `StatusBook` remembers what cannot be
derived from one moment: since when a condition has been as it is, and the latest events. It decides
nothing: the loop fills it, the HTTP API and the command line show it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt

EVENTS_KEPT = 50


class Phase(StrEnum):
    """Where a desired model stands."""

    PENDING = "Pending"
    LOADING = "Loading"
    READY = "Ready"
    UPDATING = "Updating"
    EVICTED = "Evicted"
    FAILED = "Failed"
    TERMINATING = "Terminating"


class Sync(StrEnum):
    """Whether what runs is what is declared."""

    SYNCED = "Synced"
    OUT_OF_SYNC = "OutOfSync"
    UNKNOWN = "Unknown"


class Health(StrEnum):
    """Whether what runs is well."""

    HEALTHY = "Healthy"
    PROGRESSING = "Progressing"
    DEGRADED = "Degraded"
    MISSING = "Missing"
    SUSPENDED = "Suspended"


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of one model at one moment.

    Attributes:
        wanted: what the directory declares; None once no file does.
        held: why an older spec than the file's is kept (the file is invalid, in conflict, …), or "".
        source_available: False while the directory itself cannot be read.
    """

    model_id: str
    wanted: Wanted | None
    views: tuple[InstanceView, ...]
    attempt: Attempt | None
    parked: bool
    waiting: Waiting | None
    held: str
    source_available: bool

    @property
    def of_api(self) -> bool:
        """Loaded through the Python API: nobody declares it, and nobody takes it away."""
        return self.wanted is None and any(v.owner is Owner.API for v in self.views)

    @property
    def serving(self) -> InstanceView | None:
        return next((v for v in self.views if v.state is State.READY), None)

    @property
    def failed_attempt(self) -> Attempt | None:
        """The failed loads of the very version that is wanted."""
        if self.attempt is None or self.wanted is None:
            return None
        return self.attempt if self.attempt.concerns(self.wanted.spec) else None

    @property
    def failure(self) -> tuple[str, str] | None:
        """Reason and message of why the wanted version cannot be served as things are."""
        if self.waiting is not None and self.waiting.failed:
            return (self.waiting.reason, self.waiting.message)
        attempt = self.failed_attempt
        return (attempt.reason, attempt.message) if attempt is not None else None

    @property
    def why(self) -> tuple[str, str] | None:
        """Reason and message of why it is not as wanted: a failure before what it waits for."""
        if self.failure is not None:
            return self.failure
        return (self.waiting.reason, self.waiting.message) if self.waiting is not None else None

    @property
    def up_to_date(self) -> bool:
        serving = self.serving
        return (
            serving is not None
            and self.wanted is not None
            and serving.spec.spec_hash == self.wanted.spec.spec_hash
            and serving.spec.version == self.wanted.spec.version
        )


@dataclass(frozen=True, slots=True)
class Condition:
    """One fact about a model: `status` is True, False or Unknown; `since` is unix time in seconds."""

    type: str
    status: str
    reason: str
    message: str
    since: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a model; equal ones in a row are counted, `at` is the latest."""

    at: float
    reason: str
    message: str
    count: int = 1


def phase_of(facts: Facts) -> Phase:
    states = {v.state for v in facts.views}
    if facts.wanted is None and not facts.of_api:
        return Phase.TERMINATING
    if State.READY in states:
        return Phase.UPDATING if State.LOADING in states else Phase.READY
    if State.LOADING in states:
        return Phase.LOADING
    if State.UNLOADING in states:
        return Phase.EVICTED if facts.parked else Phase.UPDATING
    if facts.failure is not None:
        return Phase.FAILED
    return Phase.EVICTED if facts.parked else Phase.PENDING


def sync_of(facts: Facts) -> Sync:
    if facts.of_api:
        return Sync.SYNCED
    if not facts.source_available or facts.held:
        return Sync.UNKNOWN
    return Sync.SYNCED if facts.up_to_date else Sync.OUT_OF_SYNC


def health_of(facts: Facts) -> Health:
    phase = phase_of(facts)
    if phase is Phase.READY:
        stuck = facts.failure is not None and not facts.up_to_date
        return Health.DEGRADED if stuck else Health.HEALTHY
    return {
        Phase.LOADING: Health.PROGRESSING,
        Phase.UPDATING: Health.PROGRESSING,
        Phase.TERMINATING: Health.PROGRESSING,
        Phase.EVICTED: Health.SUSPENDED,
        Phase.FAILED: Health.DEGRADED,
    }.get(phase, Health.MISSING)


def conditions_of(facts: Facts) -> tuple[tuple[str, str, str, str], ...]:
    """(type, status, reason, message) of each condition that applies."""
    rows = [_accepted(facts), _synced(facts), _ready(facts)]
    if (serving := facts.serving) is not None:
        notes = "; ".join(serving.notes)
        rows.append(
            ("Warmed", "True", "WarmedUp", notes)
            if serving.warmed
            else ("Warmed", "False", "NotWarmedUp", notes or "warmup is off")
        )
    return tuple(rows)


def _accepted(facts: Facts) -> tuple[str, str, str, str]:
    if facts.of_api:
        return ("Accepted", "True", "LoadedThroughApi", "")
    if facts.wanted is None:
        return ("Accepted", "False", "NotDeclared", "no file declares it")
    generation = facts.wanted.spec.generation
    if not facts.source_available:
        return (
            "Accepted",
            "Unknown",
            "SourceUnavailable",
            f"generation {generation} stays in force",
        )
    if facts.held:
        return ("Accepted", "False", "KeptLastGood", f"{facts.held}; generation {generation} stays")
    return ("Accepted", "True", "SpecAccepted", f"generation {generation}")


def _synced(facts: Facts) -> tuple[str, str, str, str]:
    sync = sync_of(facts)
    if sync is Sync.SYNCED:
        return ("Synced", "True", "UpToDate", "")
    status = "Unknown" if sync is Sync.UNKNOWN else "False"
    if facts.serving is not None and facts.failure is not None:
        return ("Synced", status, "UpdateFailed", ": ".join(facts.failure))
    if facts.why is not None:
        return ("Synced", status, *facts.why)
    return ("Synced", status, str(phase_of(facts)), "")


def _ready(facts: Facts) -> tuple[str, str, str, str]:
    serving, wanted = facts.serving, facts.wanted
    if serving is None:
        return ("Ready", "False", *(facts.why or (str(phase_of(facts)), "")))
    if facts.of_api or (wanted is not None and serving.spec.generation == wanted.spec.generation):
        return (
            "Ready",
            "True",
            "Serving",
            f"generation {serving.spec.generation} on {serving.device}",
        )
    older = f"generation {serving.spec.generation} serves"
    return ("Ready", "False", "OlderGenerationServes", older)


class StatusBook:
    """Status of every model, as JSON-ready mappings. Used by one thread; `published` by any."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._conditions: dict[str, dict[str, Condition]] = {}
        self._events: dict[str, deque[Event]] = {}
        self.published: Mapping[str, Mapping[str, object]] = {}
        self.phases: Mapping[str, Phase] = {}

    def record(self, model_id: str, reason: str, message: str) -> None:
        """Adds an event to the model's ring; a repeated one is counted."""
        ring = self._events.setdefault(model_id, deque(maxlen=EVENTS_KEPT))
        now = self._wall()
        if ring and (ring[-1].reason, ring[-1].message) == (reason, message):
            ring.append(Event(now, reason, message, ring.pop().count + 1))
        else:
            ring.append(Event(now, reason, message))

    def publish(self, facts: Sequence[Facts], now_s: float) -> None:
        """Replaces what is shown; models without facts are forgotten."""
        known = {f.model_id for f in facts}
        for gone in set(self._conditions) - known:
            del self._conditions[gone]
            self._events.pop(gone, None)
        self.phases = {f.model_id: phase_of(f) for f in facts}
        self.published = {f.model_id: self._describe(f, now_s) for f in facts}

    def _describe(self, facts: Facts, now_s: float) -> Mapping[str, object]:
        wall = self._wall()
        serving, wanted = facts.serving, facts.wanted
        kept = self._conditions.setdefault(facts.model_id, {})
        current: dict[str, Condition] = {}
        for kind, status, reason, message in conditions_of(facts):
            old = kept.get(kind)
            since = old.since if old is not None and old.status == status else wall
            current[kind] = Condition(kind, status, reason, message, since)
        self._conditions[facts.model_id] = current
        retry = facts.waiting.until_s if facts.waiting else None
        reason, message = facts.why or ("", "")
        return {
            "model_id": facts.model_id,
            "owner": str(facts.views[0].owner) if facts.views else "directory",
            "phase": str(phase_of(facts)),
            "sync": str(sync_of(facts)),
            "health": str(health_of(facts)),
            "reason": reason,
            "message": message,
            "next_retry_s": max(0.0, retry - now_s) if retry is not None else None,
            "generation": wanted.spec.generation if wanted else None,
            "observed_generation": serving.spec.generation if serving else None,
            "source": wanted.source if wanted else "",
            "device": serving.device if serving else None,
            "memory_mb": serving.measured_mb if serving else None,
            "in_flight": serving.leases if serving else 0,
            "requests": sum(v.requests for v in facts.views),
            "errors": sum(v.errors for v in facts.views),
            "conditions": [
                {
                    "type": c.type,
                    "status": c.status,
                    "reason": c.reason,
                    "message": c.message,
                    "since": c.since,
                }
                for c in current.values()
            ],
            "events": [
                {"at": e.at, "reason": e.reason, "message": e.message, "count": e.count}
                for e in self._events.get(facts.model_id, ())
            ],
        }
