"""Tells what a turn found: facts of each model and of the node for the status book, problems for the log.

It words nothing that is shown (`status` does) and decides nothing.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.scanner import SERVER_FILE
from splitlearn_manager.desired.state import DesiredModel, DesiredState, PruneGuard
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.acting import Told
from splitlearn_manager.reconcile.actions import TURN_S, Action, Observed, Plan, Waiting, Wanted
from splitlearn_manager.reconcile.conditions import (
    Moment,
    meanwhile,
    situation,
    what_comes_next,
)
from splitlearn_manager.reconcile.status import (
    WAITS_FOR_PEOPLE,
    DeviceUse,
    Entry,
    Facts,
    NodeFacts,
    NodeInfo,
)

log = logging.getLogger(__name__)

_NAMED = 5
# So many new waits are said in one turn; in a large directory thousands may begin at once.
_WAITS_SAID = 20


_AS_TUPLE = operator.attrgetter(*Facts.__slots__)


@dataclass(frozen=True)
class Found:
    """All that a turn found and did.

    Attributes:
        told: what was done at once, for the events: model id, reason, message.
    """

    desired: DesiredState
    wanted: Mapping[str, Wanted]
    observed: Observed
    plan: Plan
    executed: tuple[Action, ...]
    told: tuple[Told, ...] = ()


def facts_of(found: Found, before: Mapping[str, Entry]) -> list[Facts]:
    """The facts of each model that is declared or runs, sorted by id.

    Args:
        before: what was told last; facts that are as they were are the very same objects.
    """
    desired, observed = found.desired, found.observed
    views: dict[str, tuple[InstanceView, ...]] = {}
    for view in observed.snapshot.instances:
        views[view.model_id] = (*views.get(view.model_id, ()), view)
    turns = _awaiting_turn(found.plan, found.executed, observed.max_parallel_loads)
    problems: dict[str, tuple[Problem, ...]] = {}
    for problem in desired.problems:
        problems[problem.file] = (*problems.get(problem.file, ()), problem)

    def facts(model_id: str, model: DesiredModel | None) -> Facts:
        now = (
            model_id,
            found.wanted.get(model_id),
            views.get(model_id, ()),
            observed.attempts.get(model_id),
            model_id in observed.parked,
            found.plan.waiting_for(model_id) or turns.get(model_id),
            (model.held or "") if model is not None else "",
            desired.source_available,
            model is not None and model.suspended,
            model is not None and model.guarded,
            desired.conflicts.get(model_id, ()),
            observed.fallbacks.get(model_id),
            problems.get(model.source.file, ()) if model is not None else (),
            model.source if model is not None else None,
        )
        known = before.get(model_id)
        # Compared before they are made: of thousands nearly all are as they were.
        if known is not None and _AS_TUPLE(known.facts) == now:
            return known.facts
        return Facts(*now)

    ids = sorted({*found.wanted, *views})
    return [facts(model_id, desired.models.get(model_id)) for model_id in ids]


def with_views(facts: list[Facts], snapshot: Snapshot) -> list[Facts]:
    """The same facts, with what is counted of the instances (requests and the like) as it is now."""
    views: dict[str, tuple[InstanceView, ...]] = {}
    for view in snapshot.instances:
        views[view.model_id] = (*views.get(view.model_id, ()), view)
    return [_with_views(f, views[f.model_id]) if f.model_id in views else f for f in facts]


def _with_views(facts: Facts, views: tuple[InstanceView, ...]) -> Facts:
    if facts.views == views:
        return facts
    values = {name: getattr(facts, name) for name in Facts.__slots__}
    return Facts(**{**values, "views": views})


def node_facts(
    found: Found,
    info: NodeInfo,
    *,
    asked: Collection[str],
    settled: bool,
    converged: bool,
    state_problem: str,
) -> NodeFacts:
    """The facts of the node.

    Args:
        asked: the ids that people asked to leave as they are.
    """
    desired, ledger = found.desired, found.observed.snapshot.ledger
    models = desired.models
    return NodeFacts(
        info=info,
        source_available=desired.source_available,
        source_message=desired.source_message,
        complete=desired.complete,
        pending=not desired.complete or desired.next_check_s is not None,
        settled=settled,
        converged=converged,
        problems=desired.problems,
        conflicts=desired.conflicts,
        prune_guard=desired.prune_guard,
        suspended=tuple(sorted(m for m in asked if m in models and models[m].suspended)),
        state_problem=state_problem,
        devices=tuple(
            DeviceUse(device, ledger.used_mb(device), budget_mb, ledger.ceilings.get(device))
            for device, budget_mb in sorted(ledger.budgets_mb.items())
        ),
        max_models=ledger.max_models,
        max_parallel_loads=found.observed.max_parallel_loads,
    )


def names_of(wanted: Mapping[str, Wanted]) -> Mapping[str, tuple[str, ...]]:
    """The declared models by every name that a request may use: endpoint or model id, endpoint first."""
    names: dict[str, tuple[str, ...]] = {}
    ids = sorted(wanted)
    for model_id in ids:
        endpoint = wanted[model_id].spec.config.effective_endpoint
        names[endpoint] = (*names.get(endpoint, ()), model_id)
    for model_id in ids:
        if model_id not in names:
            names[model_id] = (model_id,)
    return names


class ProblemLog:
    """Says once, in one line each, what is wrong in the directory, and when it is well again."""

    def __init__(self) -> None:
        self._said: frozenset[str] = frozenset()

    def say(self, desired: DesiredState) -> None:
        problems = {str(problem) for problem in desired.problems}
        if not desired.source_available:
            problems.add(desired.source_message)
        if desired.prune_guard is not None:
            problems.add(_guard_in_words(desired.prune_guard))
        if new := problems - self._said:
            follows = _what_follows(desired)
            for problem in sorted(new):
                log_event(log, logging.ERROR, "Problem", problem, meanwhile=follows[problem])
        for problem in sorted(self._said - problems):
            log_event(log, logging.INFO, "Resolved", problem)
        self._said = frozenset(problems)


def _guard_in_words(guard: PruneGuard) -> str:
    named = ", ".join(guard.model_ids[:_NAMED])
    more = len(guard.model_ids) - _NAMED
    return (
        f"prune guard {guard.digest}: no file declares {len(guard.model_ids)} of {guard.managed} models "
        f"any more ({named}{f' and {more} more' if more > 0 else ''})"
    )


def _what_follows(desired: DesiredState) -> dict[str, str]:
    """What happens meanwhile, by the problem as it is said."""
    kept: dict[str, list[str]] = {}
    for model_id, model in desired.models.items():
        if model.held:
            stays = f"{model_id} stays at generation {model.generation}"
            for file in {ref.file for ref in (model.source, *model.claimed_by)}:
                kept.setdefault(file, []).append(stays)
    follows = {}
    for problem in desired.problems:
        stay = kept.get(problem.file, ())
        if problem.file == SERVER_FILE:
            what = "the settings in force stay"
        elif stay:
            what = ", ".join(stay[:_NAMED]) + (
                f" and {len(stay) - _NAMED} more stay as they were" if len(stay) > _NAMED else ""
            )
        else:
            what = "left out until that is corrected"
        follows[str(problem)] = what
    if not desired.source_available:
        follows[desired.source_message] = "everything stays as it is until it can be read"
    if (guard := desired.prune_guard) is not None:
        follows[_guard_in_words(guard)] = (
            "all of them stay; put their files back, or confirm with "
            f"`apply DIRECTORY --confirm-prune {guard.digest}`"
        )
    return follows


class SituationLog:
    """Says once, in one line each, which models are not as declared, and what becomes of them.

    That a load failed, and why, its own line has said before: here follows what goes on meanwhile, and
    when it is tried again.
    """

    def __init__(self) -> None:
        self._said: dict[str, tuple[object, ...]] = {}
        self._facts: dict[str, Facts] = {}

    def say(self, facts: Sequence[Facts], moment: Moment) -> None:
        said: dict[str, tuple[object, ...]] = {}
        known, self._facts = self._facts, {fact.model_id: fact for fact in facts}
        waits = 0
        for fact in facts:
            if fact.waiting is None and fact.attempt is None:
                continue
            if known.get(fact.model_id) is fact:
                if fact.model_id in self._said:
                    said[fact.model_id] = self._said[fact.model_id]
                continue
            key = _situation_key(fact, moment)
            before = self._said.get(fact.model_id)
            if key is not None and key != before and fact.failed_attempt is None:
                waits += 1
                if waits > _WAITS_SAID:
                    said[fact.model_id] = key
                    continue
            if key is not None and key != before:
                _say_situation(fact, moment)
            if key is None and fact.failed_attempt is not None:
                key = before  # it is being tried again, or about to be
            if key is not None:
                said[fact.model_id] = key
        if waits > _WAITS_SAID:
            message = f"{waits - _WAITS_SAID} more models wait; `status` lists them"
            log_event(log, logging.WARNING, "NotAsDeclared", message)
        self._said = said


def _situation_key(fact: Facts, moment: Moment) -> tuple[object, ...] | None:
    """Another value where there is something new to say; None where there is nothing."""
    if fact.why is None or fact.loading is not None:
        return None
    attempt = fact.failed_attempt
    if attempt is not None and fact.why[0] == attempt.reason:
        if fact.waiting is None or not fact.waiting.failed:
            return None
        return (attempt.reason, attempt.failures, what_comes_next(fact, moment))
    reason = fact.why[0]
    return (reason,) if reason in WAITS_FOR_PEOPLE else None


def _say_situation(fact: Facts, moment: Moment) -> None:
    attempt, why = fact.failed_attempt, fact.why
    if attempt is not None and why is not None and why[0] == attempt.reason:
        said = "; ".join(s for s in (meanwhile(fact), what_comes_next(fact, moment)) if s)
    else:
        said = situation(fact, moment)
    reason = why[0] if why is not None else ""
    fields: dict[str, object] = {"model": fact.model_id, "reason": reason}
    if attempt is not None:
        fields["failed"] = attempt.failures
    log_event(log, logging.WARNING, "NotAsDeclared", said, exc_info=None, **fields)


def _awaiting_turn(
    made: Plan, executed: tuple[Action, ...], max_parallel_loads: int
) -> dict[str, Waiting]:
    """What is said of the models whose loads fit, and were not started for want of a slot."""
    message = (
        f"{max_parallel_loads} models may be loaded at a time (max_parallel_loads), those aside that "
        f"take longer than {TURN_S:g} s"
    )
    return {
        action.model_id: Waiting(action.model_id, "AwaitingTurn", message)
        for action in made.actions
        if action.takes_turn and action not in executed
    }
