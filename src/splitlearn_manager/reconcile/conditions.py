"""The conditions of a model, from its facts, in words for people.

Each condition is a type with a status (True, False, Unknown), a stable reason and a message. A message
says what is the matter, what goes on meanwhile, and what happens next or is to be done. `Ready` is True
only if the accepted generation itself serves.

Pure; when a condition became what it is, `status` remembers.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from splitlearn_manager.reconcile.actions import PARKED
from splitlearn_manager.reconcile.facts import Facts, Phase, Sync, phase_of, sync_of


class Row(NamedTuple):
    """A condition at one moment."""

    type: str
    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment on both clocks: the manager's, which never jumps, and that on the wall."""

    now_s: float
    wall_s: float

    def unix(self, at_s: float) -> float:
        """Unix time of a moment on the manager's clock."""
        return self.wall_s + (at_s - self.now_s)

    def clock(self, at_s: float) -> str:
        """`HH:MM:SS` in local time of a moment on the manager's clock."""
        return self.clock_of_unix(self.unix(at_s))

    def clock_of_unix(self, at: float) -> str:
        """`HH:MM:SS` in local time, and the date before it if that is not today."""
        try:
            when, today = datetime.fromtimestamp(at), datetime.fromtimestamp(self.wall_s).date()
        except (OverflowError, OSError, ValueError):
            return "a time that no calendar has"
        return when.strftime("%H:%M:%S" if when.date() == today else "%Y-%m-%d %H:%M:%S")


# What comes next for a model that only waits, by the reason of the planner.
_NEXT = {
    "InsufficientMemory": "it is loaded as soon as there is room",
    "MaxModels": "it is loaded as soon as there is a place",
    "MemoryPressure": "it is loaded as soon as others leave enough memory",
    "AwaitingMemory": "it is loaded as soon as that memory is back",
    "AwaitingRoom": "it is loaded in its place",
    "AwaitingTurn": "it is loaded when its turn comes",
    "WeightsNotReady": "it is loaded once they have settled",
    "OwnedByApi": "it is loaded from its file once that one is unloaded",
    "DeviceNotFound": "it waits until its file names another device",
}
# What these wait for others hold: who they are and what would free it is told by `explain`.
_EXPLAINED = frozenset({"InsufficientMemory", "MaxModels", "MemoryPressure"})
_STATUS_OF_SYNC = {Sync.SYNCED: "True", Sync.OUT_OF_SYNC: "False", Sync.UNKNOWN: "Unknown"}
_AWAITS_CHANGE = "it is not tried again before its file or its weights change"


def statuses_of(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Type and status of each condition that applies, always in this order; without any words."""
    serving, doubt = facts.serving, doubt_of(facts)
    is_current = serving is not None and serving.spec.generation == facts.generation
    rows = [
        ("Accepted", _status_of_doubt(facts, doubt)),
        ("Synced", _STATUS_OF_SYNC[sync_of(facts)]),
        ("Ready", "True" if is_current else "False"),
    ]
    if facts.suspended:
        rows.append(("Suspended", "True"))
    if serving is not None:
        rows.append(("Warmed", "True" if serving.warmed else "False"))
    return tuple(rows)


def conditions_of(facts: Facts, moment: Moment) -> tuple[Row, ...]:
    """The conditions that apply, in words."""
    statuses = dict(statuses_of(facts))
    words = {
        "Accepted": lambda: acceptance_of(facts),
        "Synced": lambda: _synced(facts, moment),
        "Ready": lambda: _ready(facts, moment),
        "Suspended": lambda: _suspended(facts),
        "Warmed": lambda: _warmed(facts),
    }
    return tuple(Row(kind, status, *words[kind]()) for kind, status in statuses.items())


def next_retry_s(facts: Facts) -> float | None:
    """When a failed load is tried again, on the manager's clock; None if no time is set for it."""
    waiting = facts.waiting
    if (
        waiting is None
        or facts.suspended
        or not (waiting.failed or waiting.reason == "RateLimited")
    ):
        return None
    return waiting.until_s


def failed_for_good(facts: Facts) -> bool:
    """Whether its load failed, and is not tried again before somebody changes something."""
    waiting = facts.waiting
    return waiting is not None and waiting.failed and next_retry_s(facts) is None


def situation(facts: Facts, moment: Moment) -> str:
    """Why it is not as wanted, what goes on meanwhile, and what comes next; empty if nothing is amiss."""
    if facts.why is None:
        return ""
    _, message = facts.why
    return _sentence(message, meanwhile(facts), what_comes_next(facts, moment))


def meanwhile(facts: Facts) -> str:
    """What goes on while it is not as wanted; empty where nothing does."""
    if facts.taken_by_api:
        return "the one from Python goes on answering"
    if (serving := facts.serving) is not None:
        return f"generation {serving.spec.generation} goes on serving"
    if (loading := facts.loading) is not None:
        attempt = facts.failed_attempt
        again = " again" if attempt is not None and attempt.concerns(loading.spec) else ""
        return f"generation {loading.spec.generation} is being loaded{again}"
    return ""


def what_comes_next(facts: Facts, moment: Moment) -> str:
    """What happens next by itself, or what it takes; empty where that goes without saying."""
    waiting = facts.waiting
    if facts.failure is None:
        return _next_of_waiting(facts.model_id, waiting.reason) if waiting is not None else ""
    if facts.loading is not None:
        return ""
    if facts.suspended:
        return "it is not tried again while it is suspended"
    if (retry_s := next_retry_s(facts)) is not None:
        return f"it is tried again at {moment.clock(retry_s)}"
    if facts.wanted is not None and not facts.wanted.weights_ready:
        return "it is loaded as soon as its files are there and can be read"
    if facts.hung is not None:
        return "it is not tried again before that loader returns or the node is started anew"
    attempt = facts.failed_attempt
    if (waiting is not None and waiting.failed) or (attempt and attempt.retry_at_s is None):
        return _AWAITS_CHANGE
    return "it is tried again when its turn comes"


def _next_of_waiting(model_id: str, reason: str) -> str:
    help_is_at = f"`explain {model_id}` says what would help" if reason in _EXPLAINED else ""
    return _sentence(_NEXT.get(reason, ""), help_is_at)


def _status_of_doubt(facts: Facts, doubt: str | None) -> str:
    if facts.wanted is None:
        return "True" if facts.of_api else "False"
    if doubt is None:
        return "True"
    return "Unknown" if doubt in ("SourceUnavailable", "Suspended", "InDoubt") else "False"


def acceptance_of(facts: Facts) -> tuple[str, str]:
    """Reason and message of the condition Accepted."""
    if facts.of_api:
        text = "loaded through the Python API; the directory does not touch it"
        return ("LoadedThroughApi", text)
    if facts.wanted is None:
        return ("NotDeclared", "no file declares it; it is being unloaded")
    doubt = doubt_of(facts)
    generation = facts.wanted.spec.generation
    if doubt is None:
        origin = f" from {facts.source}" if facts.source else ""
        return ("SpecAccepted", f"generation {generation}{origin}")
    what, todo = doubt_in_words(facts, doubt)
    stays = f"generation {generation} stays in force"
    if facts.serving is not None and facts.observed_generation == generation:
        stays = f"generation {generation} goes on serving"
    return (doubt, _sentence(what, stays, todo))


def doubt_of(facts: Facts) -> str | None:
    """Why what the files say is not what was accepted last; None if it is."""
    if not facts.source_available:
        return "SourceUnavailable"
    if facts.suspended:
        return "Suspended"
    if facts.conflict:
        return "Conflict"
    if facts.guarded:
        return "PruneGuard"
    if not facts.held:
        return None
    return "KeptLastGood" if facts.problems else "InDoubt"


def doubt_in_words(facts: Facts, reason: str) -> tuple[str, str]:
    """What is the matter, and what to do about it."""
    if reason == "SourceUnavailable":
        return (
            facts.held or "the desired directory cannot be read",
            "bring the directory back, mounted and readable",
        )
    if reason == "Suspended":
        return (
            "it is suspended: edits of its file and its removal wait",
            f"`resume {facts.model_id}` ends that",
        )
    if reason == "Conflict":
        places = " and ".join(str(ref) for ref in facts.conflict)
        return (f"declared more than once: {places}", "keep one of them")
    if reason == "PruneGuard":
        return (
            facts.held or "no file declares it, and the prune guard keeps it",
            "to keep it, put its file back",
        )
    if reason == "KeptLastGood":
        first, *others = facts.problems
        more = f" (and {len(others)} more)" if others else ""
        return (f"{first}{more}", "correct the file")
    return (facts.held, "")


def _synced(facts: Facts, moment: Moment) -> tuple[str, str]:
    observed = facts.observed_generation
    if sync_of(facts) is Sync.SYNCED:
        return ("UpToDate", f"generation {observed} serves" if observed is not None else "")
    if facts.serving is not None and facts.failure is not None and not facts.up_to_date:
        reason, _ = facts.failure
        return ("UpdateFailed", f"{reason}: {situation(facts, moment)}")
    doubt = doubt_of(facts)
    if doubt is None or facts.wanted is None:
        return _reason_and_message(facts, moment)
    serves = f"generation {observed} serves" if observed is not None else "nothing serves"
    if doubt == "PruneGuard":
        return (doubt, f"no file declares it, and it is kept; {serves}")
    if doubt == "Suspended":
        return (doubt, f"its file is not followed while it is suspended; {serves}")
    return (doubt, f"what is declared cannot be told, see Accepted; {serves}")


def _ready(facts: Facts, moment: Moment) -> tuple[str, str]:
    serving, loading = facts.serving, facts.loading
    if serving is None:
        return _reason_and_message(facts, moment)
    where = f"generation {serving.spec.generation} on {serving.device}"
    if serving.spec.generation == facts.generation:
        return ("Serving", where)
    reason = "OlderGenerationServes"
    older = f"generation {serving.spec.generation} serves on {serving.device}"
    if loading is not None and loading.trial:
        return (reason, f"{older}; generation {loading.spec.generation} is tried: {loading.trial}")
    if loading is not None:
        return (reason, f"{older} until generation {loading.spec.generation} has been loaded")
    if facts.wanted is None:
        return ("Terminating", f"{older}; no file declares it: it is unloaded next")
    wanted = facts.wanted.spec.generation
    if facts.why is None:
        return (reason, f"{older}; generation {wanted} comes next")
    behind = f"generation {wanted} is not loaded: {': '.join(facts.why)}"
    return (reason, _sentence(older, behind, what_comes_next(facts, moment)))


def _suspended(facts: Facts) -> tuple[str, str]:
    _, todo = doubt_in_words(facts, "Suspended")
    asked = "people asked that it stays as it is"
    return ("Requested", _sentence(asked, meanwhile(facts), todo))


def _warmed(facts: Facts) -> tuple[str, str]:
    serving = facts.serving
    notes = "; ".join(serving.notes) if serving is not None else ""
    if serving is not None and serving.warmed:
        return ("WarmedUp", notes)
    return ("NotWarmedUp", notes or "warmup is off")


def _reason_and_message(facts: Facts, moment: Moment) -> tuple[str, str]:
    """Why it is not as wanted, else the phase that it is in, as a reason and a message."""
    phase = phase_of(facts)
    busy = phase in (Phase.LOADING, Phase.UPDATING, Phase.TERMINATING)
    if facts.why is not None and not (busy and facts.failure is None):
        return facts.why[0], situation(facts, moment)
    return str(phase), _phase_in_words(facts, phase, moment)


def _phase_in_words(facts: Facts, phase: Phase, moment: Moment) -> str:
    loading, old = facts.loading, facts.draining
    if loading is not None and loading.trial:
        old_spec = facts.serving.spec if facts.serving is not None else None
        return f"{loading.spec.named_beside(old_spec)} is tried: {loading.trial}"
    if loading is not None:
        since = moment.clock(loading.loading_since_s)
        return f"generation {loading.spec.generation} is being loaded on {loading.device} since {since}"
    if phase is Phase.TERMINATING:
        return f"no file declares it; {draining_in_words(facts) or 'it is unloaded next'}"
    if old is not None and old.under_way:
        next_step = "" if phase is Phase.EVICTED else "; then it is loaded anew"
        return f"{draining_in_words(facts)}{next_step}"
    if phase is Phase.EVICTED:
        return PARKED
    return "it is loaded next"


def draining_in_words(facts: Facts) -> str:
    """What an instance that is on its way out waits for; empty if there is none."""
    old = facts.draining
    if old is None:
        return ""
    if not old.leases:
        return "it is being unloaded"
    ended = "1 running request has" if old.leases == 1 else f"{old.leases} running requests have"
    late = ", which takes longer than drain_timeout_s already" if old.drain_overdue else ""
    return f"it takes no new requests and is unloaded when {ended} ended{late}"


def _sentence(*parts: str) -> str:
    """Parts that say something, joined."""
    return "; ".join(part for part in parts if part)
