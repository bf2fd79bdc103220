"""Requests that wait for a model: one that was evicted and comes back, or makes room for its new version.

    add ─► the reconciler knows that it is waited for ─► it serves: the request is entered again
                                                      └► its time is over, or the model failed: refused

A request has no thread while it waits; each model that is waited for has one, for each name that it is
asked for by: what serves may be called otherwise than its next version.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from splitlearn_comm.core.errors import ComputeError, NotReady
from splitlearn_comm.server.backend import Inference
from splitlearn_comm.server.statuses import from_model_error
from splitlearn_manager.errors import ModelUnavailable
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.waiters import Waiter
from splitlearn_manager.server.batches import end
from splitlearn_manager.server.refusals import refusal_of

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"""A request without a deadline would wait for ever."""
_LOOKS_EVERY_S = 1.0
"""So often at most a full room is looked through for requests whose callers are gone."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waits:
    """A request."""

    inference: Inference
    waiter: Waiter
    came_s: float


class WaitingRoom:
    """See the module's text.

    Args:
        reconciler: brings the models.
        enter: takes a request that need not wait any more; False if it must after all. Raises ComputeError.
        most: requests that may wait at a time.
        observe_wait: called after each wait with whether it was in vain, and seconds.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        enter: Callable[[str, Inference], bool],
        *,
        most: int,
        observe_wait: Callable[[bool, float], None],
    ) -> None:
        self._reconciler = reconciler
        self._enter = enter
        self._most = most
        self._observe_wait = observe_wait
        self._lock = threading.Lock()
        # By the model, and what it is asked for by: its id or its endpoint.
        self._waiting: dict[tuple[str, str], list[_Waits]] = {}
        self._count = 0
        self._looked_s = monotonic()

    def waits_for(self, model_id: str) -> bool:
        """Whether some request does."""
        with self._lock:
            return any(awaited == model_id for awaited, _ in self._waiting)

    def add(self, model_id: str, name: str, inference: Inference) -> None:
        """Have a request wait for a model; from now on it is the room's.

        Raises:
            NotReady: as many wait as may.
        """
        until_s, now_s = inference.until_s, monotonic()
        wait_s = LONGEST_WAIT_S if until_s is None else min(until_s - now_s, LONGEST_WAIT_S)
        if self._count >= self._most:
            self._drop_unwanted(now_s)
        with self._lock:
            if self._count >= self._most:
                raise NotReady(
                    f"model {model_id!r} is not there, and {self._most} requests wait already; try again"
                )
            self._count += 1
            waiter = self._reconciler.join(model_id, max(0.0, wait_s))
            is_first = (model_id, name) not in self._waiting
            waiting = self._waiting.setdefault((model_id, name), [])
            waiting.append(_Waits(inference, waiter, now_s))
        if is_first:
            self._begin_attending(model_id, name)

    def _begin_attending(self, model_id: str, name: str) -> None:
        thread = threading.Thread(
            target=self._attend, args=(model_id, name), name=f"waits-{model_id}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            # Nobody would ever look after them, nor after those that come later.
            refusal = NotReady(
                f"model {model_id!r} is not there, and {error} to wait for it; try again"
            )
            with self._lock:
                waiting = self._waiting.pop((model_id, name))
            for one in waiting:
                self._refuse(one, refusal)

    def _attend(self, model_id: str, name: str) -> None:
        """Until nobody waits for the model, by that name, any more."""
        awaited = model_id, name
        while True:
            with self._lock:
                waiting = self._waiting[awaited]
                if not waiting:
                    del self._waiting[awaited]
                    return
                first_s = min(one.waiter.deadline_s for one in waiting)
            try:
                self._reconciler.wait_until_serves(model_id, first_s, name)
            except ModelUnavailable as unavailable:
                refusal = refusal_of(unavailable)
                # Unless somebody's time is over, it is the model that will not come.
                late = [one for one in waiting if self._reconciler.is_over(one.waiter)]
                for one in self._taken(awaited, late):
                    self._refuse(one, refusal)
            else:
                for one in self._taken(awaited, ()):
                    self._try(awaited, one)

    def _drop_unwanted(self, now_s: float) -> None:
        """Refuse those whose callers are gone: they would keep their places until their time is over."""
        with self._lock:
            if now_s - self._looked_s < _LOOKS_EVERY_S:
                return
            self._looked_s = now_s
            waiting = {awaited: list(found) for awaited, found in self._waiting.items()}
        for awaited, found in waiting.items():
            for one in found:
                try:
                    one.inference.check_wanted()
                except ComputeError as refusal:
                    for taken in self._taken(awaited, [one]):
                        self._refuse(taken, refusal)

    def _taken(self, awaited: tuple[str, str], wanted: list[_Waits] | tuple[()]) -> list[_Waits]:
        """Take those out that are there still, or all if none are named."""
        with self._lock:
            waiting = self._waiting.get(awaited, [])
            taken = [one for one in waiting if not wanted or one in wanted]
            if taken:
                self._waiting[awaited] = [one for one in waiting if one not in taken]
        return taken

    def _try(self, awaited: tuple[str, str], one: _Waits) -> None:
        model_id, name = awaited
        try:
            one.inference.check_wanted()
            entered = self._enter(name, one.inference)
        except ComputeError as refusal:
            self._refuse(one, refusal)
            return
        except Exception as error:
            # Those behind it wait for this thread.
            log.exception("model_id=%s", model_id)
            self._refuse(one, from_model_error(model_id, error))
            return
        if entered:
            self._leave(one, in_vain=False)
            return
        # Taken away between its READY and our lease.
        with self._lock:
            self._waiting[awaited].append(one)

    def _refuse(self, one: _Waits, refusal: ComputeError) -> None:
        self._leave(one, in_vain=True)
        end(one.inference.refuse, refusal)

    def _leave(self, one: _Waits, *, in_vain: bool) -> None:
        with self._lock:
            self._count -= 1
        self._reconciler.leave(one.waiter)
        self._observe_wait(in_vain, monotonic() - one.came_s)
