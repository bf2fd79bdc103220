"""What the loop remembers between turns of what has happened to models; a crash forgets most of it.

Failed attempts (for the backoff and the rate limit), which models were evicted, and which version of each
served last. It is fed with outcomes and events, and read by planning; it decides nothing itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import LoadOutcome, Snapshot
from splitlearn_manager.reconcile.actions import Wanted
from splitlearn_manager.reconcile.backoff import Attempt, FailureRate, after_failure
from splitlearn_manager.reconcile.waiters import Waiters


class Memory:
    """See the module's text. `event` may be called from any thread.

    Attributes:
        attempts: failed loads, by model id.
        parked: when a model was evicted, by id, on the manager's clock.
        served: the version of a model of the directory that was READY last, by id. It is what is gone
            back to when another version cannot be loaded, until it cannot be loaded itself.
        measured: ids of which a load, in this process or an earlier one, has measured what they take.
        waiters: the requests that wait for models.
        failure_rate: how often loads fail, by id.
        revision: another number as soon as something that planning reads is another.
    """

    def __init__(self, now: Callable[[], float], draw: Callable[[], float]) -> None:
        self._now = now
        self._draw = draw
        self._seen_outcome = 0
        self._events: deque[ManagerEvent] = deque()
        self.attempts: dict[str, Attempt] = {}
        self.parked: dict[str, float] = {}
        self.served: dict[str, ModelSpec] = {}
        self.measured: set[str] = set()
        self.waiters = Waiters()
        self.failure_rate = FailureRate()
        self.revision = 0
        self._newly_measured: set[str] = set()

    def event(self, event: ManagerEvent) -> None:
        """Something happened to an instance; kept for the next turn."""
        self._events.append(event)

    def retry(self, model_id: str) -> None:
        """Somebody asks that its failed load is tried again, whatever the backoff says."""
        if self.attempts.pop(model_id, None) is not None:
            self.revision += 1

    def supersede(self, wanted: Mapping[str, Wanted]) -> None:
        """Takes note of what is wanted: a failure holds no version back that is wanted again after another
        one, because its file or its weights have changed since."""
        for model_id, attempt in self.attempts.items():
            now = wanted.get(model_id)
            if now is not None and now.weights_ready and not attempt.is_of(now.spec):
                self.attempts[model_id] = replace(attempt, superseded=True)

    def learn(self, snapshot: Snapshot, wanted: Mapping[str, Wanted]) -> list[ManagerEvent]:
        """Learns from what has happened since the last turn, and gives the events, oldest first.

        Args:
            wanted: what the loads that have ended were started for.
        """
        happened = []
        while self._events:
            event = self._events.popleft()
            happened.append(event)
            if event.kind is EventKind.EVICTED:
                self.parked[event.model_id] = event.at_s
                self.revision += 1
        fresh = [o for o in snapshot.outcomes.values() if o.serial > self._seen_outcome]
        for outcome in sorted(fresh, key=lambda o: o.serial):
            self._seen_outcome = outcome.serial
            self.revision += 1
            self.measured.add(outcome.model_id)
            self._newly_measured.add(outcome.model_id)
            if outcome.owner is Owner.DIRECTORY:
                self._absorb(outcome, wanted.get(outcome.model_id))
        for view in snapshot.instances:
            if view.state is State.READY and view.owner is Owner.DIRECTORY:
                self.served[view.model_id] = view.spec
        return happened

    def take_measured(self) -> set[str]:
        """The ids whose size may be known better since this was asked last."""
        measured, self._newly_measured = self._newly_measured, set()
        return measured

    def forget_all_but(self, known: Collection[str]) -> list[str]:
        """Drops what is remembered of other models, and gives their ids."""
        dropped = set()
        books = (self.attempts, self.parked, self.served)
        for book in books:
            for model_id in [m for m in book if m not in known]:
                book.pop(model_id, None)
                dropped.add(model_id)
        dropped |= self.measured.difference(known)
        self.measured -= dropped
        self.failure_rate.forget_before(self._now())
        return sorted(dropped)

    def _absorb(self, outcome: LoadOutcome, wanted: Wanted | None) -> None:
        model_id, version = outcome.model_id, outcome.spec.version
        served = self.served.get(model_id)
        other_wanted = wanted is None or wanted.spec.version != version
        went_back = served is not None and served.version == version and other_wanted
        if outcome.ok:
            # It may have been evicted again since.
            if self.parked.get(model_id, 0.0) <= outcome.at_s:
                self.parked.pop(model_id, None)
            attempt = self.attempts.get(model_id)
            if attempt is not None and (not went_back or attempt.concerns(outcome.spec)):
                del self.attempts[model_id]
            return
        self.failure_rate.add(model_id, outcome.at_s)
        if went_back:
            # Its files are gone or broken too: nothing to go back to. The attempt that matters is
            # that of the wanted version.
            del self.served[model_id]
        else:
            # Somebody has asked for it since it was evicted: it is tried again as any other that failed.
            self.parked.pop(model_id, None)
            self.attempts[model_id] = after_failure(
                self.attempts.get(model_id), outcome, self._draw()
            )
