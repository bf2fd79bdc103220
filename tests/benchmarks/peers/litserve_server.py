"""A model behind LitServe: `python litserve_server.py PORT`, the model in $PEER_MODEL.

One worker process with batching of up to 32 requests and the least wait that it takes, one server process.
LitServe reads the annotations of `decode_request` and `encode_response`, so they must not be texts.
"""

import os
import sys
from typing import Annotated

import litserve
import models
import torch
import wire
from fastapi import Body, Response

NAME = os.environ["PEER_MODEL"]
RAW = "application/octet-stream"


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.model = getattr(models, NAME)()

    def decode_request(self, request: Annotated[bytes, Body(media_type=RAW)]) -> torch.Tensor:
        return wire.unpacked(request)

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return inputs

    def predict(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        return models.joined(NAME, self.model, batch)

    def unbatch(self, output: list[torch.Tensor]) -> list[torch.Tensor]:
        return output

    def encode_response(self, output: torch.Tensor) -> Response:
        return Response(content=wire.packed(output), media_type=RAW)


if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.001)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=1, timeout=30, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
    )
