"""A model in a process of its own, beside the same one in the node's: start, cost of a request, throughput.

Both models are in one node, and rounds alternate between them. Prints, asserts nothing but that all requests
were answered.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

from benchmarks.bench_request_cost import DESIRED, cost_ms, load
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.runtime.process import ProcessRuntime
from splitlearn_manager.runtime.thread import ThreadRuntime
from support.node import Node

ROUNDS = 11
STARTS = 15


def test_start(tmp_path: Path) -> None:
    """From the decision to load until the model could be asked, in a process and in a thread, by turns."""
    shutil.copy(DESIRED / "quickstart.py", tmp_path)
    config = ModelConfig.model_validate(
        {
            "model_id": "mlp",
            "model_path": "quickstart:mlp",
            "config": {"input_shape": [1, 10, 768]},
        }
    ).with_base_dir(tmp_path)
    in_process, in_thread = ProcessRuntime(), ThreadRuntime(ModelLoader())
    took: dict[str, list[float]] = {"process": [], "thread": []}
    for number in range(STARTS + 1):
        for name, runtime in (("process", in_process), ("thread", in_thread)):
            began = time.perf_counter()
            running = runtime.start(config, "cpu")
            if number:  # the first one starts the fork server, and imports
                took[name].append((time.perf_counter() - began) * 1000)
            running.close()
    process, thread = (statistics.median(took[name]) for name in ("process", "thread"))
    print(
        f"\nstart: process {process:.1f} ms, thread {thread:.1f} ms; the process takes "
        f"{process - thread:.1f} ms more ({min(took['process']):.1f}..{max(took['process']):.1f})"
    )


def test_requests(tmp_path: Path) -> None:
    """What a request costs, over one connection, over 8 and over 32."""
    nodes: dict[str, Node] = {}
    for runtime in ("thread", "process"):
        directory = tmp_path / runtime
        directory.mkdir()
        shutil.copy(DESIRED / "quickstart.py", directory)
        text = (DESIRED / "mlp.yaml").read_text() + f"\nruntime: {runtime}\n"
        (directory / "mlp.yaml").write_text(text)
        nodes[runtime] = Node(directory, environment={"OMP_NUM_THREADS": "1"})
    with nodes["thread"], nodes["process"]:
        for node in nodes.values():
            node.wait_phase("mlp", "Ready")
            load(node.address, 1, 1.0)
        for clients in (1, 8, 32):
            rates: dict[str, list[float]] = {name: [] for name in nodes}
            for _ in range(ROUNDS):
                for name, node in nodes.items():
                    rates[name].append(cost_ms(node.process.pid, node.address, clients)[1])
            thread, process = (statistics.median(rates[name]) for name in ("thread", "process"))
            pairs = list(zip(rates["process"], rates["thread"], strict=True))
            ratios = [p / t for p, t in pairs]
            more_us = [1e6 * (1 / p - 1 / t) for p, t in pairs]
            more = (
                f", {statistics.median(more_us):+.0f} us a request ({min(more_us):+.0f}..{max(more_us):+.0f})"
                if clients == 1
                else ""
            )
            print(
                f"\n{clients} clients: thread {thread:,.0f}/s, process {process:,.0f}/s{more}; "
                f"process / thread {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
            )
