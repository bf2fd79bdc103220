"""Whether the load of a version may be tried now, whatever room there is; pure.

It may not while its files change or are missing, where it would break its own limit, or for some time after
it has failed (`backoff`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.errors import LoadTimeout
from splitlearn_manager.reconcile.actions import Observed, Waiting, Wanted
from splitlearn_manager.reconcile.backoff import MOST_FAILURES, WINDOW_S, Attempt


class Tries:
    """See the module's text. `by_id` has the instances of each model."""

    def __init__(self, observed: Observed, by_id: Mapping[str, Sequence[InstanceView]]) -> None:
        self._observed = observed
        self._by_id = by_id

    def limit(self, model_id: str) -> Waiting | None:
        """That so many loads of the model have failed lately that none is tried, whoever asks."""
        until_s = self._observed.limited.get(model_id)
        if until_s is None or until_s <= self._observed.now_s:
            return None
        attempt = self._observed.attempts.get(model_id)
        message = (
            f"{MOST_FAILURES} loads of it failed within {WINDOW_S:g} s; no more than so many are tried, "
            "whatever asks for it"
        )
        if attempt is not None:
            message += f"; the last one: {attempt.message}"
        return Waiting(model_id, "RateLimited", message, until_s, failed=True)

    def why_not(self, wanted: Wanted) -> Waiting | None:
        """Why a load of this very version is not to be tried now, whatever room there is."""
        model_id = wanted.spec.model_id
        if not wanted.weights_ready:
            if wanted.weights_problem:
                return Waiting(model_id, "WeightsNotFound", wanted.weights_problem, failed=True)
            return Waiting(model_id, "WeightsNotReady", "its files are still changing")
        if wanted.own_limit_problem is not None:
            return over_memory_limit(model_id, wanted.own_limit_problem)
        if (limit := self.limit(model_id)) is not None:
            return limit
        attempt = self._observed.attempts.get(model_id)
        if attempt is None or not attempt.concerns(wanted.spec):
            return None
        if wanted.suspended:
            message = f"{attempt.message}; not tried again while it is suspended"
            return Waiting(model_id, attempt.reason, message, failed=True)
        views = self._by_id.get(model_id, ())
        if any(v.state is State.FAILED and attempt.concerns(v.spec) for v in views):
            # Given up, and its loader has not come back: another one would hang beside it, and
            # each of them holds a place until it returns.
            hangs = attempt.reason == LoadTimeout.__name__
            due_s = (
                attempt.retry_at_s if attempt.blocks(wanted.spec, self._observed.now_s) else None
            )
            return after_failure(model_id, attempt, None if hangs else due_s)
        if attempt.blocks(wanted.spec, self._observed.now_s):
            return after_failure(model_id, attempt, attempt.retry_at_s)
        return None


def over_memory_limit(model_id: str, problem: str) -> Waiting:
    return Waiting(model_id, "OverMemoryLimit", problem, failed=True)


def after_failure(model_id: str, attempt: Attempt, until_s: float | None) -> Waiting:
    return Waiting(model_id, attempt.reason, attempt.message, until_s, failed=True)
