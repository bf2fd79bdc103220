"""A model behind MLServer: `python mlserver_server.py PORT`, the model in $PEER_MODEL.

Called by gRPC, as MLServer's HTTP carries numbers as JSON only. The model runs in the server's own process,
in which it answered more on two processors than in a worker process beside it. Adaptive batching of up to
32 requests, waiting 1 ms, the least that its event loop's timers know: with less, no batches form.

It takes two kinds of tensors. FP32 go through its numpy codec: MLServer makes a Python list of the numbers,
and joins requests whose tensors are of one shape, or fails all of them. BYTES stay as they are, so that the
model reads each itself, as it does behind the other servers.
"""

from __future__ import annotations

import asyncio
import os
import sys

import models
import torch
import uvloop
import wire
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput

NAME = os.environ["PEER_MODEL"]


class Model(MLModel):
    async def load(self) -> bool:
        torch.set_num_threads(1)
        self.module = getattr(models, NAME)()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (tensor,) = payload.inputs
        answer = self._of_bytes(tensor) if tensor.datatype == "BYTES" else self._of_numbers(tensor)
        return InferenceResponse(model_name=self.name, outputs=[answer])

    def _of_numbers(self, tensor: RequestInput) -> ResponseOutput:
        batch = torch.from_numpy(NumpyCodec.decode_input(tensor))
        with torch.inference_mode():
            answers = self.module(models.converted(NAME, batch))
        return NumpyCodec.encode_output("output", answers.numpy())

    def _of_bytes(self, tensor: RequestInput) -> ResponseOutput:
        batch = [wire.unpacked(data) for data in tensor.data]
        answers = [wire.packed(answer) for answer in models.joined(NAME, self.module, batch)]
        return ResponseOutput(name="output", datatype="BYTES", shape=[len(answers)], data=answers)


async def serve(port: int) -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=0,
        grpc_port=port,
        parallel_workers=0,
        metrics_endpoint=None,
        debug=False,
    )
    # MLServer imports the class itself, by its name.
    model = ModelSettings(
        name=NAME, implementation="mlserver_server.Model", max_batch_size=32, max_batch_time=0.001
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(serve(int(sys.argv[1])))
