"""What is known of one model at one moment, and where that puts it: phase, sync and health.

`Facts` is what the loop hands over each turn: what is declared, what runs, what is waited for. The
functions are pure, and each of them has an answer for every combination of facts. Nothing here words
anything for people; that is for `conditions` and `explain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.errors import LoadTimeout
from splitlearn_manager.reconcile.actions import Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt


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


_AWAITS_LOAD = frozenset(
    {
        *("InsufficientMemory", "MaxModels", "MemoryPressure"),
        *("AwaitingMemory", "AwaitingRoom", "AwaitingTurn", "Evicted"),
    }
)
"""What a load waits for that nothing else is in the way of, by the reason of the planner."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of one model at one moment.

    Attributes:
        wanted: what the directory declares; None once no file does.
        views: its instances, whoever loaded them.
        attempt: the failed loads of one version of it, not necessarily the wanted one.
        parked: it was evicted, and nobody has brought it back.
        waiting: why nothing is done although it is not as wanted.
        held: why an older spec than the file's is kept (the file is invalid, in conflict, …), or "".
        source_available: False while the directory itself cannot be read.
        suspended: people asked that it stays as it is.
        guarded: no file declares it, and the prune guard keeps it until somebody confirms.
        conflict: the declarations that contradict each other.
        fallback: what served before an update by recreate that is under way or failed.
        problems: what is wrong with the file that it comes from.
        source: the declaration that was accepted last; None for one that no file declares.
    """

    model_id: str
    wanted: Wanted | None
    views: tuple[InstanceView, ...]
    attempt: Attempt | None
    parked: bool
    waiting: Waiting | None
    held: str
    source_available: bool
    suspended: bool = False
    guarded: bool = False
    conflict: tuple[SourceRef, ...] = ()
    fallback: Wanted | None = None
    problems: tuple[Problem, ...] = ()
    source: SourceRef | None = None

    @property
    def of_api(self) -> bool:
        """Loaded through the Python API: nobody declares it, and nobody takes it away."""
        return self.wanted is None and any(v.owner is Owner.API for v in self.views)

    @property
    def taken_by_api(self) -> bool:
        """Declared by a file, while a model of that id was loaded through the Python API."""
        return self.wanted is not None and any(v.owner is Owner.API for v in self.views)

    @property
    def serving(self) -> InstanceView | None:
        """The instance that answers requests in the name of what is shown; None if none does.

        What the Python API loaded does not serve for a file that declares the same id.
        """
        if self.taken_by_api:
            return None
        return _in_state(self.views, State.READY)

    @property
    def loading(self) -> InstanceView | None:
        return _in_state(self.views, State.LOADING)

    @property
    def draining(self) -> InstanceView | None:
        """One that served and is on its way out; not what is left of a load that failed.

        One that is out in time before one whose requests take too long.
        """
        served = [
            v for v in self.views if v.state is State.UNLOADING and v.ready_since_s is not None
        ]
        return min(served, key=lambda v: not v.under_way, default=None)

    @property
    def lingering(self) -> tuple[InstanceView, ...]:
        """Copies on their way out whose requests take too long: they keep memory, and hold nothing up."""
        return tuple(v for v in self.views if v.state is State.UNLOADING and not v.under_way)

    @property
    def hung(self) -> InstanceView | None:
        """A load that was given up and whose loader has not come back: its memory stays charged.

        Not one that has just failed, and gives its memory back at this moment.
        """
        attempt = self.attempt
        return next(
            (
                v
                for v in self.views
                if v.state is State.FAILED
                and not (
                    attempt is not None
                    and attempt.is_of(v.spec)
                    and attempt.reason != LoadTimeout.__name__
                )
            ),
            None,
        )

    @property
    def failed_attempt(self) -> Attempt | None:
        """The failed loads of the very version that is wanted."""
        if self.attempt is None or self.wanted is None:
            return None
        return self.attempt if self.attempt.concerns(self.wanted.spec) else None

    @property
    def failure(self) -> tuple[str, str] | None:
        """Reason and message of why the wanted version cannot be served as things are."""
        waiting, attempt = self.waiting, self.failed_attempt
        if waiting is not None and waiting.failed:
            return (waiting.reason, waiting.message)
        if waiting is not None and attempt is not None and waiting.reason == attempt.reason:
            # It turned out to need more room than there was, and waits for that much: no failure any more.
            return None
        return (attempt.reason, attempt.message) if attempt is not None else None

    @property
    def comes_back(self) -> bool:
        """Whether something is loaded for it once there is room, its turn has come, or a request asks for it.

        Its failure is over then, or concerns another version than the one that served before.
        """
        waiting = self.waiting
        return (
            self.fallback is not None
            or waiting is None
            or (not waiting.failed and waiting.reason in _AWAITS_LOAD)
        )

    @property
    def why(self) -> tuple[str, str] | None:
        """Reason and message of why it is not as wanted: a failure before what it waits for."""
        if self.failure is not None:
            return self.failure
        return (self.waiting.reason, self.waiting.message) if self.waiting is not None else None

    @property
    def generation(self) -> int | None:
        """The accepted generation; of a model from the Python API, that of its instance."""
        if self.wanted is not None:
            return self.wanted.spec.generation
        return self.views[0].spec.generation if self.of_api else None

    @property
    def observed_generation(self) -> int | None:
        """The generation that serves."""
        serving = self.serving
        return serving.spec.generation if serving is not None else None

    @property
    def up_to_date(self) -> bool:
        """The wanted spec and weights serve."""
        serving = self.serving
        return (
            serving is not None
            and self.wanted is not None
            and serving.spec.spec_hash == self.wanted.spec.spec_hash
            and serving.spec.version == self.wanted.spec.version
        )


def phase_of(facts: Facts) -> Phase:
    """Where the model stands."""
    if facts.of_api:
        return _phase_of_api(facts)
    if facts.wanted is None:
        return Phase.TERMINATING
    if facts.taken_by_api:
        return Phase.PENDING
    if facts.serving is not None:
        return Phase.UPDATING if facts.loading is not None else Phase.READY
    if facts.loading is not None:
        return Phase.LOADING
    if facts.draining is not None and facts.draining.under_way:
        return _phase_of_draining(facts, facts.wanted, facts.draining)
    if facts.failure is not None:
        return Phase.FAILED
    return Phase.EVICTED if facts.parked else Phase.PENDING


def _phase_of_api(facts: Facts) -> Phase:
    if facts.serving is not None:
        return Phase.UPDATING if facts.loading is not None else Phase.READY
    if facts.loading is not None:
        return Phase.LOADING
    if facts.draining is not None:
        return Phase.EVICTED if facts.parked else Phase.TERMINATING
    return Phase.FAILED


def _phase_of_draining(facts: Facts, wanted: Wanted, old: InstanceView) -> Phase:
    if facts.parked:
        return Phase.EVICTED
    # In the wanted version and not replaced: it was declared anew while its old copy goes.
    replaced = facts.fallback is not None or old.spec.version != wanted.spec.version
    return Phase.UPDATING if replaced else Phase.PENDING


def sync_of(facts: Facts) -> Sync:
    """Whether what runs is what is declared; Unknown while what is declared cannot be told."""
    if facts.of_api:
        return Sync.SYNCED
    if not facts.source_available:
        return Sync.UNKNOWN
    if facts.guarded:
        return Sync.OUT_OF_SYNC
    if facts.held or facts.suspended or facts.conflict:
        return Sync.UNKNOWN
    return Sync.SYNCED if facts.up_to_date else Sync.OUT_OF_SYNC


def health_of(facts: Facts) -> Health:
    """Whether what runs is well."""
    phase = phase_of(facts)
    if facts.suspended and phase is not Phase.TERMINATING:
        return Health.SUSPENDED
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


def _in_state(views: Sequence[InstanceView], state: State) -> InstanceView | None:
    return next((v for v in views if v.state is state), None)
