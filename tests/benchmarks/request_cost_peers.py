"""The processes beside the node in the measurement of request cost; run as `python FILE ROLE …`.

echo                                    a gRPC server of two threads that sends back what it gets; prints its
                                        port
client ADDRESS CLIENTS SECONDS [SHAPE]  callers in closed loops, one request encoded beforehand; prints how
                                        many answers there were, and the median and 99th percentile in ms
stream ADDRESS CLIENTS SECONDS          the same over one ComputeStream for each caller; prints the answers
texts ADDRESS CLIENTS SECONDS MODEL     callers in closed loops that ask for token ids of 5 to 60 tokens;
                                        prints what `client` does
wake                                    sends back each byte that it gets

The callers are sockets that do no more than they must: gRPC's client for Python takes as long for a request
as a server does, on the same processors.
"""

from __future__ import annotations

import itertools
import os
import selectors
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import perf_counter

import grpc
import numpy as np
import torch
from peers.h2 import Connection

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch

ECHO_THREADS = 2
SHAPE = (1, 10, 768)
LARGE = [(f"grpc.max_{way}_message_length", 2**27) for way in ("send", "receive")]
SERVICE = "/splitlearn.comm.ComputeService"
TIMEOUT_S = 60
TEXTS = 1000


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
    """Unary calls; any failure ends it."""
    request = asked(shape).SerializeToString()
    took_ms = in_closed_loops(
        address,
        clients,
        seconds,
        lambda connection: connection.ask(f"{SERVICE}/Compute", request),
        lambda connection: connection.answer(),
    )
    p50, p99 = np.percentile(took_ms, [50, 99])
    print(len(took_ms), p50, p99, flush=True)


def texts(address: str, clients: int, seconds: float, model_id: str) -> None:
    """Unary calls with texts of many lengths; any failure ends it."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 61, (TEXTS,), generator=draw).tolist()
    requests = []
    for length in lengths:
        ids = torch.randint(1000, 20000, (1, length), generator=draw)
        data, shape = TensorCodec().encode(ids)
        request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id=model_id)
        requests.append(request.SerializeToString())
    following = itertools.cycle(requests)
    took_ms = in_closed_loops(
        address,
        clients,
        seconds,
        lambda connection: connection.ask(f"{SERVICE}/Compute", next(following)),
        lambda connection: connection.answer(),
    )
    p50, p99 = np.percentile(took_ms, [50, 99])
    print(len(took_ms), p50, p99, flush=True)


def stream(address: str, clients: int, seconds: float) -> None:
    """Messages of one ComputeStream for each caller; any failure ends it."""
    message = compute_pb2.StreamedRequest(id=1, request=asked(SHAPE)).SerializeToString()
    took_ms = in_closed_loops(
        address,
        clients,
        seconds,
        lambda connection: connection.send(message, last=False),
        lambda connection: connection.receive(),
        lambda connection: connection.begin(f"{SERVICE}/ComputeStream"),
    )
    print(len(took_ms), flush=True)


def in_closed_loops(
    address: str,
    clients: int,
    seconds: float,
    ask: Callable[[Connection], object],
    answer: Callable[[Connection], object],
    begin: Callable[[Connection], object] = lambda connection: None,
) -> list[float]:
    """Milliseconds that each answer took. All callers are one thread: so many would wait for each other."""
    # Else the system gives memory anew for each large answer, which takes longer than the answer.
    keep_for_the_next_batch()
    took_ms: list[float] = []
    began: dict[Connection, float] = {}
    with ExitStack() as opened, selectors.DefaultSelector() as selector:
        for _ in range(clients):
            connection = opened.enter_context(Connection(address, TIMEOUT_S))
            selector.register(connection, selectors.EVENT_READ)
            begin(connection)
            began[connection] = perf_counter()
            ask(connection)
        until = perf_counter() + seconds
        while began:
            for key, _ in selector.select():
                assert isinstance(key.fileobj, Connection)
                connection = key.fileobj
                if connection not in began:
                    continue
                answer(connection)
                now = perf_counter()
                took_ms.append((now - began.pop(connection)) * 1000)
                if now < until:
                    began[connection] = now
                    ask(connection)
    return took_ms


def wake() -> None:
    """Until its standard input closes."""
    while byte := os.read(sys.stdin.fileno(), 1):
        os.write(sys.stdout.fileno(), byte)


def asked(shape: tuple[int, ...]) -> compute_pb2.ComputeRequest:
    """A request with a random tensor."""
    data, _ = TensorCodec().encode(torch.randn(shape))
    return compute_pb2.ComputeRequest(data=data, shape=shape, model_id="mlp")


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo()
    elif sys.argv[1] == "wake":
        wake()
    elif sys.argv[1] == "texts":
        texts(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    elif sys.argv[1] == "stream":
        stream(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    else:
        sizes = tuple(int(size) for size in sys.argv[5].split(",")) if sys.argv[5:] else SHAPE
        client(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sizes)
