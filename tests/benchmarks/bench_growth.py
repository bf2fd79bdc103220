"""How the cost of a request grows: with models that are loaded beside it, with clients.

Two nodes, with one model and with 200, are asked by turns. Prints, asserts nothing but that all was answered.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from benchmarks.bench_request_cost import DESIRED, cost_ms, load
from support.node import Node
from support.served import constant, declare, write_factory

MANY = 200
ROUNDS = 5
CLIENTS = (1, 8, 32, 128, 256)


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
            for _ in range(ROUNDS):
                alone.append(cost_ms(one.process.pid, one.address, clients)[0])
                beside.append(cost_ms(many.process.pid, many.address, clients)[0])
            ratios = [b / a for a, b in zip(alone, beside, strict=True)]
            print(
                f"{clients:7} {statistics.median(alone):16.3f} {statistics.median(beside):10.3f}   "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )
        print("clients  ms a request   requests/s")
        for clients in CLIENTS:
            ms, rate = cost_ms(one.process.pid, one.address, clients)
            print(f"{clients:7} {ms:13.3f} {rate:12,.0f}")
