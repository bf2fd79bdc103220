"""Callers of one model in a closed loop: `python update_callers.py ADDRESS CLIENTS SECONDS`; prints JSON.

One list for each caller, of `[when it was answered, milliseconds, value, version]`, and the failures. Each
caller has a thread and a connection. Times are of the machine's monotonic clock.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from time import monotonic

import grpc
import numpy as np
import torch

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2

RPC = "/splitlearn.comm.ComputeService/Compute"
SHAPE = (1, 10, 768)


def call(address: str, until: float, answers: list[list[float]], failures: list[str]) -> None:
    data, shape = TensorCodec().encode(torch.ones(SHAPE))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="m").SerializeToString()
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary(RPC)
        while (began := monotonic()) < until:
            try:
                answer, done = ask.with_call(request, timeout=30)
            except grpc.RpcError as error:
                failures.append(str(error))
                return
            ended = monotonic()
            found = np.frombuffer(compute_pb2.ComputeResponse.FromString(answer).data, np.float32)
            if found.min() != found.max():
                failures.append(f"mixed: {found.min()} and {found.max()}")
            version = int(dict(done.trailing_metadata())["splitlearn-version"])
            answers.append([ended, (ended - began) * 1000, float(found[0]), version])


def main() -> None:
    address, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    # What is kept here grows all the time, and a search of it for garbage would count as the node's latency.
    gc.disable()
    until = monotonic() + seconds
    answers: list[list[list[float]]] = [[] for _ in range(clients)]
    failures: list[str] = []
    threads = [
        threading.Thread(target=call, args=(address, until, mine, failures)) for mine in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"answers": answers, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
