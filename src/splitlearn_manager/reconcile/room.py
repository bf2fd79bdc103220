"""The memory of a node as it will be while a plan is made: what is promised to whom, and who goes.

A plan is made of many decisions, each of which counts on the earlier ones: `Room` is the ledger and the
residents as they will be once those are carried out. It decides by `core.eviction`, and starts nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from splitlearn_manager.core.eviction import (
    AdmissionRequest,
    Decision,
    Refused,
    Resident,
    admit,
    may_displace,
)
from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.relief import first_to_go


class Room:
    """See the module's text. Made anew for each plan."""

    def __init__(self, ledger: Ledger, residents: Iterable[Resident]) -> None:
        self._ledger = ledger
        self._residents = list(residents)
        self._refusals: dict[object, Refused] = {}

    def ask(self, request: AdmissionRequest) -> Decision:
        """Whether there is room, or who would make it, with all that was promised so far.

        A request that is refused as another one was is given the very same answer: in a large
        directory thousands are.
        """
        may_go = tuple(r.key for r in self._residents if may_displace(request, r))
        # All of a request that the answer depends on; without a device the answer names the model.
        question = (request.devices, request.mb, may_go, request.may_evict, request.replaces)
        refused = self._refusals.get(question) if request.devices else None
        if refused is not None:
            return refused
        decision = admit(self._ledger, self._residents, request)
        if isinstance(decision, Refused):
            self._refusals[question] = decision
        return decision

    def fits_besides(
        self, device: str, mb: float, other_devices: Collection[str], other_mb: float
    ) -> bool:
        """Whether one more fits on one of its devices once another has taken `mb` of `device`."""
        then = self._ledger.promise("the first of two", device, mb)
        return any(not then.shortfall(d, other_mb) for d in other_devices if d in then.budgets_mb)

    def first_to_go(self, device: str, busy: Collection[str]) -> Resident | None:
        """Who goes next for a device under pressure; None if nobody may, or memory is on its way back.

        Args:
            busy: keys of those that requests hold: when they will have gone nobody knows.
        """
        if any(r.freeing and r.device == device and r.key not in busy for r in self._residents):
            return None
        return first_to_go(self._ledger, device, self._residents)

    def not_spared_before_s(self, request: AdmissionRequest) -> float | None:
        """When the first may go of those that the request spares now; None if it spares nobody."""
        unsparing = replace(request, spares_at_s=None, takes_busy=True)
        return min(
            (
                r.safe_until_s
                for r in self._residents
                if may_displace(unsparing, r)
                and request.spares_at_s is not None
                and request.spares_at_s < r.safe_until_s
            ),
            default=None,
        )

    def promise(self, model_id: str, device: str, mb: float) -> None:
        """From now on this much is taken."""
        self._ledger = self._ledger.promise(f"{model_id} (planned)", device, mb)
        self._refusals.clear()

    def resize(self, key: str, mb: float) -> bool:
        """From now on that one takes `mb`; False, with nothing changed, if that does not fit."""
        if not self._ledger.fits_resized(key, mb):
            return False
        self._ledger = self._ledger.resize(key, mb)
        self._refusals.clear()
        return True

    def mark_freeing(self, keys: Iterable[str | None]) -> None:
        """From now on these are on their way out: nobody evicts them, their memory comes back."""
        self._change(frozenset(keys), freeing=True, evictable=False, busy=False)

    def value(self, key: str, priority: int, *, pinned: bool) -> None:
        """From now on that one has this priority, and stays if it is pinned.

        One that is not pinned any more may go from the next plan on.
        """
        self._change(frozenset({key}), priority=priority)
        if pinned:
            self.keep(key, "pinned")

    def keep(self, key: str, holding: str) -> None:
        """From now on that one stays, in use or not, for the reason given."""
        self._change(frozenset({key}), evictable=False, busy=False, holding=holding)

    def _change(self, keys: frozenset[str | None], **changes: object) -> None:
        self._residents = [
            replace(r, **changes) if r.key in keys else r  # type: ignore[arg-type]
            for r in self._residents
        ]
        self._refusals.clear()
