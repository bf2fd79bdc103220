"""Gives every module one form: one tensor in, one tensor out, and a cache where the model has one.

A module may return a tensor, a dict, a tuple or a transformers ModelOutput; `choose_output` picks the tensor
that answers the request. A module whose `forward` takes both `past_key_values` and `use_cache` keeps that
ability: its adapter takes them too, and returns `(tensor, presents)` when asked for a cache.

Nothing here loads, converts or moves weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from splitlearn_comm.core import InvalidRequest
from splitlearn_manager.errors import InvalidModel

MEAN_POOLED = "mean_pooled"
PREFERRED_OUTPUTS = ("last_hidden_state", "logits")


@dataclass(frozen=True)
class CallOptions:
    """How a module is called and which of its outputs is the answer.

    Attributes:
        output: the name of an output, or `mean_pooled`; None for the preferred one.
        max_length: longest sequence that a request may have; None for any.
        forward_kwargs: further keyword arguments of every call.
    """

    output: str | None = None
    max_length: int | None = None
    forward_kwargs: Mapping[str, object] = field(default_factory=dict)


def named_outputs(returned: object) -> dict[str, torch.Tensor]:
    """The tensors that a module returned, by name; those of a tuple are called "0", "1" …"""
    if isinstance(returned, Mapping):
        items = [(str(name), value) for name, value in returned.items()]
    elif isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", None) or range(len(returned))
        items = [(str(name), value) for name, value in zip(names, returned, strict=True)]
    else:
        return {}
    return {name: value for name, value in items if isinstance(value, torch.Tensor)}


def choose_output(returned: object, name: str | None) -> torch.Tensor:
    """The tensor called `name`; without a name the preferred one, else the first.

    Raises:
        InvalidModel: there is no tensor, or none of that name.
    """
    if name is None and isinstance(returned, torch.Tensor):
        return returned
    outputs = named_outputs(returned)
    if name is not None:
        if name in outputs:
            return outputs[name]
        raise InvalidModel(f"config.output is {name!r}, but the model returns {_listed(returned)}")
    for preferred in (*PREFERRED_OUTPUTS, *outputs):
        if preferred in outputs:
            return outputs[preferred]
    raise InvalidModel(f"the model returned no tensor but {_listed(returned)}")


def _listed(returned: object) -> str:
    if isinstance(returned, torch.Tensor):
        return "a single tensor without a name"
    outputs = named_outputs(returned)
    return f"the outputs {', '.join(outputs)}" if outputs else f"a {type(returned).__name__}"


def has_cache(module: nn.Module) -> bool:
    """Whether the module's `forward` takes both `past_key_values` and `use_cache`."""
    try:
        names = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    return "past_key_values" in names and "use_cache" in names


def check_length(length: int, limit: int | None) -> None:
    """Raises InvalidRequest if a sequence is longer than the model takes."""
    if limit is not None and length > limit:
        raise InvalidRequest(
            f"the sequence has {length} positions; the model takes at most {limit}"
        )


def adapt(
    module: nn.Module, options: CallOptions, input_dtype: torch.dtype | None = None
) -> nn.Module:
    """A module of the one form around any module.

    Args:
        input_dtype: what requests are converted to; None to let the module's own attribute or its
            layers decide.
    """
    if has_cache(module):
        return CachingAdapter(module, options, input_dtype)
    return ModuleAdapter(module, options, input_dtype)


class Adapter(nn.Module):
    """What all adapters have; the subclasses say how the module is called."""

    example_shapes: Sequence[tuple[int, ...]] = ()
    """Shapes that the model surely takes, for warm-up; empty where that is not known."""

    def __init__(
        self, module: nn.Module, options: CallOptions, input_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.options = options
        if options.output == MEAN_POOLED:
            raise InvalidModel(
                "config.output is mean_pooled, which needs a transformers model that reads token ids; "
                "name one of the model's own outputs"
            )
        own_dtype = getattr(module, "input_dtype", None)
        self.input_dtype = input_dtype or (
            own_dtype if isinstance(own_dtype, torch.dtype) else None
        )
        self.example_shapes = tuple(getattr(module, "example_shapes", ()))
        own_size = getattr(module, "vocab_size", None)
        self.vocab_size = own_size if isinstance(own_size, int) else None

    def _check(self, x: torch.Tensor) -> None:
        # A float matrix is a batch of vectors; ids, and anything of three dimensions, are sequences.
        if x.dim() >= 3 or (x.dim() == 2 and not x.is_floating_point()):
            check_length(x.shape[1], self.options.max_length)


class ModuleAdapter(Adapter):
    """Takes one tensor, passes the fixed keyword arguments, and returns one tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the module's own shape and dtype; a sequence's positions are its dimension 1."""
        self._check(x)
        return choose_output(self.module(x, **self.options.forward_kwargs), self.options.output)


class CachingAdapter(Adapter):
    """The same for a module that takes `past_key_values` and `use_cache`."""

    def forward(
        self,
        x: torch.Tensor,
        past_key_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """With `use_cache`, `(tensor, presents)`; keys and values are [batch, heads, seq, head_dim]."""
        self._check(x)
        returned = self.module(
            x, past_key_values=past_key_values, use_cache=use_cache, **self.options.forward_kwargs
        )
        if not use_cache:
            return choose_output(returned, self.options.output)
        if isinstance(returned, tuple) and len(returned) == 2:
            return choose_output(returned[0], self.options.output), returned[1]
        presents = returned.get("past_key_values") if isinstance(returned, Mapping) else None
        return choose_output(returned, self.options.output), presents
