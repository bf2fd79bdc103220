"""A call of a worker: tensors through memory that both have, and a message each way."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from splitlearn_comm.core.packed import Packed
from splitlearn_manager.runtime.channel import Channel, Message
from splitlearn_manager.runtime.forward_message import read, written
from splitlearn_manager.runtime.shared_area import Area, bytes_for, can_shrink

_LARGE = 8 * 2**20


class Connection:
    """A way to one thread of a worker, for one call at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._area: Area | None = None
        self._come: tuple[Message | bytes, list[int]] | None = None

    def call(
        self,
        message: Message,
        tensors: Sequence[torch.Tensor] = (),
        *,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a call; `answer` gives what comes of it. Raises Closed."""
        area, brought = self._area_for(bytes_for(tensors)) if tensors else (self._area, ())
        places = area.write(tensors) if area is not None else []
        message = {**message, "tensors": places, "area": bool(brought)}
        self._send(message, brought, descriptors)

    def answer(
        self, timeout_s: float | None = None
    ) -> tuple[Message, list[torch.Tensor], list[int]]:
        """The answer to the last call: its tensors have memory of their own.

        Raises Closed; TimeoutError, after which it can be asked for again; ValueError for what is no answer.
        """
        return self._read(*self._channel.receive(timeout_s))

    def forward(
        self,
        pieces: Sequence[bytes | memoryview],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        *,
        turn: bool,
    ) -> None:
        """Send a forward of one tensor, given as bytes; `forward_answer` gives what comes of it.

        Args:
            pieces: the tensor's bytes, at least one; `can_be_told` has said yes to its dtype and shape.
            turn: one such forward at a time.

        Raises:
            Closed
        """
        area, brought = self._area_for(sum(len(piece) for piece in pieces))
        area.fill(pieces)
        self._send(written(dtype, shape, brings_area=bool(brought), turn=turn), brought)

    def forward_answer(
        self, timeout_s: float | None = None
    ) -> tuple[Message, Sequence[torch.Tensor | Packed]]:
        """The answer to a forward: one tensor's bytes, or what `answer` gives. Raises as that does."""
        come, self._come = self._come, None
        message, descriptors = come or self._channel.receive_any(timeout_s)
        if not isinstance(message, bytes):
            return self._read(message, descriptors)[:2]
        told = read(message)
        area = self._take_over(descriptors) if told.brings_area else self._area
        if area is None:
            raise ValueError("a message without the area that it speaks of")
        return {}, [Packed(area.read(told.dtype, told.shape), told.shape, told.dtype)]

    def has_plain_answer(self) -> bool:
        """Whether a forward's answer has come that is no error, nor so large that it takes long to copy.

        Waits for nothing. Raises as `forward_answer`.
        """
        if self._come is None:
            try:
                self._come = self._channel.receive_any(0)
            except TimeoutError:
                return False
        message, _ = self._come
        if isinstance(message, bytes):
            told = read(message)
            return math.prod(told.shape) * told.dtype.itemsize <= _LARGE
        return "error" not in message

    def fileno(self) -> int:
        """Readable when something has come of the last call."""
        return self._channel.fileno()

    def _area_for(self, size: int) -> tuple[Area, tuple[int, ...]]:
        """One that holds so many bytes, and its descriptor if it is a new one."""
        if self._area is not None and size <= self._area.size:
            return self._area, ()
        self._area = Area.of_size(size)
        return self._area, (self._area.descriptor,)

    def _send(
        self, message: Message | bytes, brought: tuple[int, ...], descriptors: Sequence[int] = ()
    ) -> None:
        try:
            self._channel.send(message, (*brought, *descriptors))
        finally:
            if brought and self._area is not None:
                self._area.close()

    def _read(
        self, message: Message, descriptors: list[int]
    ) -> tuple[Message, list[torch.Tensor], list[int]]:
        area = self._take_over(descriptors) if message.get("area") else self._area
        places = message.get("tensors", ())
        tensors = [area.tensor(place).clone() for place in places] if area is not None else []
        return message, tensors, descriptors

    def _take_over(self, descriptors: list[int]) -> Area:
        if not descriptors:
            raise ValueError("a message without the area that it speaks of")
        if can_shrink(descriptors[0]):
            os.close(descriptors.pop(0))
            raise ValueError("an area that could be taken away while it is read")
        self._area = Area(descriptors.pop(0))
        self._area.close()
        return self._area

    def hang_up(self) -> None:
        """Let a call that is under way end: nothing answers it any more, whoever else has the other end."""
        self._channel.hang_up()

    def close(self) -> None:
        """Nothing is called any more."""
        self._channel.close()
