"""Tells what a turn found: facts of each model and of the node for the status book, problems for the log.

It words nothing that is shown (`status` does) and decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredModel, DesiredState
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.actions import TURN_S, Action, Observed, Plan, Waiting, Wanted
from splitlearn_manager.reconcile.status import DeviceUse, Facts, NodeFacts, NodeInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """All that a turn found and did."""

    desired: DesiredState
    wanted: Mapping[str, Wanted]
    observed: Observed
    plan: Plan
    executed: tuple[Action, ...]


def facts_of(found: Found) -> list[Facts]:
    """The facts of each model that is declared or runs, sorted by id."""
    desired, observed = found.desired, found.observed
    views: dict[str, tuple[InstanceView, ...]] = {}
    for view in observed.snapshot.instances:
        views[view.model_id] = (*views.get(view.model_id, ()), view)
    turns = _awaiting_turn(found.plan, found.executed, observed.max_parallel_loads)
    problems: dict[str, tuple[Problem, ...]] = {}
    for problem in desired.problems:
        problems[problem.file] = (*problems.get(problem.file, ()), problem)

    def facts(model_id: str, model: DesiredModel | None) -> Facts:
        return Facts(
            model_id=model_id,
            wanted=found.wanted.get(model_id),
            views=views.get(model_id, ()),
            attempt=observed.attempts.get(model_id),
            parked=model_id in observed.parked,
            waiting=found.plan.waiting_for(model_id) or turns.get(model_id),
            held=(model.held or "") if model is not None else "",
            source_available=desired.source_available,
            suspended=model is not None and model.suspended,
            guarded=model is not None and model.guarded,
            conflict=desired.conflicts.get(model_id, ()),
            fallback=observed.fallbacks.get(model_id),
            problems=problems.get(model.source.file, ()) if model is not None else (),
            source=model.source if model is not None else None,
        )

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
    found: Found, info: NodeInfo, *, settled: bool, converged: bool, state_problem: str
) -> NodeFacts:
    """The facts of the node."""
    desired, ledger = found.desired, found.observed.snapshot.ledger
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
        suspended=tuple(sorted(m for m, model in desired.models.items() if model.suspended)),
        state_problem=state_problem,
        devices=tuple(
            DeviceUse(device, ledger.used_mb(device), budget_mb)
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
        for problem in sorted(problems - self._said):
            log_event(log, logging.ERROR, "Problem", problem)
        for problem in sorted(self._said - problems):
            log_event(log, logging.INFO, "Resolved", problem)
        self._said = frozenset(problems)


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
