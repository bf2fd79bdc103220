"""A seeded bug: what it stands for, and how to switch it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from simulation.patching import patched

Patch = tuple[object, str, object]
"""(owner, attribute, value)"""


@dataclass(frozen=True)
class Mutant:
    """See the module.

    Attributes:
        name: a few words, for the table.
        stands_for: who is, or was, known to break that way.
        patches: gives what is replaced; asked when it is switched on.
    """

    name: str
    stands_for: str
    patches: Callable[[], list[Patch]]

    def on(self) -> AbstractContextManager[None]:
        """The bug is there until the end of the block."""
        return _all_of(self.patches())


@contextmanager
def _all_of(patches: list[Patch]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patched(owner, name, value))
        yield


def instead(owner: object, name: str, make: Callable[[Any], object]) -> Patch:
    """A patch that is made from what it replaces."""
    return (owner, name, make(vars(owner)[name]))
