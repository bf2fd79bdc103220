"""Why nothing serves a declared model: it loads, is parked, failed, or waits. A part of `explain`."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.reconcile import advice
from splitlearn_manager.reconcile.actions import TURN_S, Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.conditions import draining_in_words, next_retry_s, what_comes_next
from splitlearn_manager.reconcile.explanation import (
    Case,
    Explanation,
    drain_end,
    ends_lingering,
    hung_in_words,
    lingering_in_words,
    needs,
    origin,
    times,
    tries,
)
from splitlearn_manager.reconcile.record import ROLLOUTS_TAKEN_BACK

_LOADS_NAMED = 8

# By the planner's reason.
_HEADLINES = {
    "InsufficientMemory": "waits for memory",
    "MaxModels": "waits for a place: max_models are loaded",
    "MemoryPressure": "waits for memory that others use",
    "AwaitingMemory": "waits for memory that is on its way back",
    "AwaitingRoom": "is asked for, and waits for the room of another model",
    "AwaitingTurn": "waits for its turn to be loaded",
    "WeightsNotReady": "waits for its files, which are still changing",
    "DeviceNotFound": "waits for a device that this node does not have",
    "RateLimited": "is not tried for a while: its loads failed too often",
    "RolloutPending": "is loaded next, in the version that served last",
}
_CHANGE = "a change of its file or its weights"


def loading(case: Case, wanted: Wanted) -> Explanation:
    """Being loaded, perhaps in the version before."""
    facts, coming = case.facts, case.facts.loading
    assert coming is not None
    since = case.moment.clock(coming.loading_since_s)
    timeout_s = coming.spec.config.load_timeout_s
    end = case.moment.clock(coming.loading_since_s + timeout_s)
    waits_for = f"the load, which is given up at {end} (load_timeout_s = {timeout_s:g})"
    reserved = f"{coming.reserved_mb:,.0f} MB are reserved for it" if coming.reserved_mb else ""
    generation = coming.spec.generation
    if facts.failure is not None and coming.spec.version != wanted.spec.version:
        reason, message = facts.failure
        return case.says(
            f"goes back to generation {generation}: generation {wanted.spec.generation} could not "
            "be loaded",
            f"{reason}: {message}",
            f"being loaded on {coming.device} since {since}",
            reserved,
            waits_for=waits_for,
            would_help=advice.for_failure(facts, reason),
        )
    return case.says(
        f"is being loaded: generation {generation} on {coming.device} since {since}",
        reserved,
        tries(facts),
        waits_for=waits_for,
    )


def evicted(case: Case, wanted: Wanted) -> Explanation:
    """Parked: it comes back on request."""
    facts, config = case.facts, wanted.spec.config
    whys = ("MadeRoom", "Idle", "MemoryPressure")
    event = next((e for e in reversed(case.events) if e.reason in whys), None)
    at = f" at {case.moment.clock_of_unix(event.at)}" if event is not None else ""
    idle = event is not None and event.reason == "Idle"
    if idle and config.keep_alive_s is not None:
        why = f"it was unloaded{at}, idle for keep_alive_s = {config.keep_alive_s:g} s"
    elif idle:
        why = f"it was unloaded{at}, idle for its keep_alive_s"
    elif event is not None and event.reason == "MemoryPressure":
        why = f"it was unloaded{at} because others had taken the memory"
    elif event is not None:
        why = f"it was unloaded{at} to make room for another model"
    else:
        why = "it made room for another model, or was idle for its keep_alive_s"
    endpoint = config.effective_endpoint
    name = facts.model_id if endpoint == facts.model_id else f"{facts.model_id} or {endpoint}"
    return case.says(
        "is parked: the next request brings it back",
        why,
        draining_in_words(facts),
        "without requests nothing is swapped",
        waits_for=f"a request for {name}",
        would_help=(
            f"a request for {name}: it waits until the model is loaded",
            "a longer keep_alive_s, or `pinned: true`, in its file"
            if idle
            else "a higher priority or `pinned: true` in its file, or more room in server.yaml",
        ),
    )


def failed(case: Case) -> Explanation:
    """A load failed, or is sure to."""
    facts = case.facts
    reason, message = facts.failure or ("LoadFailed", "its load failed")
    attempt, retry_s = facts.failed_attempt, next_retry_s(facts)
    because = (f"{reason}: {message}", hung_in_words(facts))
    if reason == "RateLimited":
        return _rate_limited(case, reason, message, attempt, retry_s)
    would_help = advice.for_failure(facts, reason)
    if attempt is None or facts.waiting is None or not facts.waiting.failed:
        headline = "cannot be loaded" if attempt is None else f"could not be loaded{times(attempt)}"
        missing = facts.wanted is not None and not facts.wanted.weights_ready
        ends = "its files to be there" if missing else _CHANGE
        return case.says(
            f"{headline}: {reason}",
            *because,
            what_comes_next(facts, case.moment) if attempt is not None else "",
            waits_for="`resume`" if facts.suspended else ends if attempt is None else "its turn",
            would_help=would_help,
        )
    if retry_s is not None:
        at = case.moment.clock(retry_s)
        return case.says(
            f"could not be loaded{times(attempt)}; it is tried again at {at}",
            *because,
            "the pauses between tries grow up to a minute",
            waits_for=f"the next try at {at}, or {_CHANGE}",
            would_help=would_help,
        )
    return _given_up(case, attempt, because, would_help)


def pending(case: Case, wanted: Wanted) -> Explanation:
    """It waits for room, its turn, its files or its old copy."""
    facts = case.facts
    if facts.draining is not None and facts.draining.under_way:
        return case.says(
            "is loaded anew when its old copy is gone",
            draining_in_words(facts),
            waits_for=drain_end(facts),
        )
    if facts.waiting is None:
        return case.says("is loaded next", origin(facts), hung_in_words(facts))
    has_rollout = wanted.spec.config.rollout is not None
    former, new = facts.fallback if has_rollout or wanted.suspended else None, wanted
    wanted = former or wanted
    waits_for, would_help, because = wait_in_words(case, wanted, facts.waiting)
    headline = _HEADLINES.get(facts.waiting.reason, f"waits ({facts.waiting.reason})")
    if facts.waiting.reason == "InsufficientMemory" and advice.too_large_for_any(wanted, case.node):
        headline = "is too large for this node as it is set up"
    if former is not None:
        if facts.waiting.message not in because:
            because = (
                f"generation {former.spec.generation}, which served last, is loaded first",
                *because,
            )
        if has_rollout and not new.suspended:
            instead = f"without `rollout` in its file generation {new.spec.generation} is loaded in its place"
            would_help = (*would_help, instead)
    return case.says(
        headline,
        *because,
        hung_in_words(facts),
        lingering_in_words(facts),
        waits_for=waits_for,
        would_help=(*ends_lingering(facts), *would_help),
    )


def wait_in_words(
    case: Case, wanted: Wanted, waiting: Waiting
) -> tuple[str | None, Sequence[str], Sequence[str]]:
    """What it waits for, what would help, and why it waits."""
    facts, reason, because = case.facts, waiting.reason, (waiting.message,)
    if reason == "InsufficientMemory":
        too_large = advice.too_large_for_any(wanted, case.node)
        where = " or ".join(wanted.devices)
        waits_for = "a larger budget" if too_large else f"{wanted.mb:,.0f} MB on {where}"
        helps = advice.for_memory(facts, wanted, case.node, case.others)
        return waits_for, helps, (too_large or waiting.message, needs(wanted))
    if reason == "MaxModels":
        return (
            "a place under max_models",
            advice.for_place(facts, wanted, case.node, case.others),
            because,
        )
    if reason == "MemoryPressure":
        where = " or ".join(wanted.devices)
        helps = advice.for_pressure(facts, wanted, case.node, case.others)
        what = f"{wanted.mb:,.0f} MB on {where} that others do not use"
        return what, helps, (waiting.message, needs(wanted))
    if reason == "AwaitingRoom":
        helps = advice.for_memory(facts, wanted, case.node, case.others)
        return "another model's time to be over (each has a second at least)", helps, because
    if reason == "AwaitingMemory":
        return "memory that is on its way back", (), because
    if reason == "AwaitingTurn":
        under_way = sorted(v.model_id for v in case.others if v.state is State.LOADING)
        named = ", ".join(under_way[:_LOADS_NAMED])
        return (
            f"a load that is under way to end, or to take longer than {TURN_S:g} s",
            ("a higher priority in its file", "raise max_parallel_loads in server.yaml"),
            (*because, f"being loaded at this moment: {named}" if named else ""),
        )
    if reason == "WeightsNotReady":
        return "its files to stay the same for settle_s", ("finish copying them",), because
    if reason == "DeviceNotFound":
        return "its file to name another device", advice.for_failure(facts, reason), because
    until = case.moment.clock(waiting.until_s) if waiting.until_s is not None else None
    return until, (), because


def _rate_limited(
    case: Case, reason: str, message: str, attempt: Attempt | None, retry_s: float | None
) -> Explanation:
    at = f" before {case.moment.clock(retry_s)}" if retry_s is not None else " for a while"
    last = f"its last load: {attempt.reason}: {attempt.message}" if attempt is not None else ""
    failed_before = attempt or case.facts.attempt
    fixes = advice.for_failure(case.facts, failed_before.reason if failed_before else reason)
    return case.says(
        f"failed too often and is not tried{at}, whoever asks for it",
        message,
        last,
        hung_in_words(case.facts),
        waits_for="the limit on failed loads",
        would_help=[fix for fix in fixes if not fix.startswith("`retry")],
    )


def _given_up(
    case: Case, attempt: Attempt, because: Sequence[str], would_help: Sequence[str]
) -> Explanation:
    """Not tried again before something changes."""
    if case.facts.suspended:
        headline = f"could not be loaded{times(attempt)}, and is not tried again while suspended"
        return case.says(headline, *because, waits_for="`resume`", would_help=would_help)
    if case.facts.hung is not None:
        return case.says(
            f"could not be loaded{times(attempt)}: its load hangs",
            *because,
            waits_for=f"its loader to return, or {_CHANGE}",
            would_help=would_help,
        )
    if attempt.reason in ROLLOUTS_TAKEN_BACK:
        return case.says(
            "is not served: its version was taken back while it was tried, and there is no other",
            *because,
            waits_for=_CHANGE,
            would_help=would_help,
        )
    if attempt.retry_at_s is None:
        return case.says(
            f"could not be loaded{times(attempt)}, and trying again would not help",
            *because,
            waits_for=_CHANGE,
            would_help=would_help,
        )
    asked = case.facts.wanted is not None and case.facts.wanted.spec.config.update == "recreate"
    why = "its file asks for `update: recreate`" if asked else "there is no room for two versions"
    other = "`update: auto` or `surge` in its file, with" if asked else ""
    return case.says(
        f"could not be loaded{times(attempt)}, and is not tried again by itself",
        *because,
        f"{why}: each try of the update is an outage" if case.facts.serving is not None else "",
        waits_for=_CHANGE,
        would_help=(
            *would_help,
            f"{other} room for both versions: then a try costs nothing".strip(),
        ),
    )
