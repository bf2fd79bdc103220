"""The one rule behind every acceptance: two looks, at least `settle_s` apart, saw the same.

A `Settling` follows one thing (a file's fingerprint, its absence, the weights of a model) and says
whether what was seen last has been seen long enough. It never looks itself and has no clock.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")

_ROUNDING_S = 1e-9  # a wait computed as since + settle_s - now may end a rounding error too early


class Settling(Generic[T]):
    """Since when, without interruption, the same value has been seen."""

    __slots__ = ("_looks", "_since", "_value")

    def __init__(self) -> None:
        self._value: T | None = None
        self._since = 0.0
        self._looks = 0

    @property
    def known(self) -> bool:
        """Something was seen since the last `forget`."""
        return self._looks > 0

    @property
    def value(self) -> T | None:
        """What was seen last; meaningless unless `known`."""
        return self._value

    @property
    def since(self) -> float:
        """When the present value was first seen; meaningless unless `known`."""
        return self._since

    def look(self, value: T, now: float) -> None:
        """Take note of what a look at `now` (monotonic seconds) saw."""
        if self._looks == 0 or value != self._value:
            self._value = value
            self._since = now
            self._looks = 0
        self._looks += 1

    def forget(self) -> None:
        """The last looks prove nothing: the next one counts as the first."""
        self._value = None
        self._looks = 0

    def settled(self, now: float, settle_s: float) -> bool:
        """Two looks at least `settle_s` apart agree."""
        return self._looks >= 2 and now - self._since >= settle_s - _ROUNDING_S

    def remaining_s(self, now: float, settle_s: float) -> float:
        """Seconds until another look may settle it."""
        return max(0.0, self._since + settle_s - now) if self.known else settle_s
