"""Reading answers of a node, which may be of another version: nothing is taken for granted."""

from __future__ import annotations

from collections.abc import Mapping

Data = Mapping[str, object]


def number(value: object) -> float:
    """A number; 0 for whatever is none."""
    return float(value) if isinstance(value, int | float) else 0.0


def mapping(value: object) -> Data:
    """An object; an empty one for whatever is none."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[Data]:
    """The objects in a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """The items of a list, as texts."""
    return [str(item) for item in value] if isinstance(value, list) else []
