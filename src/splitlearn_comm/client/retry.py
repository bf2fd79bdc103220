"""Decides whether a failed call is made again, and when; never makes a call or waits.

A strategy is asked after each failure. It holds no state between calls, so one object may serve many
clients and threads.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import grpc

FINAL_STATUSES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Statuses that mean the same the next time: the request itself has to change."""


class RetryStrategy(ABC):
    """When to try again; subclass it for a rule of your own."""

    @abstractmethod
    def should_retry(self, attempt: int, code: grpc.StatusCode) -> bool:
        """Tell whether to try again.

        Args:
            attempt: how many attempts have been made, 1 after the first.
            code: the status that the last one ended with.
        """

    @abstractmethod
    def delay_s(self, attempt: int) -> float:
        """Return the seconds to wait after that many attempts."""


class ExponentialBackoff(RetryStrategy):
    """Waits `initial_delay_s`, then `multiplier` times as long after each further attempt.

    Args:
        max_attempts: the first one included.
        initial_delay_s: wait after the first attempt.
        multiplier: growth of the wait.
        max_delay_s: longest wait.
        jitter: share of each wait, 0 to 1, by which it is shortened or lengthened at random, so that
            many clients do not come back at the same moment.
        random_unit: gives numbers in [0, 1), for the jitter.

    Raises:
        ValueError: for values that make no sense.
    """

    def __init__(
        self,
        max_attempts: int = 3,
        initial_delay_s: float = 1.0,
        multiplier: float = 2.0,
        max_delay_s: float = 30.0,
        jitter: float = 0.0,
        random_unit: Callable[[], float] = random.random,
    ) -> None:
        _check(max_attempts, initial_delay_s)
        if multiplier < 1:
            raise ValueError(f"multiplier: expected at least 1, got {multiplier}")
        if max_delay_s < 0:
            raise ValueError(f"max_delay_s: expected at least 0, got {max_delay_s}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter: expected 0 to 1, got {jitter}")
        self.max_attempts = max_attempts
        self.initial_delay_s = initial_delay_s
        self.multiplier = multiplier
        self.max_delay_s = max_delay_s
        self.jitter = jitter
        self._random_unit = random_unit

    def should_retry(self, attempt: int, code: grpc.StatusCode) -> bool:
        """Try again after passing conditions, `max_attempts` attempts in all."""
        return attempt < self.max_attempts and code not in FINAL_STATUSES

    def delay_s(self, attempt: int) -> float:
        """Return the seconds to wait after that many attempts."""
        # Exponents are bounded, because a float overflows long before a patient caller gives up.
        grown = self.initial_delay_s * self.multiplier ** min(attempt - 1, 64)
        spread = 1 + self.jitter * (2 * self._random_unit() - 1)
        return min(self.max_delay_s, grown * spread)


class FixedDelay(RetryStrategy):
    """Waits the same time after each attempt.

    Args:
        max_attempts: the first one included.
        delay_s: the wait.

    Raises:
        ValueError: for values that make no sense.
    """

    def __init__(self, max_attempts: int = 3, delay_s: float = 1.0) -> None:
        _check(max_attempts, delay_s)
        self.max_attempts = max_attempts
        self._delay_s = delay_s

    def should_retry(self, attempt: int, code: grpc.StatusCode) -> bool:
        """Try again after passing conditions, `max_attempts` attempts in all."""
        return attempt < self.max_attempts and code not in FINAL_STATUSES

    def delay_s(self, attempt: int) -> float:
        """Return the seconds to wait."""
        return self._delay_s


def _check(max_attempts: int, delay_s: float) -> None:
    if max_attempts < 1:
        raise ValueError(f"max_attempts: expected at least 1, got {max_attempts}")
    if delay_s < 0:
        raise ValueError(f"the delay: expected at least 0 seconds, got {delay_s}")
