"""What a request costs the server's processors, beside what it cannot cost less than.

The lower limit is one forward in the best batch, and the transport with nothing behind it: an echo server
of two threads. The node, the echo server, the forward and the client each have a process of their own or a
turn of their own; rounds alternate. Prints, asserts nothing but that all requests were answered.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from timeit import timeit

import psutil
import torch
from torch import nn

from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.server.managed_server import ManagedServer
from support.node import Node
from support.waiting import eventually

DESIRED = Path(__file__).parents[2] / "desired"
PEERS = Path(__file__).with_name("request_cost_peers.py")
CLIENTS = (1, 8, 32)
BATCHES = (1, 8, 32)
ROUNDS = 8
SECONDS = 2.0
FORWARDS = 200


@contextmanager
def echo_server() -> Iterator[tuple[int, str]]:
    """Its process id and address."""
    with subprocess.Popen(
        [sys.executable, str(PEERS), "echo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.pid, f"127.0.0.1:{int(process.stdout.readline())}"
        process.communicate()


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def load(address: str, clients: int, seconds: float, role: str = "client") -> int:
    """Requests that were answered."""
    return int(called(address, clients, seconds, role=role)[0])


def called(
    address: str, clients: int, seconds: float, *shape: int, role: str = "client"
) -> list[float]:
    """What `request_cost_peers` prints of its calls."""
    command = [sys.executable, str(PEERS), role, address, str(clients), str(seconds)]
    if shape:
        command.append(",".join(str(size) for size in shape))
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [float(text) for text in done.stdout.split()]


def cost_ms(pid: int, address: str, clients: int, role: str = "client") -> tuple[float, float]:
    """Milliseconds of the server's processors a request, and requests a second."""
    before = cpu_s(pid)
    answered = load(address, clients, SECONDS, role)
    assert answered
    return (cpu_s(pid) - before) * 1000 / answered, answered / SECONDS


def median(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Of each column."""
    cost, rate = zip(*runs, strict=True)
    return statistics.median(cost), statistics.median(rate)


def forward_ms(model: nn.Module, batch: int) -> float:
    """Milliseconds of one thread for one row of a batch."""
    x = torch.randn(batch, 10, 768)
    with torch.inference_mode():
        model(x)
        began = process_time()
        for _ in range(FORWARDS // batch + 1):
            model(x)
        return (process_time() - began) * 1000 / (FORWARDS // batch + 1) / batch


def woken_forward_ms(model: nn.Module) -> float:
    """Milliseconds of processor time for a forward that another process gives the sign for, each time.

    Between two of them this processor sleeps, as a server's does that has one client: what it costs to wake
    up, and what the caches have lost meanwhile, is in it.
    """
    x = torch.randn(1, 10, 768)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(PEERS), "wake"], stdin=pipe, stdout=pipe) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        to, back = other.stdin.fileno(), other.stdout.fileno()
        os.write(to, b"x")
        with torch.inference_mode():
            began = 0.0
            for _ in range(FORWARDS + 1):
                os.read(back, 1)
                model(x)
                os.write(to, b"x")
                began = began or process_time()
        took_s = process_time() - began
        other.communicate()
    return took_s * 1000 / FORWARDS


def test_request_cost(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    for name in ("mlp.yaml", "quickstart.py"):
        shutil.copy(DESIRED / name, directory)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768)).eval()
    node_ms: dict[int, list[tuple[float, float]]] = {n: [] for n in CLIENTS}
    stream_ms: dict[int, list[tuple[float, float]]] = {n: [] for n in CLIENTS}
    echo_ms: dict[int, list[tuple[float, float]]] = {n: [] for n in CLIENTS}
    alone: dict[int, list[float]] = {b: [] for b in BATCHES}
    woken: list[float] = []
    one_thread = {"OMP_NUM_THREADS": "1"}
    with Node(directory, environment=one_thread) as node, echo_server() as (echo_pid, echo_at):
        node.wait_phase("mlp", "Ready")
        for address in (node.address, echo_at):
            load(address, 1, 1.0)
        for _ in range(ROUNDS):
            for batch in BATCHES:
                alone[batch].append(forward_ms(model, batch))
            woken.append(woken_forward_ms(model))
            for clients in CLIENTS:
                node_ms[clients].append(cost_ms(node.process.pid, node.address, clients))
                stream_ms[clients].append(
                    cost_ms(node.process.pid, node.address, clients, "stream")
                )
                echo_ms[clients].append(cost_ms(echo_pid, echo_at, clients))
    forward = {batch: statistics.median(values) for batch, values in alone.items()}
    print("\nforward alone, ms a row: " + ", ".join(f"{b}: {ms:.3f}" for b, ms in forward.items()))
    print(f"a forward that another process gives the sign for: {statistics.median(woken):.3f}")
    print("clients  node ms (requests/s)  echo ms (requests/s)  node / (forward + echo)  spread")
    for clients in CLIENTS:
        limit_ms = forward[1] if clients == 1 else min(forward.values())
        forwards = alone[1] if clients == 1 else [limit_ms] * ROUNDS
        ratios = [
            mine[0] / (forward_alone + theirs[0])
            for mine, theirs, forward_alone in zip(
                node_ms[clients], echo_ms[clients], forwards, strict=True
            )
        ]
        mine, theirs = median(node_ms[clients]), median(echo_ms[clients])
        print(
            f"{clients:7}  {mine[0]:7.3f} ({mine[1]:6.0f})      {theirs[0]:7.3f} ({theirs[1]:6.0f})"
            f"      {statistics.median(ratios):.2f}                     {min(ratios):.2f}..{max(ratios):.2f}"
        )
    print("clients  streams ms (requests/s)  requests/s of streams / of calls")
    for clients in CLIENTS:
        streamed, called = median(stream_ms[clients]), median(node_ms[clients])
        print(
            f"{clients:7}  {streamed[0]:7.3f} ({streamed[1]:6.0f})         {streamed[1] / called[1]:.2f}"
        )


def test_bookkeeping(tmp_path: Path) -> None:
    """What routing, the lease and the metrics of a request take, in this process."""
    directory = tmp_path / "desired"
    directory.mkdir()
    for name in ("mlp.yaml", "quickstart.py"):
        shutil.copy(DESIRED / name, directory)
    settings = ServerConfig(port=0, metrics_port=0, state_dir=tmp_path / "state")
    with ManagedServer(settings, directory=directory) as server:
        eventually(lambda: len(server.model_manager.table.all) == 1, "it serves", 60)

        def lease() -> None:
            chosen = server.router.route("mlp", server.model_manager.table)
            found = server.model_manager.try_lease(chosen)
            assert found is not None
            found.release()

        def count() -> None:
            server._feed.after_request("mlp", "OK", 0.001)

        for name, what in (("route and lease", lease), ("metrics", count)):
            took_us = [timeit(what, number=20_000) / 20_000 * 1e6 for _ in range(5)]
            print(
                f"\n{name}: {statistics.median(took_us):.2f} us ({min(took_us):.2f}..{max(took_us):.2f})"
            )
