"""Has oneDNN run the linear layers and convolutions of a folded program, on weights in its own order.

torch's own linear layer puts the weights into the order of its kernel on each call, which is a third of a
small batch's time; a convolution moves its input and output into oneDNN's order and back. Here the weights
are brought into that order once, what goes from convolution to convolution stays in it (channels last), and
a GELU that follows is computed where the layer writes its output. A ReLU is computed in place, by torch:
oneDNN's makes 0 of what is not a number, which would hide it from the caller.

It is for float32 on a processor, takes the memory of those weights once more, and is not the faster way on
every machine: the caller measures. The operators are those to which torch's own compiler lowers a frozen
graph; `torch._inductor.fx_passes.mkldnn_fusion` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

FEWEST_WEIGHTS = 2**14
"""The weights of a smaller linear layer stay where they are: nothing is gained."""

_WORTH_A_CALL = 3 * 2**19
"""Multiplications (rows · inputs · outputs) below which torch's own call is quicker: it is 12 us shorter."""

_VIEW = "aten.view.default"
_ACTIVATIONS = {
    "aten.relu.default": "relu",
    "aten.relu_.default": "relu",
    "aten.gelu.default": "gelu",
}


class Packed:
    """The weights of one model in oneDNN's order, each once for all of its programs.

    It holds the weights that it was given, too, so it is to go when the programs are made.
    """

    def __init__(self) -> None:
        self._all: list[tuple[torch.Tensor, tuple[object, ...], torch.Tensor]] = []

    def linear(self, weight: torch.Tensor) -> torch.Tensor:
        """Of a weight [outputs, inputs]."""

        def pack() -> torch.Tensor:
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # type: ignore[no-any-return]

        return self._found(weight, ("linear",), pack)

    def convolution(
        self,
        weight: torch.Tensor,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> torch.Tensor:
        """Of a weight [outputs, inputs / groups, height, width]."""
        how = (padding, stride, dilation, groups)

        def pack() -> torch.Tensor:
            return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, None)  # type: ignore[no-any-return]

        return self._found(weight, how, pack)

    def _found(
        self, weight: torch.Tensor, how: tuple[object, ...], pack: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        for source, its_how, packed in self._all:
            if source.shape == weight.shape and its_how == how and _are_equal(source, weight):
                return packed
        packed = pack()
        self._all.append((weight, how, packed))
        return packed


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return same or torch.equal(one, other)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN, and the operators that run on packed weights."""
    names = (
        "_linear_pointwise",
        "_reorder_linear_weight",
        "_convolution_pointwise",
        "_reorder_convolution_weight",
    )
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    algorithm: str,
) -> torch.Tensor:
    """x · weightᵀ + bias, and then the activation. x: [..., inputs]; weight: [outputs, inputs]."""
    answer: torch.Tensor
    if x.numel() * weight.shape[0] >= _WORTH_A_CALL:
        fused = "none" if activation == "relu" else activation
        answer = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, fused, [], algorithm)
        return answer.relu_() if activation == "relu" else answer
    answer = functional.linear(x, weight, bias)
    if activation == "relu":
        return answer.relu_()
    return functional.gelu(answer, approximate=algorithm) if activation == "gelu" else answer


def convolution(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> torch.Tensor:
    """The convolution of images [batch, channels, height, width], and then the activation."""
    x = x.contiguous(memory_format=torch.channels_last)
    answer: torch.Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        x, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return answer.relu_() if activation == "relu" else answer


def pack(module: fx.GraphModule, packed: Packed) -> bool:
    """Call oneDNN where that may be quicker, in place; whether there was such a place."""
    places = [node for node in module.graph.nodes if _pack_linear(module, node, packed)]
    if _may_change_order(module.graph):
        convolutions = [
            node for node in module.graph.nodes if _pack_convolution(module, node, packed)
        ]
        for node in module.graph.nodes if convolutions else ():
            if str(node.target) == _VIEW:
                # What a convolution gives is in another order than the view was written down for.
                node.target = torch.ops.aten.reshape.default
        places += convolutions
    module.graph.eliminate_dead_code()
    return bool(places)


def _pack_linear(module: fx.GraphModule, node: fx.Node, packed: Packed) -> bool:
    name = str(node.target)
    if name == "aten.linear.default":
        x, source, bias = (*node.args, None)[:3]
    elif name == "aten.addmm.default":
        bias, x, source = node.args
    else:
        return False
    weight = _weight(module, source)
    if node.kwargs or weight is None or weight.dim() != 2 or weight.numel() < FEWEST_WEIGHTS:
        return False
    if not _is_float32(x, at_least=2):
        return False
    if not (bias is None or _is_float32(bias, at_least=1, at_most=1)):
        return False
    graph = module.graph
    with graph.inserting_before(node):
        if name == "aten.addmm.default":
            weight = weight.t()
            source = graph.call_function(torch.t, (source,))
        own = _held(module, packed.linear(weight))
    activation, algorithm = _take_activation(node, ("relu", "gelu"))
    _become(node, linear, (x, source, own, bias, activation, algorithm))
    return True


def _pack_convolution(module: fx.GraphModule, node: fx.Node, packed: Packed) -> bool:
    if str(node.target) != "aten.conv2d.default" or node.kwargs:
        return False
    given: list[Any] = list(node.args)
    x, source, bias, stride, padding, dilation, groups = (
        given + [None, [1, 1], [0, 0], [1, 1], 1][len(given) - 2 :]
    )
    weight = _weight(module, source)
    if weight is None or not _is_float32(x, at_least=4):
        return False
    if not (bias is None or _is_float32(bias, at_least=1)):
        return False
    how = (*(_pair(sizes) for sizes in (padding, stride, dilation)), groups)
    with module.graph.inserting_before(node):
        own = _held(module, packed.convolution(weight, *how))
    activation, _ = _take_activation(node, ("relu",))
    _become(node, convolution, (x, own, bias, *how, activation))
    return True


def _pair(sizes: Any) -> list[int]:
    """One size for height and width may stand for both."""
    return [*sizes] if len(sizes) == 2 else [*sizes, *sizes]


def _may_change_order(graph: fx.Graph) -> bool:
    """Whether a tensor in the middle may lie in memory in another order, without anybody noticing.

    Views become copies where they must. That is seen where somebody writes through one, and by operators
    that speak of places in memory.
    """
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    if any(
        name.startswith(("aten.as_strided", "aten.view_")) or name == "aten.view.dtype"
        for name in names
    ):
        return False
    writes = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )
    return not (writes and _VIEW in names)


def _take_activation(node: fx.Node, known: Sequence[str]) -> tuple[str, str]:
    """(name, algorithm) of the activation that alone reads what a layer gives; it is taken out.

    A view between them is no obstacle: the activation is the same for each value.
    """
    last = node
    while len(last.users) == 1:
        user = next(iter(last.users))
        name = _ACTIVATIONS.get(str(user.target))
        if name in known and user.args == (last,):
            algorithm = str(user.kwargs.get("approximate", "none")) if name == "gelu" else ""
            user.replace_all_uses_with(last)
            user.graph.erase_node(user)
            return str(name), algorithm
        if str(user.target) != _VIEW or user.args[0] is not last:
            break
        last = user
    return "none", ""


def _become(node: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    node.target, node.args, node.kwargs = function, arguments, {}


def _weight(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The weight that a node reads from the module, if it can be packed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    fits = value.dtype is torch.float32 and value.device.type == "cpu"
    return value.detach() if fits else None


def _is_float32(node: object, at_least: int, at_most: int = 2**10) -> bool:
    """Whether a node gives a tensor of float32 on a processor, with so many dimensions."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (
        isinstance(value, torch.Tensor)
        and value.dtype is torch.float32
        and value.device.type == "cpu"
        and at_least <= value.dim() <= at_most
    )


def _held(module: fx.GraphModule, packed: torch.Tensor) -> fx.Node:
    """A node that reads packed weights, which the module holds from now on, once for all readers."""
    for name, held in module._buffers.items():
        if held is packed:
            return module.graph.get_attr(name)
    name = f"_packed_{sum(1 for key in module._buffers if key.startswith('_packed_'))}"
    module.register_buffer(name, packed)
    return module.graph.get_attr(name)
