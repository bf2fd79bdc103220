"""Decides which inputs a model takes: the dtype, the range of ids and the shape.

On the wire everything is float32, token ids too, so a model that wants integers must be given integers:
`input_rule` finds out which dtype that is, and `InputRule.convert` turns the request's tensor into it or
says exactly why it cannot. Values are checked before the model runs, because an id outside the vocabulary
is an assertion on a GPU that ends the whole process's use of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from splitlearn_comm.core.codec import dtype_name
from splitlearn_comm.core.errors import InvalidRequest
from splitlearn_comm.core.lanes import Lane

_EMBEDDINGS = ("Embedding", "EmbeddingBag")


@dataclass(frozen=True)
class InputRule:
    """What a model takes.

    Attributes:
        dtype: what the request's tensor is converted to.
        vocabulary: integers must lie in [0, vocabulary); None where that is not known.
        shape: the shape that requests must fit, -1 being any size; None for any shape.
    """

    dtype: torch.dtype
    vocabulary: int | None = None
    shape: tuple[int, ...] | None = None

    @property
    def takes_integers(self) -> bool:
        """Whether the input has no gradient."""
        return not self.dtype.is_floating_point and not self.dtype.is_complex

    def convert(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        """Return the tensor in the model's dtype, sent to its device by `lane`.

        Raises:
            InvalidRequest: if the shape does not fit, or a value cannot be one of the model's integers.
        """
        self.check_shape(tensor.shape)
        return self.convert_values(tensor, lane)

    def convert_values(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        """As `convert`, for a tensor that need not have the shape of an input.

        Raises:
            InvalidRequest: if a value cannot be one of the model's integers.
        """
        if self.takes_integers:
            self._check_integers(tensor)
        return lane.send(tensor, self.dtype)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises InvalidRequest if an input of that shape is none that the model takes."""
        if self.shape is None:
            return
        fits = len(shape) == len(self.shape) and all(
            want in (-1, got) for got, want in zip(shape, self.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                f"the input has shape {list(shape)}; "
                f"the model takes {list(self.shape)} (-1: any size)"
            )

    def _check_integers(self, tensor: torch.Tensor) -> None:
        if tensor.numel() == 0:
            return
        if tensor.is_floating_point() and not bool((tensor == tensor.trunc()).all()):
            # NaN is unequal to itself, so it ends up here as well; infinity fails the range below.
            raise InvalidRequest(
                f"the model takes whole numbers ({dtype_name(self.dtype)}); "
                "the input has values with a fraction, or NaN"
            )
        low, high, kind = self._range()
        smallest, largest = (value.item() for value in tensor.aminmax())
        if smallest < low or largest > high:
            raise InvalidRequest(
                f"the input has values from {smallest:g} to {largest:g}; "
                f"{kind} must lie in [{low}, {high}]"
            )

    def _range(self) -> tuple[int, int, str]:
        if self.vocabulary is not None:
            return 0, self.vocabulary - 1, f"the model's ids (vocabulary {self.vocabulary})"
        if self.dtype is torch.bool:
            return 0, 1, "bool inputs"
        limits = torch.iinfo(self.dtype)
        return limits.min, limits.max, f"{dtype_name(self.dtype)} inputs"


def input_rule(
    model: nn.Module,
    input_dtype: torch.dtype | None = None,
    input_shape: Sequence[int] | None = None,
) -> InputRule:
    """Find out what `model` takes.

    The dtype is `input_dtype`, else the model's own attribute `input_dtype`, else int64 if the first layer
    with parameters is an embedding, else the dtype of the first floating-point parameter or buffer, else
    float32. The vocabulary is the model's attribute `vocab_size`, else the size of its first embedding.
    """
    dtype = input_dtype or _own_dtype(model) or _first_layer_dtype(model)
    rule = InputRule(dtype, shape=None if input_shape is None else tuple(input_shape))
    if not rule.takes_integers:
        return rule
    return InputRule(dtype, _vocabulary(model), rule.shape)


def _own_dtype(model: nn.Module) -> torch.dtype | None:
    dtype = getattr(model, "input_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _first_layer_dtype(model: nn.Module) -> torch.dtype:
    for module in model.modules():
        is_leaf = next(module.children(), None) is None
        if is_leaf and next(module.parameters(recurse=False), None) is not None:
            if _is_embedding(module):
                return torch.int64
            break
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _vocabulary(model: nn.Module) -> int | None:
    size = getattr(model, "vocab_size", None)
    if isinstance(size, int):
        return size
    for module in model.modules():
        if _is_embedding(module):
            return next(module.parameters(recurse=False)).shape[0]
    return None


def _is_embedding(module: nn.Module) -> bool:
    # A TorchScript module is of another class and keeps the name of the one that it was made from.
    name = getattr(module, "original_name", None)
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or name in _EMBEDDINGS
