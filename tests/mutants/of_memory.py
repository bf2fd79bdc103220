"""Bugs in what memory is promised, in who takes turns, and in what others leave."""

from __future__ import annotations

import dataclasses
from math import inf
from typing import Any

from mutants.mutant import Mutant, instead
from splitlearn_manager.core import memory_watch, others_use, snapshot
from splitlearn_manager.core.ledger import Ceiling, Ledger
from splitlearn_manager.core.memory_watch import MemoryWatch
from splitlearn_manager.reconcile import filling, plan, room
from splitlearn_manager.reconcile.filling import Filling
from splitlearn_manager.reconcile.plan import _Planner
from splitlearn_manager.reconcile.room import Room


def _latest_request_first(real: Any) -> Any:
    def claim(self: Any, wanted: Any) -> Any:
        failed, priority, unasked, since, model_id = real(self, wanted)
        return (failed, priority, unasked, since if unasked else -since, model_id)

    return claim


def _believes_the_estimate(real: Any) -> Any:
    def resize(self: Any, key: str, mb: float) -> Any:
        return real(self, key, min(mb, self.reservations[key].mb))

    return resize


def _nobody_uses_it(real: Any) -> Any:
    def residents(views: Any, *rest: Any) -> Any:
        return real([dataclasses.replace(view, leases=0) for view in views], *rest)

    return residents


def _all_that_may_go(self: Any) -> list[Any]:
    """Each look takes one more, without waiting for the memory of those that went before."""
    found: list[Any] = []
    while some := _relieve(self):
        found += some
    return found


_relieve = _Planner._relieve


def _whatever_is_on_its_way(real: Any) -> Any:
    def first(self: Any, device: str, busy: Any) -> Any:
        return room.first_to_go(self._ledger, device, self._residents)

    return first


def _most_recently_used(real: Any) -> Any:
    def first(ledger: Any, device: str, residents: Any) -> Any:
        return real(
            ledger,
            device,
            [dataclasses.replace(r, last_used_s=-r.last_used_s) for r in residents],
        )

    return first


def _as_it_was_first(real: Any) -> Any:
    def look(self: Any) -> Any:
        return real(self) if self._read_s is None else None

    return look


def _others_never_leave(real: Any) -> Any:
    def next_use(use: Any, reading: Any, held: Any, now_s: float) -> Any:
        after = real(use, reading, held, now_s)
        return after if after.mb >= use.mb else dataclasses.replace(after, mb=use.mb)

    return next_use


def _no_more_than_in_the_end(real: Any) -> Any:
    def forecast(*arguments: Any) -> Any:
        return tuple(
            dataclasses.replace(found, peak_mb=max(found.now_mb, found.after_mb))
            for found in real(*arguments)
        )

    return forecast


MUTANTS = (
    Mutant(
        "what was just loaded for a request goes for the next one",
        "caches under thrash: two models that take turns are swapped for each single request",
        lambda: [(snapshot, "safe_until_s", lambda **times: -inf)],
    ),
    Mutant(
        "the latest request is served first",
        "stacks for queues: whoever waits longest goes on waiting",
        lambda: [instead(Filling, "_claim", _latest_request_first)],
    ),
    Mutant(
        "requests are kept from a busy model at once",
        "preemption without patience: every newcomer stops what is used all the time",
        lambda: [(filling, "PATIENCE_S", 1e-9)],
    ),
    Mutant(
        "a model that turns out larger is booked at its estimate",
        "limits checked before the load only: the sum of lies is the machine's memory",
        lambda: [instead(Ledger, "resize", _believes_the_estimate)],
    ),
    Mutant(
        "loads go on while others have the memory",
        "admission by the quota alone: the quota was honoured, and the kernel killed the process",
        lambda: [(Ledger, "under_pressure", lambda self, device: False)],
    ),
    Mutant(
        "memory that others have is promised to models",
        "budgets from the total: what the neighbour uses is promised twice",
        lambda: [(Ceiling, "mb", property(lambda self: self.total_mb - self.floor_mb))],
    ),
    Mutant(
        "nobody goes for others",
        "evict on admission only: the machine fills up, and idle models watch it",
        lambda: [(_Planner, "_relieve", lambda self: [])],
    ),
    Mutant(
        "all that is idle goes at once for others",
        "panic: a peak of a second empties the node",
        lambda: [
            (_Planner, "_relieve", _all_that_may_go),
            instead(Room, "first_to_go", _whatever_is_on_its_way),
        ],
    ),
    Mutant(
        "what is in use goes for others",
        "the out-of-memory killer's way",
        lambda: [instead(plan, "residents", _nobody_uses_it)],
    ),
    Mutant(
        "the most recently used goes first for others",
        "a second eviction path that sorts by itself, the wrong way round",
        lambda: [instead(room, "first_to_go", _most_recently_used)],
    ),
    Mutant(
        "the peak of an update is not foretold",
        "plans that add up the end state: it fits, and the way there does not",
        lambda: [instead(plan, "forecast", _no_more_than_in_the_end)],
    ),
    Mutant(
        "others are looked at once",
        "free memory read at the start: the neighbour that comes later is not known",
        lambda: [instead(MemoryWatch, "look", _as_it_was_first)],
    ),
    Mutant(
        "what others used once counts for ever",
        "high-water marks without a way down: after one peak the node stays half empty",
        lambda: [(memory_watch, "next_use", _others_never_leave(others_use.next_use))],
    ),
)
