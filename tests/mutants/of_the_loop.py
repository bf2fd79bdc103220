"""Bugs in retrying, planning, telling, and in what a node keeps over a restart."""

from __future__ import annotations

import dataclasses
from typing import Any

from mutants.mutant import Mutant, instead
from simulation.machine import StateFiles
from splitlearn_manager.core import model_reader
from splitlearn_manager.core.events import EventKind
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.operations import Operations
from splitlearn_manager.reconcile import backoff, conditions, memory, plan, turns
from splitlearn_manager.reconcile.backoff import FailureRate
from splitlearn_manager.reconcile.keeping import Keeper
from splitlearn_manager.reconcile.memory import Memory
from splitlearn_manager.reconcile.orders import Orders
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.record import ModelRecord
from splitlearn_manager.reconcile.standing import Standing
from splitlearn_manager.reconcile.turns import Turns
from splitlearn_manager.reconcile.waiters import Waiters


def _demands_count_as_failures(real: Any) -> Any:
    def join(self: Any, model_id: str, timeout_s: float) -> Any:
        attempts = self._memory.attempts
        if (attempt := attempts.get(model_id)) is not None:
            attempts[model_id] = dataclasses.replace(attempt, failures=attempt.failures + 1)
        return real(self, model_id, timeout_s)

    return join


def _nothing_is_terminal(real: Any) -> Any:
    def after_failure(previous: Any, outcome: Any, draw: float) -> Any:
        return real(previous, dataclasses.replace(outcome, terminal=False), draw)

    return after_failure


def _failures_keep_their_slots(real: Any) -> Any:
    def carry_out(
        made: Any, manager: Any, snapshot: Any, most: int, now_s: float, tell: Any
    ) -> Any:
        failed = sum(not outcome.ok for outcome in snapshot.outcomes.values())
        return real(made, manager, snapshot, most - failed, now_s, tell)

    return carry_out


def _in_the_order_it_comes(of: Any, key: Any = None) -> Any:
    return list(of)


def _nothing_to_go_back_to(real: Any) -> Any:
    def init(self: Any, desired: Any, observed: Any) -> None:
        real(self, desired, dataclasses.replace(observed, fallbacks={}))

    return init


def _unloaded_is_parked(real: Any) -> Any:
    def event(self: Any, happened: Any) -> None:
        real(self, happened)
        if happened.kind is EventKind.UNLOADED and happened.reason == "Pruned":
            self.parked[happened.model_id] = happened.at_s + 1e9

    return event


def _any_version_is_the_version(real: Any) -> Any:
    def statuses_of(facts: Any) -> Any:
        ready = "True" if facts.serving is not None else "False"
        return tuple((kind, ready if kind == "Ready" else s) for kind, s in real(facts))

    return statuses_of


def _saves_a_turn_late(real: Any) -> Any:
    def save(self: Any, *, recheck: bool) -> None:
        late = self.__dict__.get("late", False)
        self.__dict__["late"] = self._dirty and not late
        if late or not self._dirty:
            real(self, recheck=recheck)

    return save


def _written_in_two_steps(real: Any) -> Any:
    def put(self: Any, name: str, data: bytes) -> None:
        real(self, name, data[: len(data) // 2])
        self._machine.effect("state")
        real(self, name, data)

    return put


def _forgets_what_is_suspended(real: Any) -> Any:
    def restore(self: Any, suspended: Any, confirmed_prune: str) -> None:
        real(self, (), confirmed_prune)

    return restore


def _sleeps_through(real: Any) -> Any:
    def holds(self: Any, basis: Any, snapshot: Any, now_s: float) -> bool:
        return real(self, basis, snapshot, -1e9)

    return holds


def _last_first(real: Any) -> Any:
    def carry_out(made: Any, *arguments: Any) -> Any:
        return real(dataclasses.replace(made, actions=made.actions[::-1]), *arguments)

    return carry_out


def _observes_nothing_parked(real: Any) -> Any:
    def observe(self: Any) -> Any:
        found = real(self)
        return dataclasses.replace(found, observed=dataclasses.replace(found.observed, parked={}))

    return observe


def _always_due(real: Any) -> Any:
    def summary(self: Any, *arguments: Any, **options: Any) -> Any:
        turn = real(self, *arguments, **options)
        return turn if turn.settled else dataclasses.replace(turn, next_s=0.0)

    return summary


def _without_cap(failures: int, draw: float) -> float:
    return float(2.0 ** min(failures - 1, 16))


MUTANTS = (
    Mutant(
        "retries grow with unrelated triggers",
        "controllers whose backoff counts every reconcile of the object, not its failures",
        lambda: [instead(Reconciler, "join", _demands_count_as_failures)],
    ),
    Mutant(
        "there is no backoff",
        "restart: always, at full speed",
        lambda: [(backoff, "delay_s", lambda failures, draw: 0.0)],
    ),
    Mutant(
        "the backoff does not grow",
        "retries at a fixed interval: everything that failed together comes back together",
        lambda: [(backoff, "delay_s", lambda failures, draw: 0.9)],
    ),
    Mutant(
        "the backoff has no cap",
        "exponential backoff left alone over a weekend: the cause is gone, the next try is days away",
        lambda: [(backoff, "delay_s", _without_cap)],
    ),
    Mutant(
        "a fix waits for the backoff of what it fixes",
        "backoff by name instead of by version: the corrected manifest sits in the queue",
        lambda: [
            (
                backoff.Attempt,
                "concerns",
                lambda self, spec: self.spec.model_id == spec.model_id,
            )
        ],
    ),
    Mutant(
        "terminal failures are retried",
        "ImagePullBackOff on a name that cannot exist",
        lambda: [instead(memory, "after_failure", _nothing_is_terminal)],
    ),
    Mutant(
        "nothing limits the rate",
        "backoff that each new version, and each impatient person, resets",
        lambda: [(FailureRate, "limited", lambda self, now_s: {})],
    ),
    Mutant(
        "a failed load keeps its slot",
        "poll-mode model servers that freeze after one bad model",
        lambda: [instead(turns, "carry_out", _failures_keep_their_slots)],
    ),
    Mutant(
        "the plan depends on the order of its input",
        "iteration over maps: two nodes with the same files decide differently",
        lambda: [(plan, "sorted", _in_the_order_it_comes)],
    ),
    Mutant(
        "actions are executed in another order than planned",
        "apply by kind or at random: what makes room comes after what needs it",
        lambda: [instead(turns, "carry_out", _last_first)],
    ),
    Mutant(
        "a dry run does not know what is parked",
        "diffs against the files alone: what they announce is not what is done",
        lambda: [instead(Turns, "observe", _observes_nothing_parked)],
    ),
    Mutant(
        "the loop spins while something is pending",
        "requeue without delay: one object that waits costs a whole core",
        lambda: [instead(Turns, "_summary", _always_due)],
    ),
    Mutant(
        "a request for a parked model is not heard",
        "activators that lose the first request: scaled to zero, for good",
        lambda: [(Waiters, "at", lambda self, now_s: {})],
    ),
    Mutant(
        "there is no way back from a failed update",
        "recreate strategies: the old one is gone, the new one does not start",
        lambda: [instead(plan._Planner, "__init__", _nothing_to_go_back_to)],
    ),
    Mutant(
        "what is declared again while it unloads is lost",
        "delete-and-recreate during Terminating: the object is there, and nobody acts on it",
        lambda: [instead(Memory, "event", _unloaded_is_parked)],
    ),
    Mutant(
        "Ready is said of an older generation",
        "a status without observedGeneration: the pipeline goes green on the old version",
        lambda: [instead(conditions, "statuses_of", _any_version_is_the_version)],
    ),
    Mutant(
        "state is written after it was acted on",
        "write-behind: what was served a moment before the crash never was",
        lambda: [instead(Keeper, "save", _saves_a_turn_late)],
    ),
    Mutant(
        "state is not written at all after the start",
        "a checkpoint made at a clean shutdown only",
        lambda: [(Keeper, "save", lambda self, *, recheck: None)],
    ),
    Mutant(
        "state files are written in place",
        "a crash in the middle of a write leaves half a file, and what it held is forgotten",
        lambda: [instead(StateFiles, "put", _written_in_two_steps)],
    ),
    Mutant(
        "a restart forgets what is suspended",
        "a pause that lives in memory: the incident's mitigation ends with the pod",
        lambda: [instead(Orders, "restore", _forgets_what_is_suspended)],
    ),
    Mutant(
        "a restart forgets the way back",
        "rollback history that is not kept: after a crash in the middle of a bad update nothing serves",
        lambda: [(ModelRecord, "to_go_back_to", property(lambda self: None))],
    ),
    Mutant(
        "a restart forgets what loads measured",
        "caches of sizes in memory: after a crash everything is guessed again, at the worst moment",
        lambda: [(Operations, "restore_measurements", lambda self, model_id, measured: None)],
    ),
    Mutant(
        "what one version measured is taken for another's",
        "sizes cached by name: the new version is admitted at the old one's size",
        lambda: [(model_reader, "of_version", lambda kept, version: kept[-1] if kept else None)],
    ),
    Mutant(
        "larger batches are let in without the room for them",
        "a limit that is raised live, and memory that is accounted for at the next load",
        lambda: [(Measurement, "total_mb", lambda self, batch_size: self.weights_mb)],
    ),
    Mutant(
        "a retry is forgotten until something else happens",
        "work queues that lose their delayed items: the retry's time comes, and nobody wakes up",
        lambda: [instead(Standing, "holds", _sleeps_through)],
    ),
)
