"""What is going on with each model and with the node, for the HTTP API, the command line and metrics.

The loop publishes facts; `StatusBook` keeps them, and adds what cannot be told from one moment: since
when a condition or a phase has been as it is, and the events. What is shown is worded when it is asked
for, so that publishing costs little however many models there are, and a model keeps little.

It decides nothing. `facts` says what phase, sync and health mean, `conditions` and `node_status` word
the conditions, `explain` the explanations; `described` gives all of it as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.conditions import (
    Moment,
    acceptance_of,
    conditions_of,
    doubt_of,
    situation,
    statuses_of,
)
from splitlearn_manager.reconcile.described import Since, model_dict, node_dict, since_of
from splitlearn_manager.reconcile.events import EVENTS_KEPT, Event, EventLog
from splitlearn_manager.reconcile.explain import explain, explain_conflict
from splitlearn_manager.reconcile.facts import (
    Facts,
    Health,
    Phase,
    Sync,
    health_of,
    phase_of,
    sync_of,
)
from splitlearn_manager.reconcile.node_facts import DeviceUse, NodeFacts, NodeInfo
from splitlearn_manager.reconcile.node_status import node_conditions

__all__ = [
    "EVENTS_KEPT",
    "DeviceUse",
    "Entry",
    "Event",
    "Facts",
    "Health",
    "Moment",
    "NodeFacts",
    "NodeInfo",
    "Phase",
    "StatusBook",
    "Sync",
    "conditions_of",
    "health_of",
    "phase_of",
    "sync_of",
]

# Why a model waits, where people should read of it (events, log); other reasons pass by themselves.
WAITS_FOR_PEOPLE = frozenset(
    {
        "DeviceNotFound",
        "InsufficientMemory",
        "MaxModels",
        "MemoryPressure",
        "OverMemoryLimit",
        "OwnedByApi",
        "RateLimited",
        "WeightsNotFound",
    }
)
# Doubts that people end; the others end by themselves, or are the node's and not the model's.
_DOUBTS_WORTH_AN_EVENT = frozenset({"Conflict", "KeptLastGood", "PruneGuard"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one model. Another object as soon as anything about the model is another.

    Attributes:
        phase_since: unix time since when it is in its phase.
        since: since when its conditions have their status.
        doubt: why its file is not followed, as the events tell it; empty if it is.
    """

    facts: Facts
    phase: Phase
    phase_since: float
    since: Since
    doubt: str


@dataclass(frozen=True, slots=True)
class _Board:
    """All that was published last; swapped whole, so that readers need no lock."""

    entries: Mapping[str, Entry]
    phases: Mapping[str, Phase]
    node: NodeFacts
    node_since: Since
    moment: Moment
    revision: int


class StatusBook:
    """See the module's text. One thread publishes; any thread may do anything else.

    Args:
        wall: unix time, in seconds.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._log = EventLog(wall)
        node, moment = NodeFacts(), Moment(0.0, wall())
        since = _node_since(node, (), moment)
        self._board = _Board({}, {}, node, since, moment, 0)

    # Told by the loop.

    def record(self, model_id: str, reason: str, message: str) -> None:
        """Something happened to a model. A repetition of its latest event is counted."""
        self._log.record(model_id, reason, message)

    def publish(self, facts: Sequence[Facts], node: NodeFacts, now_s: float) -> None:
        """Replaces what is shown, and adds events of what people should read of: a new generation, a
        file that is not followed, a wait that does not pass by itself.

        Models without facts are forgotten; the node keeps its events of them.

        Args:
            facts: of every model. Those that are as before cost a comparison.
            now_s: the moment on the manager's clock, to which the facts' times refer.
        """
        board, moment = self._board, Moment(now_s, self._wall())
        entries: dict[str, Entry] = {}
        shared: dict[Since, Since] = {}
        changed = False
        for fact in facts:
            before = board.entries.get(fact.model_id)
            if before is None or (before.facts is not fact and before.facts != fact):
                changed = True
                entry = _entry(fact, before, moment, shared)
                self._tell(entry, before, moment)
                entries[fact.model_id] = entry
            else:
                entries[fact.model_id] = before
        changed = changed or len(entries) != len(board.entries)
        if changed:
            self._log.forget_all_but(entries)
        elif node == board.node:
            # The same, seen later: a step of the wall clock moves what is shown of times to come.
            self._board = _Board(
                board.entries, board.phases, board.node, board.node_since, moment, board.revision
            )
            return
        self._board = _Board(
            entries=entries,
            phases={model_id: entry.phase for model_id, entry in entries.items()},
            node=node,
            node_since=_node_since(node, board.node_since, moment),
            moment=moment,
            revision=board.revision + 1,
        )

    def _tell(self, entry: Entry, before: Entry | None, moment: Moment) -> None:
        """Events of what has changed about a model, beside what the loop records itself."""
        facts = entry.facts
        accepted = before.facts.generation if before is not None else None
        is_new = facts.wanted is not None and facts.generation != accepted
        if is_new or entry.doubt != (before.doubt if before is not None else ""):
            self.record(facts.model_id, *acceptance_of(facts))
        if facts.suspended != (before.facts.suspended if before is not None else False):
            told = "it stays as it is" if facts.suspended else "its file is followed again"
            self.record(facts.model_id, "Suspended" if facts.suspended else "Resumed", told)
        reason = facts.why[0] if facts.why is not None else ""
        known = before.facts.why if before is not None else None
        attempt = facts.failed_attempt
        is_told = attempt is not None and attempt.reason == reason  # when the load failed
        if reason in WAITS_FOR_PEOPLE and not is_told and (known is None or known[0] != reason):
            self.record(facts.model_id, reason, situation(facts, moment))

    # Asked by anybody.

    @property
    def revision(self) -> int:
        """Another number as soon as something that is shown, events aside, is another."""
        return self._board.revision

    @property
    def phases(self) -> Mapping[str, Phase]:
        """The phase of each model; another object whenever `revision` is another."""
        return self._board.phases

    def comes(self, model_id: str) -> bool:
        """Whether requests may wait for it: it has not failed, or is loaded again as soon as it can be."""
        board = self._board
        if board.phases.get(model_id) is not Phase.FAILED:
            return True
        entry = board.entries.get(model_id)
        return entry is not None and entry.facts.comes_back

    def in_short(self, model_id: str) -> str:
        """A model's phase, with the reason where that says more: `Failed (LoadFailed)`."""
        board = self._board
        phase = str(board.phases.get(model_id, Phase.PENDING))
        entry = board.entries.get(model_id)
        why = entry.facts.why if entry is not None else None
        return f"{phase} ({why[0]})" if why is not None and why[0] != phase else phase

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is kept of each model; an entry is another object whenever its model has changed."""
        return self._board.entries

    @property
    def node_facts(self) -> NodeFacts:
        """What was published of the node last."""
        return self._board.node

    @property
    def moment(self) -> Moment:
        """When it was published last."""
        return self._board.moment

    @property
    def published(self) -> Mapping[str, Mapping[str, object]]:
        """All models, described, by id."""
        board = self._board
        return {m: self._describe(board, board.entries[m]) for m in sorted(board.entries)}

    def describe(self, model_id: str) -> dict[str, object] | None:
        """One model, as data for JSON; None if there is none of that id."""
        board = self._board
        entry = board.entries.get(model_id)
        return self._describe(board, entry) if entry is not None else None

    def models(self) -> list[dict[str, object]]:
        """All models, as data for JSON, sorted by id."""
        board = self._board
        return [self._describe(board, board.entries[m]) for m in sorted(board.entries)]

    def node(self) -> dict[str, object]:
        """The node itself, as data for JSON."""
        board = self._board
        counts = dict.fromkeys((str(phase) for phase in Phase), 0)
        for phase in board.phases.values():
            counts[str(phase)] += 1
        return node_dict(board.node, board.node_since, counts)

    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[list[dict[str, object]], int]:
        """Events after a serial, oldest first, and the serial to ask with the next time.

        The node keeps its latest 1,000; a repeated one is given anew, with its count. A serial that
        was never given out comes from an earlier process of the node: then all are given.
        """
        found, last = self._log.since(after, model_id)
        return [event.as_dict() for event in found], last

    def explain(self, model_id: str) -> dict[str, object] | None:
        """Why the model is in its phase, as data for JSON; None if there is none of that id."""
        board = self._board
        entry = board.entries.get(model_id)
        if entry is not None:
            others = _views_of_others(board, model_id)
            events = self._log.of_model(model_id)
            return explain(entry.facts, board.node, board.moment, others, events).as_dict()
        refs = board.node.conflicts.get(model_id)
        return explain_conflict(model_id, refs).as_dict() if refs else None

    def _describe(self, board: _Board, entry: Entry) -> dict[str, object]:
        facts = entry.facts
        return model_dict(
            facts,
            moment=board.moment,
            wall_s=self._wall(),
            phase_since=entry.phase_since,
            since=entry.since,
            events=self._log.of_model(facts.model_id),
        )


def _entry(facts: Facts, before: Entry | None, moment: Moment, shared: dict[Since, Since]) -> Entry:
    """What is kept of a model. Equal values of many models are one object: it is `shared`."""
    phase, doubt = phase_of(facts), doubt_of(facts) or ""
    since = since_of(statuses_of(facts), before.since if before is not None else (), moment.wall_s)
    if doubt and doubt not in _DOUBTS_WORTH_AN_EVENT:
        doubt = before.doubt if before is not None else ""
    since_phase = moment.wall_s
    if before is not None and before.phase is phase:
        since_phase = before.phase_since
    return Entry(facts, phase, since_phase, shared.setdefault(since, since), doubt)


def _node_since(node: NodeFacts, before: Since, moment: Moment) -> Since:
    statuses = [(row.type, row.status) for row in node_conditions(node)]
    return since_of(statuses, before, moment.wall_s)


def _views_of_others(board: _Board, model_id: str) -> list[InstanceView]:
    return [
        view
        for other, entry in board.entries.items()
        if other != model_id
        for view in entry.facts.views
    ]
