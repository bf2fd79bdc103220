"""What people ask of a running loop: to leave a model as it is, to try it again, to let many go.

Orders are given from any thread and are in force from the next turn on. Each is answered with a sentence
that says what follows from it, or refused with the reason why nothing would. They are remembered here
until they are done or taken back; keeping them over a restart is the keeper's business, and what they
mean for a model that of the source and of planning.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from splitlearn_manager.desired.state import DesiredState, PruneGuard
from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.reconcile.backoff import MOST_FAILURES, WINDOW_S, Attempt

_NAMED = 5


class Orders:
    """See the module's text.

    Attributes:
        suspended: ids that stay as they are.
        confirmed_prune: the digest that somebody confirmed, until those models have gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._desired = DesiredState()
        self._guard: PruneGuard | None = None
        self._retries: set[str] = set()
        self.suspended: frozenset[str] = frozenset()
        self.confirmed_prune = ""

    # Given by people, on any thread.

    def suspend(self, model_id: str) -> str:
        """Leaves the model as it is until it is resumed. Raises ModelNotFound."""
        with self._lock:
            generation = self._generation(model_id)
            if model_id in self.suspended:
                return f"{model_id} is suspended already"
            self.suspended |= {model_id}
        return (
            f"{model_id} is suspended: it stays at generation {generation}, whatever its files say, "
            f"until `resume {model_id}`"
        )

    def resume(self, model_id: str) -> str:
        """Ends a suspension. Raises ModelNotFound."""
        with self._lock:
            self._generation(model_id)
            if model_id not in self.suspended:
                return f"{model_id} is not suspended: its files count already"
            self.suspended -= {model_id}
        return f"{model_id} is resumed: its files count again"

    def retry(self, model_id: str, attempt: Attempt | None, limited_s: float | None) -> str:
        """Has the model's failed load tried again at once. Raises ModelNotFound.

        Args:
            attempt: its failed loads, if it has any.
            limited_s: seconds for which it is not tried whoever asks; None if there is no such limit.
        """
        with self._lock:
            self._generation(model_id)
            if attempt is None:
                return f"{model_id} has no failed load to try again; `explain {model_id}` says how it stands"
            self._retries.add(model_id)
        if limited_s is not None:
            return (
                f"{model_id} is tried again in {limited_s:.0f} s and not sooner: {MOST_FAILURES} loads of "
                f"it failed within {WINDOW_S:g} s; the last one: {attempt.reason}"
            )
        times = "once" if attempt.failures == 1 else f"{attempt.failures} times"
        known = "; such a failure ends only by a change of its file or its weights"
        return (
            f"{model_id} is tried again at once; it failed {times} so far ({attempt.reason})"
            f"{known if attempt.retry_at_s is None else ''}"
        )

    def confirm_prune(self, digest: str) -> str:
        """Lets the models go that the prune guard with that digest holds.

        Raises SplitlearnError: there is no guard (reason `NothingToConfirm`), or it is about another
        set of models by now (`DigestMismatch`).
        """
        with self._lock:
            guard = self._desired.prune_guard
            if guard is None:
                raise SplitlearnError(
                    "there is nothing to confirm: the prune guard holds no models",
                    reason="NothingToConfirm",
                )
            if guard.digest != digest:
                raise SplitlearnError(
                    f"{digest!r} is not the digest of what would be unloaded now, which is "
                    f"{guard.digest}: {_named(guard.model_ids)}; none of them is unloaded before that "
                    "one is confirmed",
                    reason="DigestMismatch",
                )
            self.confirmed_prune = digest
        count = len(guard.model_ids)
        models = "1 model is" if count == 1 else f"{count} models are"
        return f"{models} unloaded: {_named(guard.model_ids)}"

    # For the loop.

    def restore(self, suspended: Collection[str], confirmed_prune: str) -> None:
        """Takes over what was in force when an earlier process ended."""
        with self._lock:
            self.suspended = frozenset(suspended)
            self.confirmed_prune = confirmed_prune

    def take_retries(self) -> set[str]:
        """The ids to be tried again, once."""
        with self._lock:
            retries, self._retries = self._retries, set()
        return retries

    def looked(self, desired: DesiredState, confirmed: str) -> None:
        """Takes note of a look that was made with that confirmation; forgets orders that are done."""
        with self._lock:
            before, self._desired = self._guard, desired
            self._guard = desired.prune_guard or before
            if confirmed and self.confirmed_prune == confirmed and self._is_done(confirmed):
                self.confirmed_prune = ""
            if desired.prune_guard is None and not _holds(desired, before):
                self._guard = None
            declared = desired.models.keys() | desired.undecided.keys()
            if desired.complete and not self.suspended <= declared:
                self.suspended &= declared

    def _is_done(self, confirmed: str) -> bool:
        """Whether the models have gone that were confirmed to go, or there is nothing to go any more."""
        desired, guard = self._desired, self._guard
        if guard is not None and guard.digest == confirmed and not _holds(desired, guard):
            return True
        undecided = desired.next_check_s is not None or desired.undecided
        still = desired.prune_guard is not None and desired.prune_guard.digest == confirmed
        return not undecided and not still

    def _generation(self, model_id: str) -> int:
        desired: Mapping[str, object] = self._desired.models
        model = self._desired.models.get(model_id) or self._desired.undecided.get(model_id)
        if model is None:
            raise ModelNotFound(
                f"no file declares a model {model_id!r} ({len(desired)} are declared)"
            )
        return model.generation


def _holds(desired: DesiredState, guard: PruneGuard | None) -> bool:
    """Whether any of the guarded models is still there."""
    return guard is not None and any(
        m in desired.models or m in desired.undecided for m in guard.model_ids
    )


def _named(model_ids: Collection[str]) -> str:
    names = sorted(model_ids)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
