"""More requests than the node can answer: it goes on answering as many, and refuses the rest at once.

The capacity is measured around it, by callers that wait for each answer. Then requests come at their times,
up to four times as many. The callers have the same processors as the node: what they and the refusals take,
the model lacks, so the larger of the two models shows what the node does, the smaller one what it costs.
Prints, asserts nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.bench_request_cost import load
from support.node import Node
from support.served import declare

CALLERS = Path(__file__).with_name("overload_callers.py")
PROCESSES = 2
SECONDS = 6.0
MB = 2**20
DEEP = """
from torch import nn


def deep(layers):
    return nn.Sequential(*(nn.Linear(768, 768) for _ in range(layers))).eval()
"""
TIMES = (0.5, 1.0, 2.0, 4.0, 4.0, 4.0)
CASES = ((12, 64), (96, 64), (96, 1024))
"""Layers of the model, and its `max_queue`."""


def _offer(address: str, per_second: float) -> tuple[dict[str, int], list[float], float]:
    """How the requests ended, what the answered ones took, and how late the last one was sent, in seconds."""
    command = [
        sys.executable,
        str(CALLERS),
        address,
        str(per_second / PROCESSES),
        str(SECONDS),
    ]
    pipe = subprocess.PIPE
    callers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(PROCESSES)
    ]
    for caller in callers:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
    for caller in callers:
        assert caller.stdin is not None
        caller.stdin.write("go\n")
        caller.stdin.flush()
    found = [json.loads(caller.communicate(timeout=180)[0]) for caller in callers]
    statuses: dict[str, int] = {}
    for one in found:
        for status, count in one["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    late_s = max(one["late_s"] for one in found)
    return statuses, [ms for one in found for ms in one["took_ms"]], late_s


@pytest.mark.parametrize(("layers", "max_queue"), CASES)
def test_overload(tmp_path: Path, layers: int, max_queue: int) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "deep.py").write_text(DEEP)
    config = {"input_shape": [1, 10, 768], "kwargs": {"layers": layers}}
    declare(directory, "mlp", model_path="deep:deep", max_queue=max_queue, config=config)
    with Node(directory, environment={"OMP_NUM_THREADS": "1"}) as node:
        node.wait_phase("mlp", "Ready")
        load(node.address, 32, 2.0)
        process = psutil.Process(node.process.pid)
        print(
            f"\n{layers} layers, max_queue {max_queue}; capacity: of 32 callers that wait, before and after"
        )
        print(
            "times  offered/s  answered/s  of capacity  refused  others  p50 ms  p99 ms  RSS MB  late s"
        )
        capacity = load(node.address, 32, SECONDS) / SECONDS
        for times in TIMES:
            offered = capacity * times
            statuses, took, late_s = _offer(node.address, offered)
            after = load(node.address, 32, SECONDS) / SECONDS
            answered = statuses.get("OK", 0)
            refused = statuses.get("RESOURCE_EXHAUSTED", 0)
            others = sum(statuses.values()) - answered - refused
            p50, p99 = np.percentile(took, [50, 99]) if took else (0.0, 0.0)
            rss_mb = process.memory_info().rss / MB
            rate, ratio = answered / SECONDS, 2 * answered / SECONDS / (capacity + after)
            print(
                f"{times:5g} {offered:10,.0f} {rate:11,.0f} {ratio:12.2f} {refused:8,} {others:7,} "
                f"{p50:7.1f} {p99:7.1f} {rss_mb:7.0f} {late_s:7.2f}"
            )
            capacity = after
