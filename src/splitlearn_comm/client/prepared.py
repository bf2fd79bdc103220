"""A tensor's request between the call that asked for it and its answer.

The tensor is encoded once: by the time it is asked for again the caller may have written into it.
"""

from __future__ import annotations

from concurrent.futures import Future

import torch

from splitlearn_comm.client.carriage import Load
from splitlearn_comm.protocol import compute_pb2


class Prepared:
    """One request, which may be asked again until it is given up.

    Attributes:
        load: its tensor.
        message: all of it but the tensor's bytes.
        started_s, until_s: its time limit, on the client's clock.
        asked: the last time over the stream, if there was one.
    """

    def __init__(self, load: Load, model_id: str, started_s: float, timeout_s: float) -> None:
        self.load = load
        self.message = compute_pb2.ComputeRequest(
            shape=load.shape, model_id=model_id, metadata=load.metadata
        )
        self.started_s = started_s
        self.until_s = started_s + timeout_s
        self.asked: Future[torch.Tensor] | None = None

    def whole(self) -> compute_pb2.ComputeRequest:
        """The message with the tensor's bytes."""
        message = compute_pb2.ComputeRequest(data=bytes(self.load.data))
        message.MergeFrom(self.message)
        return message

    def renew(self) -> None:
        """It failed, and is to be asked again."""
        self.load.renew()
        self.message.metadata.update(self.load.metadata)

    def give_up(self) -> None:
        """It is not asked any more; if it waits for an answer, it is withdrawn."""
        if self.asked is None:
            self.load.give_up()
            return
        self.asked.cancel()
        # At once, unless a thread is just about to take the answer.
        self.asked.add_done_callback(lambda _: self.load.give_up())
