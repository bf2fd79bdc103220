"""Folds what depends on weights alone: from an exported program to a module with fewer operators.

- A batch norm after a convolution, of which nobody else sees the output, goes into its weights.
- Operators that change nothing go, see `simplifying`.
- An operator whose arguments are all weights or constants is computed, if the outcome takes no more memory
  than they do; what is only a view of a weight is left as it is, so that the weight itself need not stay
  twice where it is moved.

What is left is a plain function of one tensor: the exported program's own checks are not in it. Operators
are called by the names that torch's own layers call them by, which is several times as quick as by those of
the program, and weights are attributes of one object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from splitlearn_manager.runtime.optimize.packing import Packed, pack
from splitlearn_manager.runtime.optimize.simplifying import simplify
from splitlearn_manager.runtime.optimize.size_checks import GUARDS

_aten = torch.ops.aten
_CONVOLUTIONS = (
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
)
_SMALL_BYTES = 4096

_QUICKER: Mapping[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.batch_norm.default": torch.batch_norm,
    "aten.bmm.default": torch.bmm,
    "aten.cat.default": torch.cat,
    "aten.conv1d.default": torch.conv1d,
    "aten.conv2d.default": torch.conv2d,
    "aten.conv3d.default": torch.conv3d,
    "aten.div.Tensor": torch.div,
    "aten.flatten.using_ints": torch.flatten,
    "aten.gelu.default": nn.functional.gelu,
    "aten.layer_norm.default": torch.layer_norm,
    "aten.linear.default": nn.functional.linear,
    "aten.matmul.default": torch.matmul,
    "aten.mul.Tensor": torch.mul,
    "aten.relu.default": torch.relu,
    "aten.scaled_dot_product_attention.default": nn.functional.scaled_dot_product_attention,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.sub.Tensor": torch.sub,
    "aten.tanh.default": torch.tanh,
    "aten.transpose.int": torch.transpose,
}
"""Functions that take the same arguments as the operator, by position and by keyword."""


def fold(program: fx.GraphModule, packed: Packed | None = None) -> fx.GraphModule | None:
    """The folded program; it shares the weights of `program`, which stays as it is.

    Its attribute `weights` has all tensors that it reads.

    Args:
        packed: where weights are kept in oneDNN's order, for a program that has oneDNN called on them; None
            comes back if there is nothing to call it on.
    """
    graph = fx.Graph()
    returned = graph.graph_copy(program.graph, {})
    graph.output(_only(returned))
    folded = fx.GraphModule(program, graph, "Frozen")
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == GUARDS:
            graph.erase_node(node)
        elif str(node.target) == "aten.detach_.default":
            # Of a constant that the forward has written down; there is nothing to detach it from.
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    simplify(graph)
    _fold_batch_norms(folded)
    _fold_constants(folded)
    graph.eliminate_dead_code()
    if packed is not None and not pack(folded, packed):
        return None
    _call_quickly(folded)
    graph.lint()
    folded.recompile()
    return folded


def share(folded: fx.GraphModule, held: Sequence[torch.Tensor]) -> None:
    """Have a folded program read the tensors of another one where they are equal to its own."""
    weights = list(folded.__dict__["weights"])
    # What is packed is shared already, and cannot be compared.
    others = [other for other in held if other.layout is torch.strided]
    for i, own in enumerate(weights):
        for other in others if own.layout is torch.strided else ():
            alike = other.shape == own.shape and other.dtype == own.dtype
            if other is own or (alike and torch.equal(other, own)):
                weights[i] = folded.__dict__[f"w{i}"] = other
                break
    folded.__dict__["weights"] = tuple(weights)


def _only(returned: object) -> Any:
    """The one output of a program that gives one tensor."""
    if isinstance(returned, tuple | list):
        tensors = [item for item in returned if item is not None]
        if len(tensors) != 1:
            raise ValueError(f"it returns {len(tensors)} tensors")
        return tensors[0]
    return returned


def _fold_batch_norms(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) != "aten.batch_norm.default":
            continue
        source, *rest = node.args
        weights = _batch_norm_weights(module, rest)
        if weights is None or not _is_own_convolution(source):
            continue
        convolution = cast(fx.Node, source)
        kernel = _constant(module, convolution.args[1])
        bias = convolution.args[2] if len(convolution.args) > 2 else None
        if kernel is None or (bias is not None and _constant(module, bias) is None):
            continue
        scale, shift, mean, variance, eps = weights
        new_kernel, new_bias = fuse_conv_bn_weights(
            kernel, _constant(module, bias), mean, variance, eps, scale, shift
        )
        with graph.inserting_before(convolution):
            arguments = list(convolution.args) + [None] * (3 - len(convolution.args))
            arguments[1] = _stored(module, new_kernel)
            arguments[2] = _stored(module, new_bias)
        convolution.args = tuple(arguments)
        node.replace_all_uses_with(convolution)
        graph.erase_node(node)


def _batch_norm_weights(module: fx.GraphModule, rest: list[Any]) -> Any:
    """(weight, bias, mean, variance, eps) of a batch norm that uses its running statistics; else None."""
    weight, bias, mean, variance, training, _, eps = rest[:7]
    found = [_constant(module, of) for of in (weight, bias, mean, variance)]
    if training is not False or found[2] is None or found[3] is None:
        return None
    if any(of is not None and value is None for of, value in zip(rest, found, strict=False)):
        return None
    return (*found, eps)


def _is_own_convolution(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and str(node.target) in _CONVOLUTIONS
        and len(node.users) == 1
        and not {"weight", "bias"} & set(node.kwargs)
    )


def _fold_constants(module: fx.GraphModule) -> None:
    values: dict[fx.Node, torch.Tensor] = {}
    folded: list[fx.Node] = []
    for node in module.graph.nodes:
        if _writes(node) and any(written in values for written in node.all_input_nodes):
            # Into the outcome of an operator, or into the weights themselves: neither is a constant.
            raise ValueError(f"it writes to its own weights or buffers ({node.target})")
        if node.op == "get_attr" and (value := _constant(module, node)) is not None:
            values[node] = value
        elif (value := _computed(node, values)) is not None:
            values[node] = value
            folded.append(node)
    for node in folded:
        seen = any(user not in values for user in node.users)
        if seen and not _is_a_view(node, values):
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_stored(module, values[node]))


def _computed(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """What a node gives, if that depends on constants alone, and is worth keeping."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if _writes(node) or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if any(source not in values for source in node.all_input_nodes):
        return None
    arguments = fx.map_arg(node.args, values.__getitem__)
    keywords = fx.map_arg(node.kwargs, values.__getitem__)
    value = target(*arguments, **cast(dict[str, Any], keywords))
    if not isinstance(value, torch.Tensor):
        return None
    taken = sum(values[source].nbytes for source in node.all_input_nodes)
    return value if value.nbytes <= max(taken, _SMALL_BYTES) else None


def _writes(node: fx.Node) -> bool:
    """Whether an operator writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_a_view(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> bool:
    """Whether it lies in the memory of a weight."""
    weights = (v for n, v in values.items() if n.op == "get_attr")
    own = values[node].untyped_storage().data_ptr()
    return any(weight.untyped_storage().data_ptr() == own for weight in weights)


def _constant(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor that a node reads from the module; None if it does something else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = _read(module, str(node.target))
    return value.detach() if isinstance(value, torch.Tensor) else None


def _read(module: fx.GraphModule, target: str) -> Any:
    value: object = module
    for name in target.split("."):
        value = getattr(value, name, None)
    return value


def _stored(module: fx.GraphModule, value: torch.Tensor) -> fx.Node:
    """A node that reads `value`, which becomes a buffer of the module."""
    name = f"_folded_{sum(1 for key in module._buffers if key.startswith('_folded_'))}"
    module.register_buffer(name, value.detach().clone())
    node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _call_quickly(module: fx.GraphModule) -> None:
    """Hold all weights in the module itself, and nothing else; call operators by their quick names."""
    held: dict[str, tuple[str, torch.Tensor]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            if target not in held:
                held[target] = (f"w{len(held)}", _read(module, target))
            node.target = held[target][0]
        elif node.op == "call_function" and str(node.target) in _QUICKER:
            node.target = _QUICKER[str(node.target)]
    for table in (module._parameters, module._buffers, module._modules):
        table.clear()
    for name, tensor in held.values():
        # Past nn.Module, whose own attributes take longer to look up.
        module.__dict__[name] = tensor
    module.__dict__["weights"] = tuple(tensor for _, tensor in held.values())
