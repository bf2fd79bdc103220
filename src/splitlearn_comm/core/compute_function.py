"""What a server runs: `ComputeFunction`, which user code subclasses, and how it is called.

`invoke` is the only place that calls `compute`. It passes the cache arguments only to functions that take
them, so `compute(self, tensor)` works as well as
`compute(self, tensor, past_key_values=None, use_cache=False)`, and it brings whatever `compute` returns
into one form. What a function takes is read from its signature once, when the class is made.

Nothing here knows of devices, dtypes on the wire, or gRPC.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from splitlearn_comm.core.errors import ComputeFailed, InvalidRequest, Unsupported

if TYPE_CHECKING:
    import torch

KeyValues: TypeAlias = "tuple[tuple[torch.Tensor, torch.Tensor], ...]"
"""One (key, value) pair a layer, each tensor of shape [batch, heads, seq, head_dim]."""


@dataclass(frozen=True)
class Computed:
    """What a forward pass gave: the output and, if asked for and supported, the new cache."""

    output: torch.Tensor
    present: KeyValues | None = None


@dataclass(frozen=True)
class CallForm:
    """Which of the cache arguments a callable takes."""

    names: frozenset[str] = frozenset()
    any_keyword: bool = False

    @property
    def takes_past(self) -> bool:
        """Whether `past_key_values` may be passed."""
        return self.any_keyword or "past_key_values" in self.names

    @property
    def takes_use_cache(self) -> bool:
        """Whether `use_cache` may be passed."""
        return self.any_keyword or "use_cache" in self.names


def call_form(function: object) -> CallForm:
    """Read from a callable's signature which of the cache arguments it takes."""
    if not callable(function):
        return CallForm()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        # A callable written in C without a signature: only the tensor is certain to be taken.
        return CallForm()
    keyword_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return CallForm(
        names=frozenset(p.name for p in parameters if p.kind in keyword_kinds)
        & {"past_key_values", "use_cache"},
        any_keyword=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


class ComputeFunction(ABC):
    """A model as the server sees it; subclass it and define `compute`.

    The server calls it from several threads at once.
    """

    _call_form: ClassVar[CallForm] = CallForm()
    overlaps = False
    """Whether its inputs are copied to a GPU while others are computed there: then it is best given two at a
    time, and in pinned memory, which a GPU reads by itself. May change from call to call."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._call_form = call_form(cls.compute)

    @abstractmethod
    def compute(self, input_tensor: torch.Tensor) -> object:
        """Run the model.

        A subclass may also take `past_key_values=None, use_cache=False` (and `**kwargs`). It then gets the
        cache of an earlier call as a tuple of (key, value) tensors, one pair a layer, and with
        `use_cache=True` returns its new one.

        Args:
            input_tensor: a CPU tensor of the codec's dtype (float32 unless configured otherwise), with
                memory of its own.

        Returns:
            A tensor, or a pair `(tensor, present_key_values)`.
        """

    def forward_for_training(self, input_tensor: torch.Tensor, forward_id: str) -> torch.Tensor:
        """Run the model and keep the autograd graph under `forward_id`.

        Raises:
            Unsupported: unless a subclass defines it.
            InvalidRequest: if `forward_id` is kept already.
        """
        raise Unsupported("this model does not keep autograd graphs")

    def backward(
        self, forward_id: str, grad_output: torch.Tensor, learning_rate: float | None = None
    ) -> torch.Tensor:
        """Return d loss / d input of a forward that is kept, and forget it.

        Args:
            forward_id: as given to `forward_for_training`.
            grad_output: d loss / d output, in the output's shape.
            learning_rate: if given, also take one step of gradient descent of that size.

        Raises:
            Unsupported: unless a subclass defines it.
            UnknownTarget: if no forward is kept under `forward_id`.
        """
        raise Unsupported("this model does not keep autograd graphs")

    def get_info(self) -> Mapping[str, object]:
        """Return facts for people; `name` and `device` have a place of their own in the answer."""
        return {"name": type(self).__name__}

    def setup(self) -> None:  # noqa: B027 - optional, so not abstract
        """Called once before the server starts."""

    def teardown(self) -> None:  # noqa: B027 - optional, so not abstract
        """Called once after the server stopped."""


def invoke(
    function: ComputeFunction,
    input_tensor: torch.Tensor,
    past_key_values: KeyValues | None = None,
    use_cache: bool = False,
) -> Computed:
    """Call `function.compute` with the arguments that it takes.

    `use_cache` is a wish: a function without a cache answers without one. `past_key_values` is not,
    because an answer that ignores it would be wrong.

    Raises:
        InvalidRequest: if there are `past_key_values` and the function takes none.
        ComputeFailed: if it returns neither a tensor nor a pair of a tensor and a cache.
    """
    form = function._call_form
    if past_key_values is not None and not form.takes_past:
        raise InvalidRequest("past_key_values were sent, but this model takes none")
    arguments: dict[str, object] = {}
    if past_key_values is not None or "past_key_values" in form.names:
        arguments["past_key_values"] = past_key_values
    if (use_cache and form.takes_use_cache) or "use_cache" in form.names:
        arguments["use_cache"] = use_cache
    return as_computed(function.compute(input_tensor, **arguments), keep_present=use_cache)


def as_computed(returned: object, *, keep_present: bool) -> Computed:
    """Bring what a forward returned, a tensor or `(tensor, present)`, into one form.

    Raises:
        ComputeFailed: if it is neither, naming the type that it is.
    """
    import torch

    present: object = None
    output = returned
    if isinstance(returned, tuple) and len(returned) == 2:
        output, present = returned
    if not isinstance(output, torch.Tensor):
        raise ComputeFailed(
            f"the model returned {_described(returned)}; expected a tensor, "
            "or a pair of a tensor and its key/value cache"
        )
    if present is None or not keep_present:
        return Computed(output)
    return Computed(output, _as_key_values(present))


def _as_key_values(present: object) -> KeyValues:
    import torch

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    if isinstance(present, Sequence):
        for pair in present:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                break
            key, value = pair
            if not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
                break
            pairs.append((key, value))
        else:
            return tuple(pairs)
    raise ComputeFailed(
        f"the model returned a cache of {_described(present)}; expected one (key, value) pair of "
        "tensors a layer"
    )


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{', '.join(type(item).__name__ for item in value)}]"
    return type(value).__name__


def on_cpu(tensor: object) -> torch.Tensor:
    """What a model returned, as an answer: on the processor, without a graph.

    Raises:
        ComputeFailed: if it is no tensor.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ComputeFailed(f"the model returned a {type(tensor).__name__}; expected a tensor")
    if tensor.is_cpu and not tensor.requires_grad:
        return tensor
    return tensor.detach().to("cpu")
