"""Reads now and then what the devices have left, and says what that leaves for models.

The edge of `others_use`, which judges the readings: it asks for a reading no more often than
`EVERY_S`, together with the instances just before and just after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.ledger import Ceiling
from splitlearn_manager.core.others_use import (
    HOLD_S,
    OthersUse,
    Reading,
    first_use,
    held_on,
    next_use,
)
from splitlearn_manager.core.snapshot import InstanceView

EVERY_S = 0.5
"""The shortest time between two readings."""


class MemoryWatch:
    """See the module's text. May be used from any thread.

    Args:
        readings: reads the devices; must return at once, and never raise.
        instances: those of this moment.
    """

    def __init__(
        self,
        readings: Callable[[], Mapping[str, Reading]],
        instances: Callable[[], Sequence[InstanceView]],
        clock: Clock,
    ) -> None:
        self._readings = readings
        self._instances = instances
        self._clock = clock
        self._lock = threading.Lock()
        self._read_s: float | None = None
        self._use: dict[str, OthersUse] = {}

    def look(self) -> Mapping[str, Ceiling] | None:
        """What each device has for models; None if that was read a moment ago, or is being read."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            now = self._clock.now()
            if self._read_s is not None and now - self._read_s < EVERY_S:
                return None
            before = self._instances()
            readings = self._readings()
            after = self._instances()
            # Of a device that cannot be read at the moment what was read last stays.
            self._use |= {
                device: self._next(device, reading, before, after, now)
                for device, reading in readings.items()
            }
            self._read_s = now
            return {device: use.ceiling() for device, use in self._use.items()}
        finally:
            self._lock.release()

    @property
    def waits_s(self) -> float | None:
        """Seconds after which a figure may fall that is thought too high; None if none is."""
        falling = [u.dip_since_s for u in self._use.values() if u.dip_since_s is not None]
        return max(EVERY_S, min(falling) + HOLD_S - self._clock.now()) if falling else None

    def _next(
        self,
        device: str,
        reading: Reading,
        before: Sequence[InstanceView],
        after: Sequence[InstanceView],
        now_s: float,
    ) -> OthersUse:
        held = held_on(device, before, after)
        known = self._use.get(device)
        if known is None:
            return first_use(reading, held)
        return next_use(known, reading, held, now_s)
