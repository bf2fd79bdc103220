"""The loop: a turn, then another one when something may have changed; and what others ask of it.

Events from the file system, the manager or a request only end the wait between turns; what a turn does is
in `turns`. The directory is looked at the less often the longer a look takes, unless something says that it
has changed.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.rollout import Verdict
from splitlearn_manager.desired.state import Source
from splitlearn_manager.errors import ModelUnavailable
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.record import HistoryEntry
from splitlearn_manager.reconcile.status import NodeInfo
from splitlearn_manager.reconcile.store import Store
from splitlearn_manager.reconcile.turns import Turn, Turns
from splitlearn_manager.reconcile.waiters import Waiter

log = logging.getLogger(__name__)


class Reconciler(Turns):
    """See the module's text. One thread makes the turns; all else may be asked for on any thread.

    Attributes:
        last_turn_s: when the last turn ended, on the clock.

    Args:
        source, manager, clock, store, resync_s, max_parallel_loads, draw, about: see `Turns`.
        on_turn: called with each turn.
        on_error: called when a turn ended in an unexpected error.
    """

    def __init__(
        self,
        source: Source,
        manager: ModelManager,
        clock: Clock,
        *,
        store: Store | None = None,
        resync_s: float = 1.0,
        max_parallel_loads: int = 2,
        draw: Callable[[], float] = random.random,
        on_turn: Callable[[Turn], None] | None = None,
        on_error: Callable[[], None] | None = None,
        about: Callable[[], NodeInfo] = NodeInfo,
    ) -> None:
        super().__init__(
            source,
            manager,
            clock,
            store=store,
            resync_s=resync_s,
            max_parallel_loads=max_parallel_loads,
            draw=draw,
            about=about,
        )
        self._on_turn = on_turn or (lambda turn: None)
        self._on_error = on_error or (lambda: None)
        self._wake = threading.Condition()
        self._woken = True
        self._look_asked = True
        self._stopping = False
        self._turns_begun = 0
        self._turn_ended = 0
        self.last_turn_s: float | None = None
        manager.on_change(self._turn_due)

    # Waking and waiting.

    def wake(self) -> None:
        """Makes a turn due at once that looks at the directory. Any thread may call it; calls before
        the turn are one."""
        with self._wake:
            self._woken = self._look_asked = True
            self._wake.notify_all()

    def stop(self) -> None:
        """Ends `run` after the turn that is under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def run(self, until: Callable[[Turn], bool] = lambda turn: False) -> None:
        """Turns until `stop`, or until a turn satisfies `until`.

        An unexpected error ends a turn, never the loop.
        """
        while True:
            delay_s: float | None = self.resync_s
            try:
                turn = self.next_turn()
                if until(turn):
                    return
                if turn.next_s is not None:
                    delay_s = min(turn.next_s, self.resync_s)
            except Exception:
                message = (
                    "a bug ended this turn; models go on serving, and the next turn starts afresh"
                )
                log_event(log, logging.ERROR, "TurnFailed", message, exc_info=True)
                self._manager.hold(())  # for room that nobody is given as long as this goes on
                self._on_error()
            with self._wake:
                if not self._woken and not self._stopping:
                    self._wake.wait(delay_s)
                if self._stopping:
                    return
                self._woken = False

    @contextmanager
    def waiting_for(self, model_id: str, timeout_s: float, name: str = "") -> Iterator[None]:
        """Asks for a model that is evicted or pending, and waits until it serves, under that name if any.

        Until the end of the block it stays, so that who has waited can take a lease on it.
        Raises ModelUnavailable if it does not serve `timeout_s` later, fails to load, or loses the name.
        """
        waiter = self.join(model_id, timeout_s)
        try:
            self.wait_until_serves(model_id, waiter.deadline_s, name)
            yield
        finally:
            self.leave(waiter)

    def wait_until_serves(self, model_id: str, deadline_s: float, name: str = "") -> None:
        """Waits for a model that somebody has asked for with `join`.

        Raises ModelUnavailable if it does not serve by then, or fails to load.

        Args:
            name: what requests call it, the model or its endpoint. What serves may have that name only once
                it is updated; where the files give it the name no more, nothing is left to wait for.
        """
        with self._wake:
            while not self._serves(model_id, name):
                left = deadline_s - self._clock.now()
                phase = self.status.phases.get(model_id)
                comes = phase is not None and self.status.comes(model_id)
                if left <= 0 or not comes or self._stopping:
                    state = self.status.in_short(model_id) if phase is not None else "gone"
                    raise ModelUnavailable(f"model {model_id!r} is {state}; try again")
                if name and model_id not in self.names.get(name, ()):
                    raise ModelUnavailable(
                        f"model {model_id!r} is not called {name!r} any more; try again"
                    )
                self._wake.wait(left)

    def _serves(self, model_id: str, name: str) -> bool:
        table = self._manager.table
        is_called_so = not name or name in table.by_endpoint or name in table.by_model
        return is_called_so and model_id in table.by_model

    def is_over(self, waiter: Waiter) -> bool:
        """Whether its time is."""
        return self._clock.now() >= waiter.deadline_s

    @property
    def parked(self) -> tuple[str, ...]:
        """The ids of the models that are parked, the last one first, as of the last turn."""
        parked = dict(self._memory.parked)
        return tuple(sorted(parked, key=lambda model_id: -parked[model_id]))

    def has_served(self, model_id: str) -> bool:
        """Whether some version of the model has served, in this process or an earlier one."""
        return model_id in self._memory.served

    def join(self, model_id: str, timeout_s: float) -> Waiter:
        """Notes that a request waits for the model from now on, for `timeout_s` at most."""
        now = self._clock.now()
        waiter = self._memory.waiters.join(model_id, now, now + timeout_s)
        self._turn_due()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Notes that it does not wait any more."""
        self._memory.waiters.leave(waiter)
        self._turn_due()

    def wait_converged(self, give_up: Callable[[], bool]) -> bool:
        """Waits until everything once was as declared, as near as it could be.

        False if `give_up` says so (it is asked after every turn) or the loop was stopped.
        """
        with self._wake:
            self._wake.wait_for(lambda: self.converged or self._stopping or give_up())
        return self.converged

    def await_turn(self, timeout_s: float) -> bool:
        """Waits until a turn that began after this call has ended; False if none did in time."""
        with self._wake:
            wanted = self._turns_begun + 1
            self._wake.wait_for(lambda: self._turn_ended >= wanted or self._stopping, timeout_s)
            return self._turn_ended >= wanted

    def _turn_due(self) -> None:
        """Makes a turn due at once; the directory is looked at if that is due as well."""
        with self._wake:
            self._woken = True
            self._wake.notify_all()

    # What people ask for; in force from the next turn on.

    def suspend(self, model_id: str) -> str:
        """Leaves a model as it is until it is resumed; says what follows. Raises ModelNotFound."""
        return self._ordered(self._orders.suspend(model_id))

    def resume(self, model_id: str) -> str:
        """Ends a suspension; says what follows. Raises ModelNotFound."""
        return self._ordered(self._orders.resume(model_id))

    def retry(self, model_id: str) -> str:
        """Tries a failed load again at once; says what follows. Raises ModelNotFound."""
        now = self._clock.now()
        until_s = self._memory.failure_rate.limited(now).get(model_id)
        limited_s = until_s - now if until_s is not None else None
        attempt = self._memory.attempts.get(model_id)
        if attempt is not None and attempt.superseded and limited_s is None:
            attempt = None
        return self._ordered(self._orders.retry(model_id, attempt, limited_s))

    def promote(self, model_id: str) -> str:
        """Has a version that is rolled out take over at once. Raises SplitlearnError (`NoRollout`)."""
        version = self._manager.order_rollout(model_id, Verdict.TAKE_OVER)
        return self._ordered(f"{version} of {model_id} takes over")

    def abort(self, model_id: str) -> str:
        """Takes back a version that is rolled out. Raises SplitlearnError (`NoRollout`)."""
        version = self._manager.order_rollout(model_id, Verdict.TAKE_BACK)
        return self._ordered(
            f"{version} of {model_id} is taken back; it is not tried again before its file or "
            f"its weights change, or `retry {model_id}`"
        )

    def confirm_prune(self, digest: str) -> str:
        """Lets the models go that a prune guard holds; says which. Raises SplitlearnError (reason
        `NothingToConfirm` or `DigestMismatch`)."""
        return self._ordered(self._orders.confirm_prune(digest))

    def history(self, model_id: str) -> tuple[HistoryEntry, ...]:
        """The versions of a model that were accepted, oldest first; none if it is not known."""
        return self._keeper.history(model_id)

    def _ordered(self, answer: str) -> str:
        self.wake()
        return answer

    # Turns.

    def next_turn(self) -> Turn:
        """A turn as `run` makes it: it looks at the directory if that is due or was asked for."""
        with self._wake:
            look = self._look_asked or self._clock.now() >= self._look_due_s
        return self.turn(look=look)

    def turn(self, *, look: bool = True) -> Turn:
        """Makes a turn.

        Args:
            look: False goes by what the latest look at the directory gave.
        """
        with self._wake:
            self._turns_begun += 1
            number = self._turns_begun
            look = look or self._found is None
            if look:
                self._look_asked = False
        turn = self._turn(look=look)
        self.last_turn_s = self._clock.now()
        self._on_turn(turn)
        with self._wake:
            self.converged = self.converged or turn.settled
            self._turn_ended = number
            self._wake.notify_all()
        return turn
