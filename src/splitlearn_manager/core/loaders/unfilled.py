"""Lets a factory build its module without writing the random numbers that a file is about to replace.

Filling a layer with random numbers takes longer than reading its weights. So while the factory runs,
functions that fill a tensor at random (`nn.init`, `normal_`, `torch.randn` …) leave it as it is: memory that
nothing has been written to, which costs nothing either. Everything else runs as always: buffers that are
computed, sizes, ties between weights.

A tensor without values must never be taken for one with values. Whatever would look at it ends the attempt,
with `ValuesNeeded`, and so does randomness that came out otherwise than it would have. After the build,
`covers` tells whether all such tensors will be filled. If not, the factory is called again, without this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from splitlearn_manager.core.loaders.own_memory import watch_storage

_RANDOM_FILLS = frozenset(
    {
        "uniform_",
        "normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "xavier_uniform_",
        "xavier_normal_",
        "exponential_",
        "bernoulli_",
        "random_",
    }
)
_RANDOM_MAKERS: Mapping[str, Callable[..., torch.Tensor]] = {
    "rand": torch.empty,
    "randn": torch.empty,
    "rand_like": torch.empty_like,
    "randn_like": torch.empty_like,
}
_CHANGES = frozenset(
    {
        *_RANDOM_FILLS,
        *(
            "zero_",
            "fill_",
            "constant_",
            "ones_",
            "zeros_",
            "copy_",
            "clamp_",
            "clamp_min_",
            "clamp_max_",
        ),
        *(
            "mul_",
            "div_",
            "add_",
            "sub_",
            "neg_",
            "sqrt_",
            "pow_",
            "exp_",
            "log_",
            "erfinv_",
            "tanh_",
        ),
        *("__setitem__", "__imul__", "__iadd__", "__isub__", "__itruediv__"),
    }
)
"""Functions that write into their first argument: without values it is no use to do so."""

_CONVERSIONS = frozenset({"to", "half", "bfloat16", "float", "double", "type", "cpu", "cuda"})
_VIEWS = frozenset(
    {
        *("detach", "view", "reshape", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *(
            "t",
            "transpose",
            "permute",
            "select",
            "narrow",
            "chunk",
            "split",
            "unbind",
            "__getitem__",
        ),
        *("expand", "expand_as", "contiguous", "movedim", "swapaxes", "diagonal"),
    }
)
_FACTS = frozenset(
    {
        *(
            "__get__",
            "__set__",
            "__len__",
            "__hash__",
            "size",
            "dim",
            "ndimension",
            "numel",
            "stride",
        ),
        *("storage_offset", "element_size", "nelement", "is_contiguous", "is_floating_point"),
        *("is_complex", "is_signed", "get_device", "requires_grad_", "detach_", "is_inference"),
        *("is_same_size", "_has_compatible_shallow_copy_type", "has_names", "register_hook"),
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "type_as", "_is_view"),
        *("_calculate_fan_in_and_fan_out",),
    }
)
"""Functions that look at what a tensor is, not at its values."""

_TENSORS = (
    (torch.Tensor, nn.Parameter, nn.Buffer)
    if hasattr(nn, "Buffer")
    else (torch.Tensor, nn.Parameter)
)


_Marks = dict[int, Callable[[], bool]]
"""Storages by address, each with a function that tells whether it has been freed."""


class ValuesNeeded(BaseException):
    """The factory does something that needs a value which was left out. No `Exception`: user code may
    catch those."""


class Unfilled(TorchFunctionMode):
    """While it is entered, this thread's tensors are not filled at random. Entered once.

    Attributes:
        skipped: how many fills were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0
        self._without: _Marks = {}
        self._otherwise: _Marks = {}
        self._random_state: torch.Tensor | None = None

    def covers(self, filled: Iterable[torch.Tensor]) -> bool:
        """Whether `filled` are all tensors that are left without values, or with other ones than usual.

        Call it once the factory has returned, with what will be filled.
        """
        whole = {t.untyped_storage().data_ptr() for t in filled if _is_whole(t)}
        left = {*_alive(self._without), *_alive(self._otherwise)}
        return left <= whole and self._random_state_is_known()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # The functions of nn.init arrive with all of their arguments by name.
        target: Any = args[0] if args else kwargs.get("tensor")
        caller = sys._getframe(1)
        if self._lacks_values(target, caller):
            return self._on_unfilled(target, func, args, kwargs)
        others = (value for value in (*args, *kwargs.values()) if value is not target)
        if any(self._lacks_values(value, caller) for value in _flat(others)):
            raise ValuesNeeded(name)
        makes = name in _RANDOM_MAKERS and func is getattr(torch, name)
        fills = name in _RANDOM_FILLS and type(target) in _TENSORS
        if not makes and not fills:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None or _is_import(caller):
            return func(*args, **kwargs)
        if fills and _reads_in_between(caller):
            return self._fill_otherwise(target, func, args, kwargs)
        self._skip()
        left: torch.Tensor = target if fills else _RANDOM_MAKERS[name](*args, **kwargs)
        self._mark(self._without, left)
        return left

    def _on_unfilled(
        self,
        target: torch.Tensor,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        name = func.__name__
        if name in _CHANGES:
            if name in _RANDOM_FILLS:
                self._skip()
            return None if name == "__setitem__" else target
        if name in _FACTS:
            return func(*args, **kwargs)
        if name in _VIEWS:
            made = func(*args, **kwargs)
            # An index that picks elements makes a copy, and so may reshape and contiguous.
            if all(_address(view) == _address(target) for view in _flat((made,))):
                return made
        if name == "clone":
            made = torch.empty_like(target, **_layout(kwargs))
            self._mark(self._without, made)
            return made
        if name in _CONVERSIONS:
            return self._converted(func, target, args[1:], kwargs)
        raise ValuesNeeded(name)

    def _converted(
        self,
        func: Callable[..., Any],
        target: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if kwargs.get("copy") or any(isinstance(value, torch.Tensor) for value in args):
            raise ValuesNeeded("to")
        probe = torch.empty(0, dtype=target.dtype, device=target.device)
        like = func(probe, *args, **kwargs)
        if not isinstance(like, torch.Tensor):
            return like
        if (like.dtype, like.device) == (target.dtype, target.device):
            return target
        made = torch.empty_like(target, dtype=like.dtype, device=like.device)
        self._mark(self._without, made)
        return made

    def _fill_otherwise(
        self,
        target: torch.Tensor,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """A fill that must take place, at another point of the sequence of random numbers than usual."""
        if self._random_state is None:
            return func(*args, **kwargs)
        if not self._random_state_is_known():
            raise ValuesNeeded("random numbers")
        filled = func(*args, **kwargs)
        self._random_state = torch.get_rng_state()
        self._mark(self._otherwise, target)
        return filled

    def _skip(self) -> None:
        self.skipped += 1
        if self._random_state is None:
            self._random_state = torch.get_rng_state()

    def _random_state_is_known(self) -> bool:
        """Whether nothing has drawn random numbers since the first fill that was left out."""
        known = self._random_state
        return known is None or torch.equal(known, torch.get_rng_state())

    def _mark(self, kind: _Marks, tensor: torch.Tensor) -> None:
        if address := _address(tensor):
            kind[address] = watch_storage(tensor)

    def _lacks_values(self, value: object, caller: FrameType) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        address = _address(value)
        found = self._without.get(address)
        if found is None and caller.f_globals is not vars(nn.init):
            found = self._otherwise.get(address)
        return found is not None and not found()


def _address(tensor: torch.Tensor) -> int:
    """Of the tensor's storage; 0 where there is none to speak of, as for sparse and fake tensors."""
    if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
        return 0
    return int(tensor.untyped_storage().data_ptr())


def _alive(marks: _Marks) -> Iterator[int]:
    return (address for address, is_freed in marks.items() if not is_freed())


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether the tensor is all of its storage, each element once."""
    size = tensor.untyped_storage().nbytes()
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == size


def _flat(values: Iterable[object]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _layout(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k == "memory_format"}


def _reads_in_between(caller: FrameType) -> bool:
    """Whether one of the functions of nn.init asks, that look at the numbers that they have drawn."""
    names = ("trunc", "orthogonal", "sparse", "dirac", "eye")
    return caller.f_globals is vars(nn.init) and any(n in caller.f_code.co_name for n in names)


def _is_import(frame: FrameType | None) -> bool:
    """Whether a module is being imported, which happens once: what it makes must have its values."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
