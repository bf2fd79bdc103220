"""When a failed load is tried again.

After the n-th failure in a row (n from 0) of one version the wait is `min(CAP_S, BASE_S · 2ⁿ)`, times
a factor drawn from [1 − JITTER, 1]: exponential backoff with jitter, so that models that failed
together do not all come back together. Another spec or other weights are another version: they start
anew, and at once. A terminal failure waits for that.

Whatever asks for another try, no more than `MOST_FAILURES` loads of one model fail in any `WINDOW_S`.

Pure: the clock and the random number are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.snapshot import LoadOutcome

BASE_S = 1.0
CAP_S = 60.0
JITTER = 0.2
MOST_FAILURES = 10
WINDOW_S = 60.0
_MAX_EXPONENT = 16  # 2**16 s is far above the cap: keeps the power small


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is remembered of failed loads of one version of a model.

    Attributes:
        spec: the version that failed; another one is not held back by this.
        failures: loads of it that failed in a row.
        retry_at_s: when it may be tried again, on the manager's clock; None: not before a change.
        superseded: another version was wanted since. Whoever wants this one again wants it anew.
    """

    spec: ModelSpec
    failures: int
    retry_at_s: float | None
    reason: str
    message: str
    superseded: bool = False

    def is_of(self, spec: ModelSpec) -> bool:
        """Whether `spec` is the version that failed (any key may be what a failure waits for)."""
        return (self.spec.spec_hash, self.spec.weights) == (spec.spec_hash, spec.weights)

    def concerns(self, spec: ModelSpec) -> bool:
        """Whether `spec` is the version that failed, and was wanted ever since."""
        return not self.superseded and self.is_of(spec)

    def blocks(self, spec: ModelSpec, now_s: float) -> bool:
        """Whether `spec` must not be tried at `now_s`."""
        if not self.concerns(spec):
            return False
        return self.retry_at_s is None or now_s < self.retry_at_s


def delay_s(failures: int, draw: float) -> float:
    """Seconds to wait after `failures` (≥ 1) failures in a row; `draw` is uniform in [0, 1)."""
    full = min(CAP_S, BASE_S * 2.0 ** min(failures - 1, _MAX_EXPONENT))
    return full * (1.0 - JITTER * draw)


def after_failure(previous: Attempt | None, outcome: LoadOutcome, draw: float) -> Attempt:
    """What is remembered after `outcome`, a failure."""
    again = previous is not None and previous.concerns(outcome.spec)
    failures = (previous.failures if previous is not None and again else 0) + 1
    return Attempt(
        spec=outcome.spec,
        failures=failures,
        retry_at_s=None if outcome.terminal else outcome.at_s + delay_s(failures, draw),
        reason=outcome.reason or "LoadFailed",
        message=outcome.message,
    )


class FailureRate:
    """How often the loads of each model fail; more than `MOST_FAILURES` in `WINDOW_S` are not tried.

    A limit on top of the backoff, which new versions, `retry` and the like begin anew: nothing does so
    to this one, a model that is removed and declared again included.
    """

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, ...]] = {}

    def add(self, model_id: str, at_s: float) -> None:
        """A load failed."""
        self._times[model_id] = (*self._times.get(model_id, ()), at_s)[-MOST_FAILURES:]

    def limited(self, now_s: float) -> dict[str, float]:
        """Until when no load is tried, for each model that has reached the limit."""
        return {
            model_id: times[0] + WINDOW_S
            for model_id, times in self._times.items()
            if len(times) == MOST_FAILURES and now_s < times[0] + WINDOW_S
        }

    def forget_before(self, now_s: float) -> None:
        """Drops what no limit depends on any more."""
        for model_id in [m for m, times in self._times.items() if times[-1] + WINDOW_S <= now_s]:
            del self._times[model_id]
