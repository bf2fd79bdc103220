"""Who goes when others have taken the memory of a device: a pure function.

Idle, unpinned models go, least priority first, then least recently used, and only as many as are needed:
whoever can be spared because a later, larger one is enough stays. One at a time: the figures are looked at
anew once its memory is back, and what was given back to the system may have been needed by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable

from splitlearn_manager.core.eviction import Resident
from splitlearn_manager.core.ledger import Ledger


def first_to_go(ledger: Ledger, device: str, residents: Iterable[Resident]) -> Resident | None:
    """Who is evicted first for a device under pressure; None if nobody may go.

    Where all that may go are not enough they go all the same, one after the other: each of them makes it
    less likely that the system ends the process.
    """
    excess = ledger.excess_mb(device)
    order = sorted(
        (r for r in residents if r.evictable and r.device == device and r.mb > 0),
        key=lambda r: (r.priority, r.last_used_s, r.key),
    )
    chosen: list[Resident] = []
    given_back = 0.0
    for resident in order:
        if chosen and given_back >= excess:
            break
        chosen.append(resident)
        given_back += resident.mb
    # Spared first is who would be missed most.
    for resident in reversed(chosen.copy()):
        if len(chosen) > 1 and given_back - resident.mb >= excess:
            chosen.remove(resident)
            given_back -= resident.mb
    return chosen[0] if chosen else None
