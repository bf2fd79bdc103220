"""Who holds how much: the memory budget of each device, and the reservations against it.

An instance holds a reservation from LOADING until its memory is really back, so at every moment the
sum over a device stays within its budget, and the number of reservations within `max_models`.

Pure: a `Ledger` never changes, every operation gives a new one. It knows no states, clocks or devices
other than the names it is given; who should make room is decided in `eviction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


class LedgerError(AssertionError):
    """A booking that would break the ledger's promise: a bug in the caller."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory of one device that one instance may use; `mb` in MB (2**20 bytes)."""

    key: str
    device: str
    mb: float


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What is missing before an instance fits: places under `max_models`, and MB on its device."""

    places: int
    mb: float

    def __bool__(self) -> bool:
        return self.places > 0 or self.mb > 0


@dataclass(frozen=True)
class Ledger:
    """Budgets and reservations of one node.

    Attributes:
        budgets_mb: MB that may be reserved on each device; a device without an entry has no room.
        max_models: most reservations at a time.
    """

    budgets_mb: Mapping[str, float]
    max_models: int
    reservations: Mapping[str, Reservation] = field(default_factory=dict)

    def used_mb(self, device: str) -> float:
        return sum(r.mb for r in self.reservations.values() if r.device == device)

    def free_mb(self, device: str) -> float:
        return self.budgets_mb.get(device, 0.0) - self.used_mb(device)

    def shortfall(self, device: str, mb: float) -> Shortfall:
        """What is missing for one more reservation of `mb` on `device`."""
        places = len(self.reservations) + 1 - self.max_models
        return Shortfall(max(0, places), max(0.0, mb - self.free_mb(device)))

    def without(self, keys: Iterable[str]) -> Ledger:
        """The ledger as it will be when the reservations of `keys` are back. Unknown keys are ignored."""
        gone = frozenset(keys)
        return replace(
            self,
            reservations={k: r for k, r in self.reservations.items() if k not in gone},
        )

    def reserve(self, key: str, device: str, mb: float) -> Ledger:
        """Books `mb` on `device`. Raises LedgerError if the key is taken or it does not fit."""
        if missing := self.shortfall(device, mb):
            raise LedgerError(f"{key} does not fit on {device}: {missing}")
        return self.promise(key, device, mb)

    def promise(self, key: str, device: str, mb: float) -> Ledger:
        """Books `mb` even above the budget: for forecasts, where others will have gone before.

        Raises LedgerError if the key is taken.
        """
        if key in self.reservations:
            raise LedgerError(f"{key} holds a reservation already")
        return replace(self, reservations={**self.reservations, key: Reservation(key, device, mb)})

    def fits_resized(self, key: str, mb: float) -> bool:
        """Whether the reservation of `key` may grow or shrink to `mb`."""
        held = self.reservations[key]
        return mb - held.mb <= self.free_mb(held.device)

    def resize(self, key: str, mb: float) -> Ledger:
        """Sets the reservation of `key` to what was measured. Raises LedgerError if it does not fit."""
        if not self.fits_resized(key, mb):
            raise LedgerError(f"{key} does not fit at {mb} MB")
        held = self.reservations[key]
        return replace(self, reservations={**self.reservations, key: replace(held, mb=mb)})

    def release(self, key: str) -> Ledger:
        """Returns the reservation of `key`. Raises LedgerError if it holds none."""
        if key not in self.reservations:
            raise LedgerError(f"{key} holds no reservation")
        return self.without((key,))

    def with_limits(self, budgets_mb: Mapping[str, float], max_models: int) -> Ledger:
        """New limits. What is resident stays, even above them; only new reservations are refused."""
        return replace(self, budgets_mb=dict(budgets_mb), max_models=max_models)
