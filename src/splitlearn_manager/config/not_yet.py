"""Keys of the contract whose machinery this version does not have, in one table each file kind.

Such a key is accepted at a value at which it already does what it says (mostly its default) and
refused at any other: a setting is never ignored. When the machinery arrives, its row goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitlearn_manager.config.mistakes import expectation, listed, show


@dataclass(frozen=True)
class NotYet:
    """One row.

    Attributes:
        works: the values at which the key already does what it says.
        missing: what this version cannot do, as the end of the sentence `this version cannot …`.
    """

    works: tuple[str | int | float | None, ...]
    missing: str


MODEL_NOT_YET: Mapping[str, NotYet] = {
    "rollout": NotYet((None,), "roll a new version out step by step"),
}

SERVER_NOT_YET: Mapping[str, NotYet] = {}


def refuse_not_yet(rows: Mapping[str, NotYet], key: str, value: object) -> None:
    """Raise the error of the table for `key`, unless `value` is one that works already."""
    row = rows[key]
    if value not in row.works:
        allowed = listed("null" if works is None else f"{works}" for works in row.works)
        raise expectation(
            f"this version cannot {row.missing} yet: expected {allowed}, or no such key, "
            f"got {show(value)}",
            sentence=True,
        )
