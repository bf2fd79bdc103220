"""Who claims a model id, and what the claims mean together. Pure: data in, a verdict out.

*Firm* claims are valid documents of settled files; *kept* claims come from files that declared the id last
and are in doubt now (changing, invalid, unreadable, out of sight, gone for too short a time).

    one firm claim, no other                    accepted
    the same, and a doubtful file's old claim   held, until the doubt is over
    several firm or lastingly kept claims       conflict of all that claim it: held
    kept claims only                            held: an id's only source may be about to come back
    no claim, or of files that are gone only    missing: it goes once that is proven

It never decides that an id goes: that takes proof from all files, and is the business of `absence`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from splitlearn_manager.desired.state import DesiredModel, SourceRef
from splitlearn_manager.desired.tracked_file import Declaration, Doubt, TrackedFile


@dataclass(frozen=True, slots=True)
class KeptClaim:
    """A file that is in doubt declared the id there when it was last known to be right."""

    ref: SourceRef
    doubt: Doubt


@dataclass(frozen=True, slots=True)
class Claims:
    """All that the files say about one id.

    Attributes:
        seen_at: when the last of the files with a firm claim was first seen as it is.
    """

    firm: tuple[Declaration, ...] = ()
    kept: tuple[KeptClaim, ...] = ()
    seen_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the claims on one id mean: accept, or hold, or (with neither) that it is missing.

    Attributes:
        accept: the declaration that stands.
        hold: why the id stays as it was.
        lasting: it takes a person to end what `hold` says; otherwise the next looks will.
        conflict: the declarations that contradict each other.
        doubt: of a missing id, why it is too early to be sure; None when its own files leave no doubt.
        refs: all the places that claim the id, in doubt or not, sorted.
        seen_at: when the declaration that stands was first seen.
    """

    accept: Declaration | None = None
    hold: str | None = None
    lasting: bool = False
    conflict: tuple[SourceRef, ...] = ()
    doubt: str | None = None
    refs: tuple[SourceRef, ...] = ()
    seen_at: float = 0.0

    @property
    def is_missing(self) -> bool:
        """No file declares the id, nor is likely to."""
        return self.accept is None and self.hold is None


def claims_on(model_id: str, files: Iterable[TrackedFile]) -> Claims:
    """Who claims the id. `files` in a fixed order, so that equal states read equal."""
    firm: list[Declaration] = []
    kept: list[KeptClaim] = []
    seen_at = 0.0
    for file in files:
        declared = [d for d in file.declarations if d.config.model_id == model_id]
        if declared:
            firm.extend(declared)
            seen_at = max(seen_at, file.seen_at)
        elif (doubt := file.doubt) is not None and (ref := file.kept.get(model_id)) is not None:
            kept.append(KeptClaim(ref, doubt))
    return Claims(tuple(firm), tuple(kept), seen_at)


def judge(claims: Claims, current: DesiredModel | None, *, was_contested: bool) -> Verdict:
    """Decide about one id.

    A passing doubt (a file that is being edited, or was renamed a moment ago) is no conflict; but a
    conflict that was there before does not end by it either.
    """
    firm = [found.ref for found in claims.firm]
    refs = tuple(sorted([*firm, *(kept.ref for kept in claims.kept)]))
    lasting_rivals = sum(kept.doubt.lasting for kept in claims.kept)
    if len(firm) + (len(claims.kept) if was_contested else lasting_rivals) > 1:
        # All who claim it, so that the same claims read the same when they are judged again.
        conflict = refs
        why = f"declared more than once: {' and '.join(str(ref) for ref in conflict)}"
        # Of files that are gone or changing, a little more time may end it.
        lasting = bool(firm) or lasting_rivals > 0
        return Verdict(hold=why, conflict=conflict, lasting=lasting, refs=refs)
    if claims.firm:
        found = claims.firm[0]
        if not claims.kept or (current and current.spec_hash == found.spec_hash):
            return Verdict(accept=found, refs=refs, seen_at=claims.seen_at)
    for kept in claims.kept:
        if claims.firm or not kept.doubt.absent:
            lasting = any(kept.doubt.lasting for kept in claims.kept)
            return Verdict(hold=kept.doubt.why, lasting=lasting, refs=refs)
    return Verdict(doubt=claims.kept[0].doubt.why if claims.kept else None, refs=refs)
