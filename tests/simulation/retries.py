"""I14: when a load may be tried again, counted from the loads that the simulation saw fail.

After the n-th failure in a row of one version the next try of it comes no sooner than backoff allows, and
after a terminal one not at all, unless something excuses it: another spec, `retry`, a success. Ten failures
of one model in a minute, of whatever versions, are followed by none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from simulation.machine import Broken

EPSILON_S = 1e-6
RATE_WINDOW_S = 60.0
RATE_LIMIT = 10
BASE_S, CAP_S, JITTER = 1.0, 60.0, 0.2
"""What SPEC 4 says of retries."""
TERMINAL = (
    "InvalidModel",
    "UntrustedCheckpoint",
    "OverMemoryLimit",
    "RolloutFailed",
    "RolloutAborted",
)

Version = tuple[str, str, str]
"""Model id, spec hash and weights: what a failure is counted for."""


@dataclass
class Failures:
    """Failed loads of one version in this process.

    Attributes:
        in_a_row: since anything that lets it be tried anew.
        in_all: since it last succeeded.
        excused: the next try need not wait.
        started, begun: actions that were to load it, and loads of it that began; one that is to begin
            in the place of another may find no room by then, which counts as a failure.
    """

    in_a_row: int = 0
    in_all: int = 0
    last_at: float = 0.0
    terminal: bool = False
    excused: bool = False
    started: int = 0
    begun: int = 0


class Retries:
    """See the module's text. One for a process of the node."""

    def __init__(self) -> None:
        self._failures: dict[Version, Failures] = {}
        self._recent: dict[str, deque[float]] = {}

    def started(self, spec: Any) -> None:
        """An action that is to load the version was executed."""
        self._failures.setdefault(_version(spec), Failures()).started += 1

    def begun(self, spec: Any) -> None:
        """A load of the version began."""
        self._failures.setdefault(_version(spec), Failures()).begun += 1

    def succeeded(self, spec: Any, *, is_wanted: bool) -> None:
        """A version that serves ends its own row, and those of others unless it is a fallback."""
        self._failures.pop(_version(spec), None)
        if is_wanted:
            self.excuse(spec.model_id)

    def failed(self, spec: Any, reason: str, now: float) -> None:
        found = self._failures.setdefault(_version(spec), Failures())
        found.in_a_row = 1 if found.excused else found.in_a_row + 1
        found.in_all += 1
        found.last_at = now
        found.terminal = reason in TERMINAL
        found.excused = False
        self._recent.setdefault(spec.model_id, deque()).append(now)

    def excuse(self, model_id: str) -> None:
        """Something happened that lets the model be tried at once."""
        for version, found in self._failures.items():
            if version[0] == model_id:
                found.excused = True

    def why_not_now(self, spec: Any, now: float) -> str | None:
        """Why a load of the spec must not begin; None if it may."""
        recent = self._recent.get(spec.model_id, deque())
        while recent and recent[0] <= now - RATE_WINDOW_S + EPSILON_S:
            recent.popleft()
        if len(recent) >= RATE_LIMIT:
            return f"{spec.model_id} loads again after {len(recent)} failures in a minute"
        found = self._failures.get(_version(spec))
        if found is None or found.excused or found.in_a_row == 0:
            return None
        if found.terminal:
            return f"{spec.model_id} is tried again after a terminal failure"
        least = (1 - JITTER) * min(CAP_S, BASE_S * 2 ** (found.in_a_row - 1))
        if now - found.last_at < least - EPSILON_S:
            return (
                f"{spec.model_id} is tried again {now - found.last_at:.3f} s after failure "
                f"{found.in_a_row} in a row; at least {least:g} s"
            )
        return None

    def check_counters(self, attempts: Any, now_s: float) -> None:
        """The node's counters grow with attempts only, and no wait is longer than the cap. Raises Broken."""
        for model_id, attempt in attempts.items():
            found = self._failures.get(_version(attempt.spec))
            happened = 0
            if found is not None:
                happened = found.in_all + max(0, found.started - found.begun)
            if attempt.failures > max(1, happened):
                message = f"{model_id} counts {attempt.failures} failures, {happened} happened"
                raise Broken("I14", message)
            if attempt.retry_at_s is not None and attempt.retry_at_s - now_s > CAP_S + EPSILON_S:
                wait_s = attempt.retry_at_s - now_s
                raise Broken("I14", f"{model_id} is tried again in {wait_s:g} s; at most {CAP_S:g}")


def _version(spec: Any) -> Version:
    return (spec.model_id, spec.spec_hash, spec.weights)
