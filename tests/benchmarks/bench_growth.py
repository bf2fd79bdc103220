"""How the cost of a request grows: with models that are loaded beside it, with clients, with its size.

Two nodes, with one model and with 200, are asked by turns; so are a node whose model doubles its input and a
server of two threads that sends it back. Prints, asserts nothing but that all was answered.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from benchmarks.bench_request_cost import (
    DESIRED,
    SECONDS,
    called,
    cost_ms,
    cpu_s,
    echo_server,
    load,
)
from support.node import Node
from support.served import constant, declare, write_factory

MANY = 200
ROUNDS = 3
MODELS_ROUNDS = 8
"""What 200 models cost is a few hundredths of a request, less than the machine's own ups and downs."""
CLIENTS = (1, 8, 32, 128, 256)
SIZES_KB = (1, 16, 256, 1024, 4096, 16384, 65536)
SIZE_SECONDS = 2.0
DOUBLES = """
from torch import nn


class Doubles(nn.Module):
    def forward(self, x):
        return x + x
"""


def _node(directory: Path, models: int) -> Node:
    directory.mkdir()
    for name in ("mlp.yaml", "quickstart.py"):
        shutil.copy(DESIRED / name, directory)
    write_factory(directory)
    for number in range(models - 1):
        declare(directory, f"t{number}", config=constant(float(number)))
    return Node(directory, {"max_models": 2 * MANY}, environment={"OMP_NUM_THREADS": "1"})


def test_growth(tmp_path: Path) -> None:
    with _node(tmp_path / "one", 1) as one, _node(tmp_path / "many", MANY) as many:
        for node in (one, many):
            node.wait_phase("mlp", "Ready")
        many.wait_phase(f"t{MANY - 2}", "Ready", 120)
        for node in (one, many):
            load(node.address, 8, 1.0)
        print(f"\nclients  ms with 1 model   with {MANY}   ratio")
        for clients in (1, 32):
            alone: list[float] = []
            beside: list[float] = []
            for _ in range(MODELS_ROUNDS):
                alone.append(cost_ms(one.process.pid, one.address, clients)[0])
                beside.append(cost_ms(many.process.pid, many.address, clients)[0])
            ratios = [b / a for a, b in zip(alone, beside, strict=True)]
            print(
                f"{clients:7} {statistics.median(alone):16.3f} {statistics.median(beside):10.3f}   "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )
        print("clients  ms a request   requests/s   p50 ms   p99 ms")
        for clients in CLIENTS:
            before_s = cpu_s(one.process.pid)
            answered, p50, p99 = called(one.address, clients, SECONDS)
            ms = (cpu_s(one.process.pid) - before_s) * 1000 / answered
            print(f"{clients:7} {ms:13.3f} {answered / SECONDS:12,.0f} {p50:8.1f} {p99:8.1f}")


def test_sizes(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "doubles.py").write_text(DOUBLES)
    declare(directory, "mlp", model_path="doubles:Doubles", config={"input_shape": [1, 256]})
    with Node(directory, environment={"OMP_NUM_THREADS": "1"}) as node, echo_server() as (_, echo):
        node.wait_phase("mlp", "Ready")
        load(node.address, 1, 1.0)
        print("\nKB each way   node ms: p50, p99   echo ms: p50, p99   node / echo")
        for kb in SIZES_KB:
            mine: list[list[float]] = []
            theirs: list[list[float]] = []
            for _ in range(ROUNDS):
                mine.append(called(node.address, 1, SIZE_SECONDS, 1, kb * 256))
                theirs.append(called(echo, 1, SIZE_SECONDS, 1, kb * 256))
            ratios = [m[1] / t[1] for m, t in zip(mine, theirs, strict=True)]
            p50, p99, echo50, echo99 = (
                statistics.median(one[at] for one in found)
                for found in (mine, theirs)
                for at in (1, 2)
            )
            print(
                f"{kb:11,} {p50:10.2f} {p99:8.2f} {echo50:11.2f} {echo99:8.2f}   "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )
