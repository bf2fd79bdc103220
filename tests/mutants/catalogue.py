"""All mutants, and playing episodes with one of them until a property breaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mutants import of_acting, of_desired_state, of_memory, of_the_loop
from mutants.mutant import Mutant
from simulation.seeds import run_seed

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for module in (of_desired_state, of_acting, of_memory, of_the_loop)
    for mutant in module.MUTANTS
}


@dataclass(frozen=True)
class Catch:
    """The first episode in which a mutant breaks a property that holds without it."""

    seed: int
    property_id: str
    message: str


def catch(mutant: Mutant, seeds: Iterable[int]) -> Catch | None:
    """Plays the episodes of some seeds with the bug on, until one finds it; None if none does.

    Only a property of DESIGN.md counts. An exception out of a turn may be the switch's own mistake, and
    what breaks without the bug as well says nothing about it.
    """
    for seed in seeds:
        with mutant.on():
            broken = run_seed(seed).broken
        if broken is None or not is_property(broken.property_id):
            continue
        if run_seed(seed).broken is None:
            return Catch(seed, broken.property_id, broken.message)
    return None


def is_property(property_id: str) -> bool:
    """Whether it is one of I1 to I20."""
    return property_id.startswith("I") and property_id[1:].isdigit()
