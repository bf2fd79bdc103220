"""The checks of an exported program alone: whether it stands for inputs of a shape, without running it.

An exported program begins with guards on its input's sizes, and has assertions on what it computes of them.
That is what depends on a shape; its assertions on the dtype and device of tensors in the middle hold for all
shapes or for none, and the example has met them.
"""

from __future__ import annotations

import torch
from torch import fx

GUARDS = "_guards_fn"
_ASSERTIONS = ("aten._assert_scalar", "aten._assert_async", "aten.sym_constrain_range")


def only_checks(program: fx.GraphModule) -> fx.GraphModule:
    """A program of the same input that raises where `program` says that it does not stand for it.

    Raises:
        RuntimeError: this version of torch exports programs without checks of their sizes.
    """
    if not hasattr(program, GUARDS):
        raise RuntimeError("this version of torch exports programs without checks of their sizes")
    wanted = {node for node in program.graph.nodes if node.op == "placeholder" or _checks(node)}
    for node in reversed(program.graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(())
    return fx.GraphModule(program, graph, "Checks")


def _checks(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.target == GUARDS
    return isinstance(node.target, torch._ops.OpOverload) and str(node.target).startswith(
        _ASSERTIONS
    )
