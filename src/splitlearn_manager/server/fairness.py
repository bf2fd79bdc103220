"""How the models of a node share its processors: by time, and by weights that priorities give.

Each queue of requests counts the seconds that its forwards took, divided by its weight; the one with the
least comes next (start-time fair queueing, Goyal, Vin and Cheng, 1996). One that has had nothing to do starts
at the count of whoever ran last: it is not owed the time that it did not use.
"""

from __future__ import annotations

_LARGEST_STEP = 4


def weight_of(priority: int) -> float:
    """A model's share: twice as much for each step of priority, at most 16 times as much as at 0."""
    return 2.0 ** max(-_LARGEST_STEP, min(_LARGEST_STEP, priority))
