"""Callers in a closed loop: `python load_client.py KIND ADDRESS PATH MODEL CLIENTS SECONDS`; prints JSON.

grpc           unary calls of wire 1.0
stream         one ComputeStream for each caller
http           one connection kept open for each caller, with as little of HTTP as the servers need
v2-http        the same, with requests of the open inference protocol
v2-grpc        unary calls of the open inference protocol, with a tensor of FP32
v2-grpc-bytes  the same, with a tensor of one element of BYTES

Requests are encoded beforehand, and answers are read but not decoded. Each caller has a thread and a
connection.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import h2
import models
import torch
import v2
import wire

SERVICE = "/splitlearn.comm.ComputeService"
METHODS = {"grpc": f"{SERVICE}/Compute", "v2-grpc": v2.METHOD, "v2-grpc-bytes": v2.METHOD}
DEADLINE_S = 30


def encoded(kind: str, path: str, name: str, tensor: torch.Tensor) -> bytes:
    """A request as it travels."""
    if kind == "http":
        body = wire.packed(tensor)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body
    if kind == "v2-http":
        return v2.http_request(path, tensor)
    if kind == "v2-grpc":
        return v2.grpc_request(name, tensor)
    if kind == "v2-grpc-bytes":
        return v2.grpc_request_in_bytes(name, tensor)
    from splitlearn_comm.core import TensorCodec
    from splitlearn_comm.protocol import compute_pb2

    data, shape = TensorCodec().encode(tensor)
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id=name)
    if kind == "grpc":
        return request.SerializeToString()
    return compute_pb2.StreamedRequest(id=1, request=request).SerializeToString()


def over_http(address: str, requests: Iterator[bytes], took: list[float], until: float) -> None:
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (began := perf_counter()) < until:
            connection.sendall(next(requests))
            read_answer(connection)
            took.append(perf_counter() - began)


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one answer; anything but 200 ends the measurement."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(1 << 16)
        assert part, "the server has closed the connection"
        received += part
    head, body = received.split(b"\r\n\r\n", 1)
    assert head.split(b" ", 2)[1] == b"200", received[:300]
    (size,) = (
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    parts, have = [body], len(body)
    while have < size:
        parts.append(connection.recv(1 << 18))
        assert parts[-1], "the answer is cut short"
        have += len(parts[-1])
    return head, b"".join(parts)


def over_calls(
    address: str, requests: Iterator[bytes], took: list[float], until: float, method: str
) -> None:
    with h2.Connection(address, DEADLINE_S) as connection:
        while (began := perf_counter()) < until:
            connection.call(method, next(requests))
            took.append(perf_counter() - began)


def over_stream(address: str, requests: Iterator[bytes], took: list[float], until: float) -> None:
    with h2.Connection(address, DEADLINE_S) as connection:
        connection.begin(f"{SERVICE}/ComputeStream")
        while (began := perf_counter()) < until:
            connection.send(next(requests), last=False)
            connection.receive()
            took.append(perf_counter() - began)


def main(kind: str, address: str, path: str, name: str, clients: int, seconds: float) -> None:
    frames = [encoded(kind, path, name, tensor) for tensor in models.inputs(name)]
    until = perf_counter() + seconds
    all_took: list[list[float]] = [[] for _ in range(clients)]

    def caller(number: int) -> None:
        requests = itertools.islice(itertools.cycle(frames), number, None)
        took = all_took[number]
        if kind in METHODS:
            over_calls(address, requests, took, until, METHODS[kind])
        elif kind == "stream":
            over_stream(address, requests, took, until)
        else:
            over_http(address, requests, took, until)

    with ThreadPoolExecutor(clients) as threads:
        try:
            list(threads.map(caller, range(clients)))
        except h2.Refused as refused:
            sys.exit(str(refused))
    took = sorted(itertools.chain.from_iterable(all_took))
    assert took, "nothing was answered"
    found = {
        "answered": len(took),
        "p50_ms": took[len(took) // 2] * 1000,
        "p99_ms": took[min(len(took) - 1, int(len(took) * 0.99))] * 1000,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]), float(sys.argv[6]))
