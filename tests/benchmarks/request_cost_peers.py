"""The processes beside the node in the measurement of request cost; run as `python FILE ROLE …`.

echo                                    a gRPC server of two threads that sends back what it gets; prints its
                                        port
client ADDRESS CLIENTS SECONDS [SHAPE]  callers in a closed loop, one request encoded beforehand; prints how
                                        many answers there were, and the median and 99th percentile in ms
stream ADDRESS CLIENTS SECONDS          the same over one ComputeStream for each caller; prints the answers
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import grpc
import numpy as np
import torch

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2

ECHO_THREADS = 2
SHAPE = (1, 10, 768)
LARGE = [(f"grpc.max_{way}_message_length", 2**27) for way in ("send", "receive")]
METHOD = "/splitlearn.comm.ComputeService/Compute"
STREAM = "/splitlearn.comm.ComputeService/ComputeStream"


def echo() -> None:
    """Serves until its standard input closes."""
    server = grpc.server(ThreadPoolExecutor(ECHO_THREADS), options=LARGE)
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    service = grpc.method_handlers_generic_handler(
        "splitlearn.comm.ComputeService", {"Compute": handler}
    )
    server.add_generic_rpc_handlers((service,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


def client(address: str, clients: int, seconds: float, shape: tuple[int, ...] = SHAPE) -> None:
    """Calls from `clients` threads, each with a connection of its own; any failure ends it."""
    data, _ = TensorCodec().encode(torch.randn(shape))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp").SerializeToString()
    until = perf_counter() + seconds

    def loop(number: int) -> list[float]:
        took_ms: list[float] = []
        # Equal channels share one connection; an argument of its own keeps each apart.
        options = [*LARGE, ("grpc.use_local_subchannel_pool", 1), ("bench.client", number)]
        with grpc.insecure_channel(address, options=options) as channel:
            call = channel.unary_unary(METHOD)
            while (began := perf_counter()) < until:
                call(request, timeout=30)
                took_ms.append((perf_counter() - began) * 1000)
        return took_ms

    with ThreadPoolExecutor(clients) as threads:
        found = [ms for each in threads.map(loop, range(clients)) for ms in each]
    p50, p99 = np.percentile(found, [50, 99]) if found else (0.0, 0.0)
    print(len(found), p50, p99, flush=True)


def stream(address: str, clients: int, seconds: float) -> None:
    """As `client`, each caller with a stream of its own; the next request follows the answer."""
    data, shape = TensorCodec().encode(torch.randn(SHAPE))
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp")
    frame = compute_pb2.StreamedRequest(id=1, request=request).SerializeToString()
    until = perf_counter() + seconds

    def loop(number: int) -> int:
        answered = 0
        may_send = threading.Semaphore(1)

        def requests() -> Iterator[bytes]:
            while perf_counter() < until:
                may_send.acquire()
                yield frame

        options = [("grpc.use_local_subchannel_pool", 1), ("bench.client", number)]
        with grpc.insecure_channel(address, options=options) as channel:
            for _ in channel.stream_stream(STREAM)(requests(), timeout=seconds + 30):
                answered += 1
                may_send.release()
        return answered

    with ThreadPoolExecutor(clients) as threads:
        print(sum(threads.map(loop, range(clients))), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo()
    elif sys.argv[1] == "stream":
        stream(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        sizes = tuple(int(size) for size in sys.argv[5].split(",")) if sys.argv[5:] else SHAPE
        client(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sizes)
