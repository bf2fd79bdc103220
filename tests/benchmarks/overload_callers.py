"""Callers that do not wait: `python overload_callers.py ADDRESS PER_SECOND SECONDS`; prints JSON.

They begin when they read a line. Requests are begun at their times, whatever has become of earlier ones.
Gives, for each status, how many ended so while requests were sent, and for those that were answered the
milliseconds that they took from their time on.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from time import monotonic, sleep

import grpc
import torch

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2

DEADLINE_S = 10.0
RPC = "/splitlearn.comm.ComputeService/Compute"


def main() -> None:
    address = sys.argv[1]
    rate, seconds = (float(text) for text in sys.argv[2:4])
    data, shape = TensorCodec().encode(torch.randn(1, 10, 768))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp").SerializeToString()
    statuses: Counter[str] = Counter()
    took_ms: list[float] = []
    left, over = 0, threading.Event()
    lock = threading.Lock()
    channels = [
        grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) for _ in range(4)
    ]
    asks = [channel.unary_unary(RPC) for channel in channels]

    def ended(call: grpc.Future, due: float) -> None:
        nonlocal left
        now = monotonic()
        status = call.code()  # type: ignore[attr-defined]
        with lock:
            left -= 1
            if now <= until:
                statuses[status.name] += 1
                if status is grpc.StatusCode.OK:
                    took_ms.append((now - due) * 1000)
            if not left:
                over.set()

    print("ready", flush=True)
    sys.stdin.readline()
    count = left = int(rate * seconds)
    began = monotonic()
    until = began + seconds
    for number in range(count):
        due = began + number / rate
        if (wait_s := due - monotonic()) > 0:
            sleep(wait_s)
        call = asks[number % len(asks)].future(request, timeout=DEADLINE_S)
        call.add_done_callback(lambda call, due=due: ended(call, due))
    late_s = monotonic() - until
    over.wait(60)
    json.dump({"late_s": late_s, "statuses": statuses, "took_ms": took_ms}, sys.stdout)


if __name__ == "__main__":
    main()
