"""How the work of one call reaches a device, and its answer the processor.

On the processor a lane does nothing. On a GPU, a forward that takes long has a stream of its own, so that
its copies and its computing run beside those of other calls; large tensors are copied through pinned
memory, which the GPU reads and writes by itself. What is short runs in the stream that all of the process
share: there is little to gain for it, and streams cost. The thread waits before the call returns: nothing
that a call has begun on the device outlives it, so that memory may be reused and weights be replaced
without asking the device.

A stream belongs to a thread, not to a model: torch keeps for each pair of a thread and a stream what cuBLAS
works with (33 MB were seen on an H100), which would be threads times models.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

_LEAST_PINNED_BYTES = 2**20
"""Of one tensor: the driver copies what is smaller sooner than a piece of pinned memory is found for it."""
_MOST_PINNED_BYTES = 16 * 2**20
"""Of one tensor: pinned memory is kept for later, and what is larger gains little by it."""

_mine = threading.local()
_left: dict[torch.device, list[_Stream]] = defaultdict(list)


class Lane:
    """On the processor, and wherever nothing is known about streams.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def send(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the device."""
        if tensor.dtype is dtype and tensor.device == self._device:
            return tensor
        return tensor.to(self._device, dtype)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the model answered, where the caller wants it; to be read after `wait`."""
        return tensor

    def wait(self) -> None:
        """Until all is done that the device was given."""


class SharedLane(Lane):
    """On a GPU, in the stream that the thread works in anyway."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pending = True

    def send(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the device. It is converted there: a copy that converts is not asynchronous."""
        return tensor.to(self._device, non_blocking=True).to(dtype)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the processor's memory."""
        if tensor.is_cpu:
            return tensor
        host = tensor.detach().to("cpu")
        # Such a copy waits for all before it.
        self._pending = False
        return host

    def wait(self) -> None:
        """Until all is done that this call has begun."""
        if self._pending:
            self._pending = False
            torch.cuda.current_stream(self._device).synchronize()


class OwnLane(SharedLane):
    """On a GPU, in a stream of the thread's own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._mine = _of_this_thread(device)
        self._within: Any = torch.cuda.stream(self._mine.stream)

    def __enter__(self) -> Lane:
        self._within.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._within.__exit__(*error)

    def send(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the device."""
        if worth_pinning(tensor.nbytes) and tensor.is_cpu and not tensor.is_pinned():
            tensor = empty(tensor.shape, tensor.dtype, pinned=True).copy_(tensor.detach())
        return super().send(tensor, dtype)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the processor's memory; to be read after `wait`."""
        dense = tensor.layout is torch.strided
        if tensor.is_cpu or not dense or not worth_pinning(tensor.nbytes):
            return super().fetch(tensor)
        self._pending = True
        host = empty(tensor.shape, tensor.dtype, pinned=True)
        return host.copy_(tensor.detach().resolve_conj().resolve_neg(), non_blocking=True)

    def wait(self) -> None:
        """Until the stream is at its end. Meanwhile the processor does something else."""
        if self._pending:
            self._pending = False
            self._mine.ended.record(self._mine.stream)
            self._mine.ended.synchronize()


def lane_to(device: torch.device, given: torch.Tensor, *, long: bool = False) -> Lane:
    """The lane of a call.

    Args:
        device: where the model is.
        given: the call's input; what is on the GPU already is worked on in the stream that its caller uses,
            and answered there.
        long: whether the call is expected to take long.
    """
    if device.type != "cuda" or not given.is_cpu:
        return _plain(device)
    return OwnLane(device) if long else SharedLane(device)


# It has no state of a call.
_plain = lru_cache(maxsize=64)(Lane)


def finish(device: torch.device) -> None:
    """Wait for what the calling thread has given a device outside any lane."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def worth_pinning(size: int) -> bool:
    """Whether a tensor of so many bytes is copied through pinned memory."""
    return _LEAST_PINNED_BYTES <= size <= _MOST_PINNED_BYTES


def empty(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Memory of the processor, pinned if that is asked for and there is any."""
    if pinned:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError:
            # The system gives out only so much of it. Then copies take longer, and nothing else changes.
            pass
    return torch.empty(tuple(shape), dtype=dtype)


class _Stream:
    """A stream, and an event for whoever lets the processor do something else while it waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.ended = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


class _Owned:
    """The stream of a thread, and of another one once that has ended."""

    def __init__(self, device: torch.device) -> None:
        left = _left[device]
        try:
            self.stream = left.pop()
        except IndexError:
            self.stream = _Stream(device)
        self._left = left

    def __del__(self) -> None:
        self._left.append(self.stream)


def _of_this_thread(device: torch.device) -> _Stream:
    owned: dict[torch.device, _Owned] | None = getattr(_mine, "owned", None)
    if owned is None:
        owned = _mine.owned = {}
    mine = owned.get(device)
    if mine is None:
        mine = owned[device] = _Owned(device)
    return mine.stream
