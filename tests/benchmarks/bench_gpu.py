"""Forwards on a GPU: copies through pinned memory beside computing, and what a node makes of the GPU.

The other system in each run is torch used plainly, as a server would that knows nothing of streams: the
input is moved to the GPU, the model called, the answer moved back. Rounds alternate. Prints, asserts nothing
but that all requests were answered.
"""

from __future__ import annotations

import shutil
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import nn

from benchmarks.bench_request_cost import DESIRED, load
from splitlearn_comm.core import ModelComputeFunction
from support.node import Node
from support.real_gpu import why_no_gpu

pytestmark = pytest.mark.skipif(why_no_gpu() is not None, reason=str(why_no_gpu()))

DEVICE = "cuda:0"
WIDTH = 1024
ROUNDS = 3
SECONDS = 0.3
THREADS = 4


def rate(call: Callable[[], object], threads: int) -> float:
    """Calls a second of so many threads in a closed loop."""
    until = perf_counter() + SECONDS
    counts = [0] * threads

    def loop(number: int) -> None:
        while perf_counter() < until:
            call()
            counts[number] += 1

    workers = [threading.Thread(target=loop, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / SECONDS


def test_calls() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(8)]
    module = nn.Sequential(*layers)
    functions = [
        ModelComputeFunction(module, DEVICE),
        ModelComputeFunction(nn.Sequential(*layers), DEVICE),
    ]

    def plainly(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            answer: torch.Tensor = module(x.to(DEVICE))
            return answer.cpu()

    print(f"\n{torch.cuda.get_device_name()}: calls a second, ours / torch used plainly")
    for rows in (8, 256, 4096):
        x = torch.randn(rows, WIDTH)
        turn = iter(range(10**9))
        calls = {
            "ours": lambda x=x: functions[0].compute(x),
            "ours, two models": lambda x=x, turn=turn: functions[next(turn) % 2].compute(x),
            "plainly": lambda x=x: plainly(x),
        }
        for threads in (1, THREADS):
            rates: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    rates[name].append(rate(call, threads))
            middle = {name: statistics.median(found) for name, found in rates.items()}
            print(
                f"{x.nbytes / 2**20:8.2f} MB, {threads} threads: "
                + ", ".join(f"{name} {middle[name]:,.0f}" for name in calls)
                + "; "
                + ", ".join(f"{middle[n] / middle['plainly']:.2f}" for n in list(calls)[:2])
            )


def test_node(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    nodes: dict[str, Node] = {}
    for device in ("cpu", DEVICE):
        directory = tmp_path / device.replace(":", "")
        directory.mkdir()
        shutil.copy(DESIRED / "quickstart.py", directory)
        text = (DESIRED / "mlp.yaml").read_text() + f'\ndevice: "{device}"\n'
        (directory / "mlp.yaml").write_text(text)
        nodes[device] = Node(directory)
    with nodes["cpu"], nodes[DEVICE]:
        for node in nodes.values():
            node.wait_phase("mlp", "Ready")
            load(node.address, 4, 1.0)
        print("\nclients  requests/s on the GPU, on the processor, ratio")
        for clients in (1, 8, 32):
            rates: dict[str, list[float]] = {name: [] for name in nodes}
            for _ in range(3):
                for name, node in nodes.items():
                    rates[name].append(load(node.address, clients, 2.0) / 2.0)
            gpu, cpu = (statistics.median(rates[name]) for name in (DEVICE, "cpu"))
            print(f"{clients:7}  {gpu:,.0f}  {cpu:,.0f}  {gpu / cpu:.2f}")
