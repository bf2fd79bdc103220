"""More requests than the node can answer: it goes on answering as many, and refuses the rest at once.

The capacity is measured first, by callers that wait for each answer. Then requests come at their times, up to
four times as many. Prints, asserts nothing but that all requests ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil

from benchmarks.bench_request_cost import load
from support.node import Node
from support.served import declare

CALLERS = Path(__file__).with_name("overload_callers.py")
PROCESSES = 2
SECONDS = 8.0
MAX_QUEUE = 64
MB = 2**20
DEEP = """
from torch import nn


def deep():
    return nn.Sequential(*(nn.Linear(768, 768) for _ in range(12))).eval()
"""
"""A model whose forward takes so long that callers in Python can offer many times what it answers."""


def _offer(address: str, per_second: float) -> tuple[float, dict[str, int], list[float]]:
    """Requests a second that were offered, how they ended, and what the answered ones took."""
    command = [
        sys.executable,
        str(CALLERS),
        address,
        str(per_second / PROCESSES),
        str(SECONDS),
        "10",
    ]
    callers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    found = [json.loads(caller.communicate(timeout=180)[0]) for caller in callers]
    statuses: dict[str, int] = {}
    for one in found:
        for status, count in one["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    sent_s = max(one["sent_s"] for one in found)
    return sum(statuses.values()) / sent_s, statuses, [ms for one in found for ms in one["took_ms"]]


def test_overload(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "deep.py").write_text(DEEP)
    config = {"input_shape": [1, 10, 768]}
    declare(directory, "mlp", model_path="deep:deep", max_queue=MAX_QUEUE, config=config)
    with Node(directory, environment={"OMP_NUM_THREADS": "1"}) as node:
        node.wait_phase("mlp", "Ready")
        load(node.address, 32, 1.0)
        capacity = load(node.address, 32, 4.0) / 4.0
        process = psutil.Process(node.process.pid)
        print(f"\nof callers that wait: {capacity:,.0f} requests/s; max_queue {MAX_QUEUE}")
        print("offered/s   answered/s   refused   others   p50 ms   p99 ms   RSS MB")
        for times in (0.5, 1.0, 2.0, 4.0):
            offered, statuses, took = _offer(node.address, capacity * times)
            answered = statuses.get("OK", 0)
            refused = statuses.get("RESOURCE_EXHAUSTED", 0)
            others = sum(statuses.values()) - answered - refused
            p50, p99 = np.percentile(took, [50, 99]) if took else (0.0, 0.0)
            rss_mb = process.memory_info().rss / MB
            seconds = sum(statuses.values()) / offered
            print(
                f"{offered:9,.0f} {answered / seconds:12,.0f} {refused:9,} {others:8,} {p50:8.1f} {p99:8.1f} "
                f"{rss_mb:8.0f}"
            )
