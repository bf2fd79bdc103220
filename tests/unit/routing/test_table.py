"""The routing table: the same for the same models, and never changed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from splitlearn_manager.routing.table import build_table


@dataclass(frozen=True)
class Model:
    model_id: str
    weight: float = 1.0
    in_flight: int = 0


def test_table_does_not_depend_on_the_order_of_its_entries() -> None:
    a, b, c = Model("a"), Model("b"), Model("c")

    table = build_table([(c, "chat"), (a, "chat"), (b, "b")])

    assert table.all == (a, b, c)
    assert table.by_endpoint == {"chat": (a, c), "b": (b,)}
    assert table.by_model == {"a": a, "b": b, "c": c}
    assert table == build_table([(a, "chat"), (b, "b"), (c, "chat")])


def test_an_empty_table_is_empty() -> None:
    table = build_table([])

    assert (table.all, dict(table.by_model), dict(table.by_endpoint)) == ((), {}, {})


def test_two_candidates_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="two candidates of a routing table are called 'a'"):
        build_table([(Model("a"), "x"), (Model("a"), "y")])


def test_a_table_cannot_be_changed() -> None:
    table = build_table([(Model("a"), "a")])

    with pytest.raises(TypeError):
        table.by_model["b"] = Model("b")  # type: ignore[index]
    with pytest.raises(AttributeError):
        table.all = ()  # type: ignore[misc]
