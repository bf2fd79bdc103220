"""Which models may go at once when no file declares them any more: the prune guard.

If those that are missing are too large a part of what was managed before the first of them went, all of
them stay until somebody confirms this very set by its digest. That they are missing must be certain
before it is decided here: a deletion under way (`rm -rf`, a slow copy) is not to be taken for one small
deletion after another.

Once a guard held an id, only a confirmation lets it go: files that come back one by one after an outage
must not make the rest of them few enough.

It knows ids and hashes, neither files nor scans, and decides nothing about models that are declared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from splitlearn_manager.desired.state import DesiredModel, PruneGuard

LEAST_GUARDED = 3
"""With fewer managed models there is no guard: half of two is one, and one file may be deleted."""


@dataclass(frozen=True, slots=True)
class Departure:
    """What becomes of the missing models.

    Attributes:
        go: they are no longer desired.
        guard: what holds them until it is confirmed; None when something else does, or nothing.
    """

    go: bool = False
    guard: PruneGuard | None = None


def digest_of(models: Mapping[str, DesiredModel]) -> str:
    """Names exactly these models at exactly these specs, in 12 characters."""
    lines = "".join(f"{model_id} {models[model_id].spec_hash}\n" for model_id in sorted(models))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


class Absence:
    """Decides how many may go at once, and which models count for that.

    Args:
        prune_guard_percent: more than this part of what is managed does not go at once; 100 lets
            everything go. May be changed between two looks.
    """

    def __init__(self, prune_guard_percent: float) -> None:
        self.prune_guard_percent = prune_guard_percent
        self.uncounted: frozenset[str] = frozenset()
        """Models that do not count as managed yet, because they were accepted while others may have
        been going: otherwise exchanging all files for others would look like the loss of a half."""
        self._counted_once = False

    def restore(self, uncounted: Iterable[str]) -> None:
        """An earlier process managed some models, but for these."""
        self.uncounted = frozenset(uncounted)
        self._counted_once = True

    def add(self, model_ids: Iterable[str]) -> None:
        """These were accepted just now."""
        self.uncounted |= frozenset(model_ids)

    def count_all(self, *, certain: bool) -> None:
        """Nothing is missing: all that are accepted count from here on.

        Args:
            certain: no file is in doubt, so that nothing is about to go either. Until that is so for
                the first time, any number is better than none.
        """
        if self.uncounted and (certain or not self._counted_once):
            self.uncounted = frozenset()
        self._counted_once = self._counted_once or certain

    def decide(
        self,
        missing: Mapping[str, DesiredModel],
        accepted: Mapping[str, DesiredModel],
        confirmed: str,
        *,
        certain: bool,
    ) -> Departure:
        """What becomes of the missing models.

        Args:
            missing: those that no file declares.
            accepted: all, the missing ones included, before anything new is accepted.
            confirmed: the digest that somebody confirmed.
            certain: it is proven that just these are missing; if not, none of them goes.
        """
        if not missing:
            return Departure()
        # Where it is open how many were managed, it is too much if it is by either count.
        counts = (len(accepted) - len(self.uncounted - missing.keys()), len(accepted))
        too_much = [n for n in counts if self._is_too_much(len(missing), n)]
        managed = (too_much or counts)[0]
        guard = PruneGuard(digest_of(missing), tuple(sorted(missing)), managed)
        if not certain:
            # Guarded before, and still not declared: that an edit elsewhere is settling changes nothing.
            is_known = all(model.guarded for model in missing.values())
            return Departure(guard=guard if is_known else None)
        were_guarded = any(model.guarded for model in missing.values())
        held = too_much or (were_guarded and self.prune_guard_percent < 100)
        return Departure(guard=guard) if held and guard.digest != confirmed else Departure(go=True)

    def _is_too_much(self, missing: int, managed: int) -> bool:
        return managed >= LEAST_GUARDED and 100 * missing > self.prune_guard_percent * managed
