"""Callers that do not wait: `python overload_callers.py ADDRESS PER_SECOND SECONDS`; prints JSON.

They begin when they read a line. Requests are begun at their times, whatever has become of earlier ones.
Gives, for each status, how many ended so while requests were sent, and for those that were answered the
milliseconds that they took from their time on. They are sockets that do no more than they must: what callers
take of the processors, the node lacks.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from time import monotonic, sleep

import grpc
import torch
from peers.pipelined import WITHOUT_STATUS, Pipelined

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2

CONNECTIONS = 4
RPC = "/splitlearn.comm.ComputeService/Compute"
NAMES = {code.value[0]: code.name for code in grpc.StatusCode} | {WITHOUT_STATUS: "RESET"}


def main() -> None:
    address = sys.argv[1]
    rate, seconds = (float(text) for text in sys.argv[2:4])
    data, shape = TensorCodec().encode(torch.randn(1, 10, 768))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp").SerializeToString()
    ends: list[list[tuple[int, int, float]]] = [[] for _ in range(CONNECTIONS)]
    left = int(rate * seconds)
    count, over, lock = left, threading.Event(), threading.Lock()

    def connection(place: int) -> Pipelined:
        def ended(number: int, status: int) -> None:
            nonlocal left
            ends[place].append((number * CONNECTIONS + place, status, monotonic()))
            with lock:
                left -= 1
                if not left:
                    over.set()

        return Pipelined(address, RPC, request, ended)

    connections = [connection(place) for place in range(CONNECTIONS)]
    print("ready", flush=True)
    sys.stdin.readline()
    began = monotonic()
    until = began + seconds
    for number in range(count):
        due = began + number / rate
        if (wait_s := due - monotonic()) > 0:
            sleep(wait_s)
        connections[number % CONNECTIONS].begin(number // CONNECTIONS)
    late_s = monotonic() - until
    over.wait(60)
    statuses: Counter[str] = Counter()
    took_ms: list[float] = []
    for number, status, at in (end for each in ends for end in each):
        if at <= until:
            statuses[NAMES[status]] += 1
            if status == 0:
                took_ms.append((at - began - number / rate) * 1000)
    json.dump({"late_s": late_s, "statuses": statuses, "took_ms": took_ms}, sys.stdout)


if __name__ == "__main__":
    main()
