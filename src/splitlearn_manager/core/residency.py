"""How long a model stays that was loaded for requests, whoever waits for its room.

Where more is asked for than fits, models take turns. Each turn is for all that came for it meanwhile, not for
one request: an instance that has begun to answer stays for as long as its load took, so that at most half of
the time of a place goes into loading, and for `STAY_S` at least, so that the quickest loads are no reason
to swap for each request. Longer would be worse for all: what is spared for having been loaded just now takes
the place of what was used after it. Those that waited for the load are answered first in any case.

Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from math import inf

STAY_S = 0.1
"""The shortest stay of a model that was loaded and has begun to answer, in seconds."""


def safe_until_s(*, loading_since_s: float, ready_since_s: float | None, used: bool) -> float:
    """Until when an instance stays for what was loaded for, on the clock of the arguments.

    What was loaded because its file was accepted, and was not asked for, has no such time: -inf.
    """
    if ready_since_s is None or not used:
        return -inf
    return ready_since_s + max(STAY_S, ready_since_s - loading_since_s)
