"""Which episode a seed stands for: one in ten is a pair that looks at isolation (I13)."""

from __future__ import annotations

from simulation.episode import Episode, Outcome
from simulation.isolation import play_pair
from simulation.script import make_script

PAIR_EVERY = 10


def run_seed(seed: int) -> Outcome:
    """Plays what the seed stands for."""
    if is_pair(seed):
        return play_pair(seed)
    return Episode(make_script(seed)).play()


def is_pair(seed: int) -> bool:
    return seed % PAIR_EVERY == PAIR_EVERY - 1
