"""A model behind mosec: `python mosec_server.py --address 127.0.0.1 --port N`, the model in $PEER_MODEL.

One worker process with dynamic batching of up to 32 requests, waiting 1 ms at most, which is its least.
"""

from __future__ import annotations

import os

import models
import torch
import wire
from mosec import Server, Worker

NAME = os.environ["PEER_MODEL"]


class Model(Worker):
    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.model = getattr(models, NAME)()

    def deserialize(self, data: bytes) -> torch.Tensor:
        return wire.unpacked(data)

    def serialize(self, data: torch.Tensor) -> bytes:
        return wire.packed(data)

    def forward(self, data: list[torch.Tensor]) -> list[torch.Tensor]:
        return models.joined(NAME, self.model, data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=32, max_wait_time=1, timeout=30)
    server.run()
