"""Runs a model once before it serves, so that the first request is not the slow one.

With `config.input_shape` the input is known, and a model that cannot take it is not served (`WarmupFailed`).
Without it shapes are guessed: from what the adapter knows, else from the first layer that has parameters. A
guess that does not fit proves nothing, so then the model serves all the same, with a note.

Inputs are zeros, or for integers ones. What the model answers is not judged; values that are not finite are
noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import TerminalLoadError, WarmupFailed

_FREE_SIZE = 8
"""The size of a dimension that may vary, the first one (the batch) excepted: it is 1."""

_GUESSED_EXTENT = 32
_LARGE_EXTENT = 224
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Warmup:
    """How warm-up went.

    Attributes:
        shape: that of the input which the model answered; None if there is none.
    """

    shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def warmed(self) -> bool:
        return self.shape is not None


def warm_up(function: ModelComputeFunction, config: ModelConfig) -> Warmup:
    """Run the model once, as the config says.

    Raises:
        WarmupFailed: the model raised for `config.input_shape`.
        TerminalLoadError: the model's own refusal, such as an output that it does not have.
    """
    if not config.warmup:
        return Warmup()
    shape = config.config.input_shape
    if shape is not None:
        return _with_shape(function, config.model_id, concrete(shape))
    return _with_guesses(function)


def concrete(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` with a size for each dimension that may vary."""
    sizes = [_FREE_SIZE if size == -1 else size for size in shape]
    if shape and shape[0] == -1:
        sizes[0] = 1
    return tuple(sizes)


def _with_shape(function: ModelComputeFunction, model_id: str, shape: tuple[int, ...]) -> Warmup:
    try:
        return Warmup(shape, _run(function, shape))
    except TerminalLoadError:
        raise
    except Exception as error:
        raise WarmupFailed(
            f"model {model_id!r} failed on a first input of shape {list(shape)}: {in_one_line(error)}"
        ) from error


def _with_guesses(function: ModelComputeFunction) -> Warmup:
    tried: list[str] = []
    for shape in guessed_shapes(function.model):
        try:
            return Warmup(tuple(shape), _run(function, shape))
        except TerminalLoadError:
            raise
        except Exception as error:
            tried.append(f"{list(shape)}: {in_one_line(error)}")
    attempts = f" (tried {'; '.join(tried)})" if tried else ""
    return Warmup(None, (f"not warmed up: give config.input_shape{attempts}",))


def first_input(function: ModelComputeFunction, shape: Sequence[int]) -> torch.Tensor:
    """An input of that shape that every model of its kind should take."""
    # Of ids, 0 is often the padding; 1 is in every vocabulary but one of a single entry.
    value = 1.0 if function.input_dtype in _INTEGERS else 0.0
    if function.get_info().get("vocabulary") == 1:
        value = 0.0
    return torch.full(tuple(shape), value)


def _run(function: ModelComputeFunction, shape: tuple[int, ...]) -> tuple[str, ...]:
    answer = function.compute(first_input(function, shape))
    output = answer[0] if isinstance(answer, tuple) else answer
    if output.is_floating_point() and not bool(output.isfinite().all()):
        return ("its first answer has values that are not finite",)
    return ()


def guessed_shapes(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Shapes worth trying, the likeliest first; empty if nothing is known about the model."""
    known: Sequence[tuple[int, ...]] = getattr(model, "example_shapes", ())
    return tuple(known) or tuple(_from_first_layer(model))


def _from_first_layer(model: nn.Module) -> Iterator[tuple[int, ...]]:
    layer = _first_layer(model)
    match layer:
        case None:
            return
        case nn.RNNBase():
            yield (1, 1, layer.input_size)
        case nn.RNNCellBase():
            yield (1, layer.input_size)
        case nn.LayerNorm():
            yield (1, 1, *layer.normalized_shape)
        case nn.MultiheadAttention():
            yield (1, 1, layer.embed_dim)
        case nn.BatchNorm2d():
            yield (1, layer.num_features, _GUESSED_EXTENT, _GUESSED_EXTENT)
        case nn.Embedding() | nn.EmbeddingBag():
            yield (1, _FREE_SIZE)
        case _:
            yield from _from_weight(layer)


def _from_weight(layer: nn.Module) -> Iterator[tuple[int, ...]]:
    """From the shape of the layer's first parameter, which a TorchScript module has as well."""
    if getattr(layer, "original_name", "") in ("Embedding", "EmbeddingBag"):
        yield (1, _FREE_SIZE)
        return
    weight = next(layer.parameters(recurse=False))
    channels = weight.shape[1] * int(getattr(layer, "groups", 1)) if weight.dim() > 1 else 0
    extents = weight.dim() - 2
    match weight.dim():
        case 1:
            yield (1, weight.shape[0])
        case 2:
            yield from ((1, channels), (1, 1, channels))
        case 3 | 4 | 5:
            yield (1, channels, *[_GUESSED_EXTENT] * extents)
            if extents < 3:
                yield (1, channels, *[_LARGE_EXTENT] * extents)


def _first_layer(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            return module
        is_leaf = next(module.children(), None) is None
        if is_leaf and next(module.parameters(recurse=False), None) is not None:
            return module
    return None
