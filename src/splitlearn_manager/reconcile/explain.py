"""Why a model is in its phase: what was tried, what it waits for, what would help.

Pure, and total: every combination of facts has an explanation with a headline. It explains what was
decided elsewhere and decides nothing. What is served is explained here, what is not in
`explain_unserved`; what would help is gathered in `advice`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.reconcile.actions import Wanted
from splitlearn_manager.reconcile.conditions import (
    Moment,
    doubt_in_words,
    doubt_of,
    draining_in_words,
)
from splitlearn_manager.reconcile.events import Event
from splitlearn_manager.reconcile.explain_unserved import (
    evicted,
    failed,
    loading,
    pending,
    wait_in_words,
)
from splitlearn_manager.reconcile.explanation import (
    Case,
    Explanation,
    drain_end,
    ends_lingering,
    hung_in_words,
    keep_alive,
    lingering_in_words,
    origin,
    requests,
    requests_of,
    takes,
    target,
    tries,
)
from splitlearn_manager.reconcile.facts import Facts, Phase, phase_of
from splitlearn_manager.reconcile.node_facts import NodeFacts

# By the reason of a doubt: the matter, and what ends it.
_DOUBT = {
    "SourceUnavailable": ("the desired directory cannot be read", "the directory to be readable"),
    "Suspended": ("it is suspended", "`resume`"),
    "Conflict": ("it is declared more than once", "all of its declarations but one to go"),
    "PruneGuard": (
        "no file declares it, but too many models would go at once",
        "a confirmation, or its file",
    ),
    "KeptLastGood": ("its file is invalid, and this is the last good spec", "a valid file"),
    "InDoubt": ("what its file says is in doubt", "that doubt to end"),
}


def explain(
    facts: Facts,
    node: NodeFacts,
    moment: Moment,
    others: Sequence[InstanceView] = (),
    events: Sequence[Event] = (),
) -> Explanation:
    """See the module's text.

    Args:
        others: the instances of all other models.
        events: what happened to the model, oldest first.
    """
    phase = phase_of(facts)
    case = Case(facts, phase, node, moment, others, events)
    if facts.of_api:
        return _of_api(case)
    if facts.wanted is None:
        return _terminating(case)
    return _with_doubt(case, _declared(case, facts.wanted))


def explain_conflict(model_id: str, refs: Sequence[SourceRef]) -> Explanation:
    """Of an id that several files claim, and that was never accepted."""
    places = " and ".join(str(ref) for ref in refs)
    return Explanation(
        model_id,
        str(Phase.PENDING),
        f"{model_id} is not accepted: it is declared more than once",
        (f"declared in {places}: which of them is meant cannot be told",),
        _DOUBT["Conflict"][1],
        (f"keep one of {places}; remove the others, or give them other ids",),
    )


def _declared(case: Case, wanted: Wanted) -> Explanation:
    if case.facts.taken_by_api:
        return _taken_by_api(case)
    if case.phase is Phase.READY:
        return _ready(case, wanted)
    if case.phase is Phase.UPDATING:
        return _updating(case, wanted)
    if case.phase is Phase.LOADING:
        return loading(case, wanted)
    waiting = case.facts.waiting
    if case.phase is Phase.EVICTED and (waiting is None or waiting.reason == "Evicted"):
        return evicted(case, wanted)
    if case.phase is Phase.FAILED:
        return failed(case)
    return pending(case, wanted)


# Not of the directory, or not any more.


def _of_api(case: Case) -> Explanation:
    facts = case.facts
    of_api = "it was loaded through the Python API: the directory never touches it"
    if (serving := facts.serving) is not None:
        return case.says(f"is well: it serves on {serving.device}", of_api, requests(facts))
    if (coming := facts.loading) is not None:
        since = case.moment.clock(coming.loading_since_s)
        headline = f"is being loaded on {coming.device} since {since}"
        return case.says(headline, of_api, waits_for="its load")
    if facts.draining is not None:
        return case.says(
            "is being unloaded", of_api, draining_in_words(facts), waits_for=drain_end(facts)
        )
    return case.says(
        "could not be loaded, and what its load holds is not back",
        of_api,
        hung_in_words(facts),
        waits_for="its loader to return",
        would_help=("start the node anew: a load that hangs cannot be stopped",),
    )


def _terminating(case: Case) -> Explanation:
    facts = case.facts
    late = facts.draining is not None and facts.draining.drain_overdue
    return case.says(
        "is being unloaded: no file declares it",
        draining_in_words(facts) or hung_in_words(facts),
        "running requests are never cut off" if late else "",
        waits_for=drain_end(facts),
        would_help=(*ends_lingering(facts), "to keep it, put its file back"),
    )


def _taken_by_api(case: Case) -> Explanation:
    model_id = case.facts.model_id
    return case.says(
        "is not loaded from its file: a model of that id was loaded through the Python API",
        "the directory never touches what the Python API loaded, and that one goes on answering",
        waits_for="that one to be unloaded",
        would_help=(
            f"unload it where it was loaded: `unload_model({model_id!r})`",
            "give the model in the file another model_id",
        ),
    )


# Something serves, or is just being replaced.


def _ready(case: Case, wanted: Wanted) -> Explanation:
    facts, serving = case.facts, case.facts.serving
    assert serving is not None
    serves = f"generation {serving.spec.generation}"
    if facts.up_to_date:
        late = draining_in_words(facts)
        return case.says(
            f"is well: {serves} serves on {serving.device}, as declared",
            origin(facts),
            requests(facts),
            takes(facts),
            lingering_in_words(facts) or (f"the version before it: {late}" if late else ""),
            keep_alive(facts, case.moment),
            would_help=ends_lingering(facts),
        )
    aim = target(wanted, serving)
    if facts.failure is not None:
        headline = f"{facts.model_id}: the update to {aim} failed; {serves} goes on serving"
        return replace(failed(case), headline=headline)
    waiting = facts.waiting
    if waiting is None:
        headline = f"is about to be updated to {aim}; {serves} goes on serving"
        return case.says(headline, origin(facts))
    waits_for, would_help, because = wait_in_words(case, wanted, waiting)
    return case.says(
        f"serves {serves}; the update to {aim} waits ({waiting.reason})",
        *because,
        lingering_in_words(facts),
        waits_for=waits_for,
        would_help=(*ends_lingering(facts), *would_help),
    )


def _updating(case: Case, wanted: Wanted) -> Explanation:
    facts, config = case.facts, wanted.spec.config
    coming, serving, old = facts.loading, facts.serving, facts.draining
    if coming is not None and serving is not None and coming.trial:
        model_id = facts.model_id
        return case.says(
            f"is being rolled out: {target(wanted, serving)} is tried beside generation "
            f"{serving.spec.generation}",
            coming.trial,
            requests_of(coming),
            waits_for="its steps, each of which takes for_s and min_requests answered requests",
            would_help=(
                f"`promote {model_id}` lets it take over at once",
                f"`abort {model_id}` takes it back",
            ),
        )
    if coming is not None and serving is not None:
        since = case.moment.clock(coming.loading_since_s)
        end = case.moment.clock(coming.loading_since_s + config.load_timeout_s)
        return case.says(
            f"is being updated: generation {serving.spec.generation} serves while "
            f"{target(wanted, serving)} is loaded beside it",
            f"it is loaded on {coming.device} since {since}, and takes over once it has been tried: "
            "no request fails",
            tries(facts),
            waits_for=f"the load, which is given up at {end} (load_timeout_s = "
            f"{config.load_timeout_s:g})",
        )
    assert old is not None
    why = "as its file asks for (update: recreate)" if config.update == "recreate" else ""
    return case.says(
        f"is being updated to {target(wanted, old)}: the old version goes first",
        why or "both do not fit at once",
        draining_in_words(facts),
        "nothing serves it until the new version does",
        waits_for=drain_end(facts),
        would_help=(
            "for updates without a gap: room for both versions, and `update: auto` or `surge`",
        ),
    )


# Whether the files are followed.


def _with_doubt(case: Case, found: Explanation) -> Explanation:
    """Adds what keeps the files from being followed, if anything does."""
    facts, guard = case.facts, case.node.prune_guard
    reason = doubt_of(facts)
    if reason is None:
        return found
    what, todo = doubt_in_words(facts, reason)
    matter, end = _DOUBT[reason]
    headline, waits_for = found.headline, found.waits_for
    if case.phase is Phase.READY and facts.up_to_date:
        headline = f"{facts.model_id} goes on serving generation {facts.generation}: {matter}"
        waits_for = end
    would_help = (todo, *found.would_help) if todo else found.would_help
    if reason == "PruneGuard" and guard is not None:
        what = (
            f"no file declares it, but {len(guard.model_ids)} of {guard.managed} models would be "
            "unloaded at once"
        )
        command = (
            f"`splitlearn-manager reconcile apply {shlex.quote(case.node.info.directory)} "
            f"--confirm-prune {guard.digest}`"
        )
        would_help = (*would_help, f"to let it go, with all that went with it: {command}")
    return replace(
        found,
        headline=headline,
        because=(what, *found.because),
        waits_for=waits_for,
        would_help=would_help,
    )
