"""The shape of an explanation, and the parts of sentences that several of them share. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.conditions import Moment
from splitlearn_manager.reconcile.events import Event
from splitlearn_manager.reconcile.facts import Facts, Phase
from splitlearn_manager.reconcile.node_facts import NodeFacts


@dataclass(frozen=True, slots=True)
class Explanation:
    """Sentences for people about one model.

    Attributes:
        headline: the matter in one line.
        because: what led to it, the most important first.
        waits_for: what it waits for, as a noun phrase; None if it waits for nothing.
        would_help: what people can do, the best first; empty where nothing is to be done.
    """

    model_id: str
    phase: str
    headline: str
    because: tuple[str, ...] = ()
    waits_for: str | None = None
    would_help: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "model_id": self.model_id,
            "phase": self.phase,
            "headline": self.headline,
            "because": list(self.because),
            "waits_for": self.waits_for,
            "would_help": list(self.would_help),
        }


@dataclass(frozen=True, slots=True)
class Case:
    """What is looked at, and who else is on the node."""

    facts: Facts
    phase: Phase
    node: NodeFacts
    moment: Moment
    others: Sequence[InstanceView]
    events: Sequence[Event]

    def says(
        self,
        headline: str,
        *because: str,
        waits_for: str | None = None,
        would_help: Sequence[str] = (),
    ) -> Explanation:
        return Explanation(
            self.facts.model_id,
            str(self.phase),
            f"{self.facts.model_id} {headline}",
            tuple(sentence for sentence in because if sentence),
            waits_for,
            tuple(would_help),
        )


def target(wanted: Wanted, old: InstanceView) -> str:
    if wanted.spec.generation != old.spec.generation:
        return f"generation {wanted.spec.generation}"
    return "the version with new weights"


def origin(facts: Facts) -> str:
    return f"generation {facts.generation} was accepted from {facts.source}" if facts.source else ""


def requests(facts: Facts) -> str:
    answered = sum(v.requests for v in facts.views)
    running = sum(v.leases for v in facts.views)
    requests_ = "1 request" if answered == 1 else f"{answered:,} requests"
    return f"{requests_} answered, {running:,} running" if answered or running else ""


def requests_of(tried: InstanceView) -> str:
    """How a version does that is tried."""
    answered = "1 request" if tried.requests == 1 else f"{tried.requests:,} requests"
    return f"it was asked {answered}, of which {tried.errors:,} failed"


def takes(facts: Facts) -> str:
    """What the serving model takes, and was thought to take; empty if that is not known."""
    serving = facts.serving
    if serving is None or serving.measured is None:
        return ""
    estimated_mb = serving.measured.estimated_mb
    before = f"; its weights were estimated at {estimated_mb:,.0f} MB" if estimated_mb else ""
    words = serving.measured.in_words(serving.spec.config.batch_size)
    return f"it takes {words} on {serving.device}{before}"


def needs(wanted: Wanted) -> str:
    """How it is known what a load of it needs; empty if it is not known."""
    if wanted.measured is not None:
        words = wanted.measured.in_words(wanted.spec.config.batch_size)
        return f"its last load measured {words}"
    return "that is an estimate of its weights; a load measures what it takes" if wanted.mb else ""


def keep_alive(facts: Facts, moment: Moment) -> str:
    waiting = facts.waiting
    if waiting is None or waiting.reason != "KeepAlive" or waiting.until_s is None:
        return ""
    return f"{waiting.message}: at {moment.clock(waiting.until_s)} unless a request comes before"


def drain_end(facts: Facts) -> str:
    old = facts.draining
    if old is not None and old.leases:
        return f"{old.leases} running request{'s' if old.leases > 1 else ''} to end"
    return "its memory to be back"


def hung_in_words(facts: Facts) -> str:
    hung = facts.hung
    if hung is None:
        return ""
    return (
        f"a load of generation {hung.spec.generation} was given up and has not returned; it keeps "
        f"{hung.reserved_mb:,.0f} MB on {hung.device} until it does"
    )


def lingering_in_words(facts: Facts) -> str:
    """What copies keep whose requests do not end; empty if there are none."""
    kept = facts.lingering
    if not kept:
        return ""
    leases = sum(v.leases for v in kept)
    ended = "1 running request has" if leases == 1 else f"{leases} running requests have"
    devices = " and ".join(sorted({v.device for v in kept}))
    return (
        f"a former copy keeps {sum(v.reserved_mb for v in kept):,.0f} MB on {devices} until {ended} ended, "
        "which takes longer than drain_timeout_s already"
    )


def ends_lingering(facts: Facts) -> tuple[str, ...]:
    """What would free that; nothing if there are no such copies."""
    return ("if requests hang, start the node anew: nothing else ends them",) * bool(
        facts.lingering
    )


def tries(facts: Facts) -> str:
    """Earlier loads of the wanted version that failed; empty if none did."""
    attempt = facts.failed_attempt
    if attempt is None:
        return ""
    return f"it could not be loaded{times(attempt)} before: {attempt.reason}: {attempt.message}"


def times(attempt: Attempt) -> str:
    """` once`, ` in 3 tries`."""
    return " once" if attempt.failures == 1 else f" in {attempt.failures} tries"
