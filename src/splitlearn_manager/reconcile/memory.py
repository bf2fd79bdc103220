"""What the loop remembers between turns; all of it may be lost in a crash.

Failed attempts (for the backoff), which models were evicted, what served before an update by recreate,
and when models were asked for. It is fed with outcomes and events, and read by planning; it decides
nothing itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.snapshot import LoadOutcome, Snapshot
from splitlearn_manager.reconcile.actions import Wanted
from splitlearn_manager.reconcile.backoff import Attempt, after_failure


class Memory:
    """See the module's text. `event` and `ask_for` may be called from any thread.

    Attributes:
        attempts: failed loads, by model id.
        parked: when a model was evicted, by id, on the manager's clock.
        fallbacks: what served before an update by recreate, by id, until that has succeeded.
        demands: when a model was last asked for, by id.
    """

    def __init__(self, now: Callable[[], float], draw: Callable[[], float]) -> None:
        self._now = now
        self._draw = draw
        self._seen_outcome = 0
        self._events: deque[ManagerEvent] = deque()
        self.attempts: dict[str, Attempt] = {}
        self.parked: dict[str, float] = {}
        self.fallbacks: dict[str, Wanted] = {}
        self.demands: dict[str, float] = {}

    def event(self, event: ManagerEvent) -> None:
        """Something happened to an instance; kept for the next turn."""
        self._events.append(event)

    def ask_for(self, model_id: str) -> None:
        """A request wants the model."""
        self.demands[model_id] = self._now()

    def learn(self, snapshot: Snapshot) -> list[ManagerEvent]:
        """Learns from what has happened since the last turn, and gives the events, oldest first."""
        happened = []
        while self._events:
            event = self._events.popleft()
            happened.append(event)
            if event.kind is EventKind.EVICTED:
                self.parked[event.model_id] = event.at_s
        fresh = [o for o in snapshot.outcomes.values() if o.serial > self._seen_outcome]
        for outcome in sorted(fresh, key=lambda o: o.serial):
            self._seen_outcome = outcome.serial
            self._absorb(outcome)
        return happened

    def forget_all_but(self, known: Collection[str]) -> list[str]:
        """Drops what is remembered of other models, and gives their ids."""
        dropped = set()
        for book in (self.attempts, self.parked, self.fallbacks, self.demands):
            # A request may add a demand meanwhile, so the keys are taken at once.
            for model_id in [m for m in list(book) if m not in known]:
                book.pop(model_id, None)
                dropped.add(model_id)
        return sorted(dropped)

    def _absorb(self, outcome: LoadOutcome) -> None:
        model_id = outcome.model_id
        fallback = self.fallbacks.get(model_id)
        is_fallback = fallback is not None and outcome.spec.version == fallback.spec.version
        if outcome.ok:
            # It may have been evicted again since.
            if self.parked.get(model_id, 0.0) <= outcome.at_s:
                self.parked.pop(model_id, None)
            if not is_fallback:
                self.attempts.pop(model_id, None)
                self.fallbacks.pop(model_id, None)
        elif is_fallback:
            # Its files are gone or broken too: nothing to go back to. The attempt that matters is
            # that of the wanted version.
            del self.fallbacks[model_id]
        else:
            self.attempts[model_id] = after_failure(
                self.attempts.get(model_id), outcome, self._draw()
            )
