"""Who holds how much: the memory budget of each device, and the reservations against it.

An instance holds a reservation from LOADING until its memory is really back, so at every moment the
sum over a device stays within its budget, and the number of reservations within `max_models`.

A budget is what models may take; a *ceiling* is what is there for them while others use the device too.
The smaller of the two limits what is reserved anew. Budgets are people's, and what is resident stays
above them; above a ceiling memory is promised that does not exist, and the device is under pressure.

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


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device has for models, whatever its budget says. In MB (2**20 bytes).

    Attributes:
        total_mb: what it has for this process.
        others_mb: what is used of it by others: other processes, and this one beside its models.
        floor_mb: what is to stay free.
        stalled: processes stand still for want of memory, whatever the other figures say.
    """

    total_mb: float
    others_mb: float
    floor_mb: float
    stalled: bool = False

    @property
    def mb(self) -> float:
        """What models can hold at most."""
        return max(0.0, self.total_mb - self.floor_mb - self.others_mb)

    def __str__(self) -> str:
        return (
            f"{self.others_mb:,.0f} of {self.total_mb:,.0f} MB are used beside models and "
            f"{self.floor_mb:,.0f} MB stay free"
        )


@dataclass(frozen=True)
class Ledger:
    """Budgets and reservations of one node.

    Attributes:
        budgets_mb: MB that may be reserved on each device; a device without an entry has no room.
        max_models: most reservations at a time.
        ceilings: what the devices really have, as it was read last; one without an entry is not read.
    """

    budgets_mb: Mapping[str, float]
    max_models: int
    reservations: Mapping[str, Reservation] = field(default_factory=dict)
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)

    def used_mb(self, device: str) -> float:
        return sum(r.mb for r in self.reservations.values() if r.device == device)

    def limit_mb(self, device: str) -> float:
        """MB up to which may be reserved anew: the budget, or less where others take too much of it."""
        budget = self.budgets_mb.get(device, 0.0)
        ceiling = self.ceilings.get(device)
        return budget if ceiling is None else min(budget, ceiling.mb)

    def free_mb(self, device: str) -> float:
        return self.limit_mb(device) - self.used_mb(device)

    def excess_mb(self, device: str) -> float:
        """MB that are promised and not there: what models would have to give back for others."""
        ceiling = self.ceilings.get(device)
        return 0.0 if ceiling is None else max(0.0, self.used_mb(device) - ceiling.mb)

    def under_pressure(self, device: str) -> bool:
        """Whether idle models should go and loads wait, because the memory is not there."""
        ceiling = self.ceilings.get(device)
        return ceiling is not None and (ceiling.stalled or self.excess_mb(device) > 0)

    @property
    def pressed(self) -> tuple[str, ...]:
        """The devices under pressure, sorted."""
        return tuple(sorted(device for device in self.ceilings if self.under_pressure(device)))

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
        """Whether the reservation of `key` may grow or shrink to `mb`.

        What does not grow stays, like all that is resident. For what grows the budget counts alone: it
        is in memory already, and counts as use by others until it is booked.
        """
        held = self.reservations[key]
        free = self.budgets_mb.get(held.device, 0.0) - self.used_mb(held.device)
        return mb <= held.mb or mb - held.mb <= free

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

    def with_ceilings(self, ceilings: Mapping[str, Ceiling]) -> Ledger:
        """What the devices really have by now. Nothing is taken back by it."""
        return replace(self, ceilings=dict(ceilings))
