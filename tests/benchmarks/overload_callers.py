"""Callers that do not wait: `python overload_callers.py ADDRESS PER_SECOND SECONDS DEADLINE_S`; prints JSON.

Requests are begun at their times, whatever has become of earlier ones. Gives, for each status, how many ended
so, and for those that were answered the milliseconds that they took from their time on.
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

RPC = "/splitlearn.comm.ComputeService/Compute"


def main() -> None:
    address = sys.argv[1]
    rate, seconds, deadline_s = (float(text) for text in sys.argv[2:5])
    data, shape = TensorCodec().encode(torch.randn(1, 10, 768))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp").SerializeToString()
    statuses: Counter[str] = Counter()
    took_ms: list[float] = []
    ended = threading.Condition()
    channels = [
        grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) for _ in range(4)
    ]
    asks = [channel.unary_unary(RPC) for channel in channels]

    def over(call: grpc.Future, due: float) -> None:
        now = monotonic()
        with ended:
            statuses[call.code().name] += 1  # type: ignore[attr-defined]
            if call.code() is grpc.StatusCode.OK:  # type: ignore[attr-defined]
                took_ms.append((now - due) * 1000)
            ended.notify_all()

    began, count = monotonic(), int(rate * seconds)
    for number in range(count):
        due = began + number / rate
        if (wait_s := due - monotonic()) > 0:
            sleep(wait_s)
        call = asks[number % len(asks)].future(request, timeout=deadline_s)
        call.add_done_callback(lambda call, due=due: over(call, due))
    sent_s = monotonic() - began
    with ended:
        ended.wait_for(lambda: sum(statuses.values()) == count, 60)
    json.dump({"sent_s": sent_s, "statuses": statuses, "took_ms": took_ms}, sys.stdout)


if __name__ == "__main__":
    main()
