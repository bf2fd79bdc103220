"""Takes out of an exported program what changes nothing, and writes several operators that are one as one.

- dropout that is off, a slice of all there is, a check or a conversion to what a tensor already is
- the tanh form of GELU, which some models spell out in eight operators: the same formula in one pass
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

_LAST = sys.maxsize
_CUBE = 0.044715
_ROOT_OF_2_OVER_PI = 0.7978845608028654


def simplify(graph: fx.Graph) -> None:
    """In place. What is left without a user goes with the next removal of dead code."""
    for node in list(graph.nodes):
        name = str(node.target)
        if name == "aten._assert_tensor_metadata.default":
            # It holds for inputs of all shapes, or for none.
            graph.erase_node(node)
        elif name in _CHANGE_NOTHING and _CHANGE_NOTHING[name](node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if (source := _tanh_gelu_of(node)) is not None:
            with graph.inserting_before(node):
                gelu = graph.call_function(
                    torch.ops.aten.gelu.default, (source,), {"approximate": "tanh"}
                )
            gelu.meta = dict(node.meta)
            node.replace_all_uses_with(gelu)


def _is_off(node: fx.Node) -> bool:
    return len(node.args) == 3 and node.args[2] is False


def _is_whole(node: fx.Node) -> bool:
    given: dict[str, object] = dict(zip(("start", "end", "step"), node.args[2:], strict=False))
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    return start in (None, 0) and end in (None, _LAST) and step == 1


def _is_already(node: fx.Node) -> bool:
    """Whether `to` gives its own input: of that type and on that device, with no copy asked for."""
    source, *others = node.args
    asked = {"dtype": others[0]} if len(others) == 1 else dict(node.kwargs)
    if len(others) > 1 or not isinstance(source, fx.Node) or set(asked) - _CONVERTS_TO:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


_CONVERTS_TO = {"dtype", "layout", "device"}

_CHANGE_NOTHING: Mapping[str, Callable[[fx.Node], bool]] = {
    "aten.alias.default": lambda _: True,
    "aten.dropout.default": _is_off,
    "aten.slice.Tensor": _is_whole,
    "aten.to.dtype": _is_already,
    "aten.to.dtype_layout": _is_already,
}
"""Operators that may give their first argument as it is, and when they do."""


def _tanh_gelu_of(node: fx.Node) -> fx.Node | None:
    """x, where a node gives 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))).

    Source of the formula: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """
    for half, rest in _either_way(node, "aten.mul.Tensor"):
        x = _with_number(half, "aten.mul.Tensor", 0.5)
        tanh = _with_number(rest, "aten.add.Tensor", 1.0)
        inner = _only_argument(tanh, "aten.tanh.default")
        added = _with_number(inner, "aten.mul.Tensor", _ROOT_OF_2_OVER_PI)
        for first, second in _either_way(added, "aten.add.Tensor"):
            power = _with_number(second, "aten.mul.Tensor", _CUBE)
            cubed = _with_number(power, "aten.pow.Tensor_Scalar", 3.0)
            if isinstance(x, fx.Node) and x is first is cubed:
                return x
    return None


def _either_way(node: object, name: str) -> tuple[tuple[Any, Any], ...]:
    """The two arguments of an operator of that name, in both orders; nothing for another node."""
    if not _is(node, name, 2):
        return ()
    first, second = node.args  # type: ignore[attr-defined]
    return ((first, second), (second, first))


def _with_number(node: object, name: str, number: float) -> object:
    """What the operator of that name takes beside that number; None if it is something else."""
    if _is(node, name, 2) and node.args[1] == number:  # type: ignore[attr-defined]
        return node.args[0]  # type: ignore[attr-defined]
    return None


def _only_argument(node: object, name: str) -> object:
    return node.args[0] if _is(node, name, 1) else None  # type: ignore[attr-defined]


def _is(node: object, name: str, arguments: int) -> bool:
    return (
        isinstance(node, fx.Node)
        and str(node.target) == name
        and len(node.args) == arguments
        and not node.kwargs
    )
