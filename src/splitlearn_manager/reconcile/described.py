"""Facts as data for JSON: what the HTTP API and the control socket give, and the command line renders.

Pure. The keys are public.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.reconcile.conditions import (
    Moment,
    Row,
    conditions_of,
    failed_for_good,
    next_retry_s,
    situation,
)
from splitlearn_manager.reconcile.events import Event
from splitlearn_manager.reconcile.facts import Facts, health_of, phase_of, sync_of
from splitlearn_manager.reconcile.node_facts import NodeFacts
from splitlearn_manager.reconcile.node_status import node_conditions
from splitlearn_manager.reconcile.record import HistoryEntry

Since = tuple[tuple[str, str, float], ...]
"""(type, status, unix time since when it has that status) of each condition."""


def since_of(statuses: Sequence[tuple[str, str]], before: Since, wall_s: float) -> Since:
    """Since when each condition (type, status) has its status: as before, or from this moment."""
    known = {(kind, status): at for kind, status, at in before}
    return tuple((kind, status, known.get((kind, status), wall_s)) for kind, status in statuses)


def model_dict(
    facts: Facts,
    *,
    moment: Moment,
    wall_s: float,
    phase_since: float,
    since: Since,
    events: Sequence[Event],
) -> dict[str, object]:
    """A model.

    Args:
        moment: when the facts were published.
        wall_s: unix time at which it is asked for.
        phase_since, since: since when it is in its phase, and its conditions have their status.
    """
    serving, wanted = facts.serving, facts.wanted
    newest = facts.views[-1] if facts.views else None
    config = wanted.spec.config if wanted else newest.spec.config if newest else None
    retry_s = next_retry_s(facts)
    retry_at = moment.unix(retry_s) if retry_s is not None else None
    attempt, why = facts.failed_attempt, facts.why
    return {
        "model_id": facts.model_id,
        "owner": "api" if facts.of_api else "directory",
        "phase": str(phase_of(facts)),
        "phase_since": phase_since,
        "sync": str(sync_of(facts)),
        "health": str(health_of(facts)),
        "reason": why[0] if why is not None else "",
        "message": situation(facts, moment),
        "next_retry_s": max(0.0, retry_at - wall_s) if retry_at is not None else None,
        "next_retry_at": retry_at,
        "failed_for_good": failed_for_good(facts),
        "attempts": attempt.failures if attempt is not None else 0,
        "generation": facts.generation,
        "observed_generation": facts.observed_generation,
        "source": facts.source.file if facts.source else wanted.source if wanted else "",
        "line": facts.source.line if facts.source else None,
        "held": facts.held,
        "suspended": facts.suspended,
        "endpoint": config.effective_endpoint if config else None,
        "priority": config.priority if config else 0,
        "pinned": config.pinned if config else False,
        "device": serving.device if serving else None,
        **dataclasses.asdict(sizes_of(facts)),
        "reserved_mb": sum(v.reserved_mb for v in facts.views),
        "in_flight": sum(v.leases for v in facts.views),
        "requests": sum(v.requests for v in facts.views),
        "errors": sum(v.errors for v in facts.views),
        "conditions": _conditions(conditions_of(facts, moment), since),
        "events": [
            {"at": e.at, "reason": e.reason, "message": e.message, "count": e.count} for e in events
        ],
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What a model was thought to take, and takes, in MB (2**20 bytes); None for what is not known.

    Attributes:
        estimated_mb: what its weights were thought to take before they were loaded.
        weights_mb, activations_mb: what its latest load measured: the weights, and a forward of its
            largest batch beside them.
        memory_mb: both of what serves; None while nothing does.
    """

    estimated_mb: float | None = None
    weights_mb: float | None = None
    activations_mb: float | None = None
    memory_mb: float | None = None


def sizes_of(facts: Facts) -> Sizes:
    """Of what serves, else of what is wanted."""
    serving, wanted = facts.serving, facts.wanted
    measured = serving.measured if serving else wanted.measured if wanted else None
    if measured is None:
        estimated_mb = wanted.mb or None if wanted is not None and serving is None else None
        held_mb = serving.measured_mb if serving else None
        return Sizes(estimated_mb, held_mb, None, held_mb)
    spec = serving.spec if serving else wanted.spec if wanted else None
    batch_size = spec.config.batch_size if spec else 1
    return Sizes(
        measured.estimated_mb,
        measured.weights_mb,
        measured.activations_mb(batch_size),
        measured.total_mb(batch_size) if serving else None,
    )


def history_dict(model_id: str, entries: Sequence[HistoryEntry]) -> dict[str, object]:
    """The versions of a model that were accepted, oldest first."""
    return {"model_id": model_id, "history": [dataclasses.asdict(entry) for entry in entries]}


def node_dict(node: NodeFacts, since: Since, phases: Mapping[str, int]) -> dict[str, object]:
    """The node.

    Args:
        since: since when its conditions have their status.
        phases: how many models are in each phase.
    """
    info, guard = node.info, node.prune_guard
    return {
        "directory": info.directory,
        "state_dir": info.state_dir,
        "process_id": info.process_id,
        "version": info.version,
        "started_at": info.started_at,
        "grpc": info.grpc,
        "http": info.http,
        "watch_mode": info.watch_mode,
        "watch_reason": info.watch_reason,
        "source_available": node.source_available,
        "source_message": node.source_message,
        "pending": node.pending,
        "settled": node.settled,
        "converged": node.converged,
        "problems": [_problem(problem) for problem in node.problems],
        "conflicts": {m: [str(ref) for ref in refs] for m, refs in sorted(node.conflicts.items())},
        "prune_guard": {
            "digest": guard.digest,
            "model_ids": list(guard.model_ids),
            "managed": guard.managed,
        }
        if guard is not None
        else None,
        "suspended": list(node.suspended),
        "restart_required": list(info.restart_required),
        "devices": [
            {
                "device": d.device,
                "reserved_mb": d.reserved_mb,
                "budget_mb": d.budget_mb,
                "limit_mb": d.limit_mb,
            }
            for d in node.devices
        ],
        "max_models": node.max_models,
        "models": dict(phases),
        "conditions": _conditions(node_conditions(node), since),
    }


def _conditions(rows: Sequence[Row], since: Since) -> list[dict[str, object]]:
    times = {kind: at for kind, _, at in since}
    return [
        {
            "type": row.type,
            "status": row.status,
            "reason": row.reason,
            "message": row.message,
            "since": times[row.type],
        }
        for row in rows
    ]


def _problem(problem: Problem) -> dict[str, object]:
    return {
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "key": problem.key,
        "message": problem.message,
    }
