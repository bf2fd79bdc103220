"""Every seeded bug can be switched on and off; and in each module the first ones are found.

That the simulation finds all of them, `make mutants` proves.
"""

from __future__ import annotations

import pytest

from mutants import of_acting, of_desired_state, of_memory, of_the_loop
from mutants.catalogue import MUTANTS, catch
from mutants.mutant import Mutant

QUICK = (
    "a truncated YAML counts, because it validates",
    "requests are routed to what still loads",
    "terminal failures are retried",
    "requests are kept from a busy model at once",
)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_switch_changes_what_the_product_has_and_changes_it_back(mutant: Mutant) -> None:
    patches = mutant.patches()
    assert patches
    before = [_held(owner, name) for owner, name, _ in patches]
    with mutant.on():
        for (owner, name, value), was in zip(patches, before, strict=True):
            now = _held(owner, name)
            assert now is not was
            assert type(now) is type(value)
    assert [_held(owner, name) for owner, name, _ in patches] == before


@pytest.mark.parametrize("name", QUICK)
def test_the_simulation_finds_it(name: str) -> None:
    caught = catch(MUTANTS[name], range(200))
    assert caught is not None, f"not in 200 episodes; all of them: make mutants ONLY='{name}'"


def test_every_module_is_in_the_catalogue_and_has_one_that_is_quickly_found() -> None:
    modules = (of_acting, of_desired_state, of_memory, of_the_loop)
    assert len(MUTANTS) == sum(len(module.MUTANTS) for module in modules) >= 30
    for module in modules:
        assert any(mutant.name in QUICK for mutant in module.MUTANTS)


def _held(owner: object, name: str) -> object:
    """The attribute itself; a module may hide a built-in that it uses."""
    builtins = vars(owner).get("__builtins__", {})
    found = vars(owner).get(name) or builtins.get(name)
    assert found is not None, f"{owner} has no {name}"
    return found
