"""What a load costs: its peak of memory for every form of weights, and the way back of a parked model.

peak      a load's highest RSS over the RSS before it, against the weights. Each form in a process of its
          own, which has loaded a small model of the same form before.
return    a node parks a model that nobody asks for. The next request loads it, its file being in the page
          cache, and waits. From that request to its answer, less the same request to the loaded model,
          against `torch.load(mmap=True)` and a clone of the same bytes in another process, by turns. The
          first load, of a file that the node has not read before, is shown beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pytest
import torch

from benchmarks.model_kinds import KINDS, WIDTH, write
from splitlearn_comm import GRPCComputeClient
from support.node import Node
from support.served import declare

PEAK_MB = 400.0
ALLOWED_PEAK = 1.1

RETURN_MB = 100.0
RETURNS = 15
KEEP_ALIVE_S = 0.2
ALLOWED_RETURN = 1.3
ALLOWED_MORE_S = 0.015
RETURNING = ("safetensors", "state_dict", "whole_module", "trusted_module")

LOAD = """
import json, sys, psutil
from splitlearn_manager import ModelConfig, ModelManager
manager = ModelManager()
process = psutil.Process()

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

for keys in map(json.loads, sys.argv[1:]):
    before = process.memory_info().rss / 2**20
    open("/proc/self/clear_refs", "w").write("5")
    manager.load_model(ModelConfig(device="cpu", batch_size=1, **keys))
    loaded = process.memory_info().rss / 2**20
    peak = peak_mb()
    weights = manager.measurements(keys["model_id"])[-1].weights_mb
    manager.unload_model(keys["model_id"])
print(json.dumps([weights, loaded - before, peak - before]))
"""

CLONE = """
import ctypes, sys, time, torch
for line in sys.stdin:
    begun = time.perf_counter()
    loaded = torch.load(sys.argv[1], mmap=True, weights_only=True)
    own = {name: tensor.clone() for name, tensor in loaded.items()}
    print(time.perf_counter() - begun, flush=True)
    del loaded, own
    # As in a node that has given the memory back: the next clone needs new memory, too.
    getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_a_load(tmp_path: Path) -> None:
    over: list[str] = []
    print()
    for kind in KINDS:
        name = kind.__name__
        small = write(name, tmp_path / name / "small", 20)
        keys = write(name, tmp_path / name / "large", PEAK_MB)
        out = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(small), json.dumps(keys)],
            cwd=tmp_path / name / "small",  # where factories are found
            capture_output=True,
            text=True,
            check=True,
        )
        weights_mb, taken_mb, peak_mb = json.loads(out.stdout.splitlines()[-1])
        print(
            f"{name:32} {weights_mb:5.0f} MB of weights: RSS +{taken_mb:4.0f} MB, "
            f"peak +{peak_mb:4.0f} MB, {peak_mb / weights_mb:.2f} x the weights"
        )
        if peak_mb > ALLOWED_PEAK * weights_mb:
            over.append(name)
        subprocess.run(["rm", "-r", str(tmp_path / name)], check=True)
    assert not over


@dataclass(frozen=True)
class Return:
    """Seconds, each beyond the forward: of the first load, and the returns."""

    first_s: float
    returns_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.returns_s)


class Cloner:
    """Maps and clones a state dict, each time that it is asked; in a process of its own."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLONE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def took_s(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(30)


@contextmanager
def cloning(path: Path) -> Iterator[Cloner]:
    cloner = Cloner(path)
    try:
        cloner.took_s()
        yield cloner
    finally:
        cloner.close()


def ways_back(
    node: Node, client: GRPCComputeClient, cloner: Cloner, clones_s: list[float]
) -> Return:
    """Lets the node park the model again and again, and asks for it."""
    x = torch.ones(1, WIDTH)

    def asked_s() -> float:
        begun = perf_counter()
        client.compute(x, model_id="m")
        return perf_counter() - begun

    def parked() -> None:
        node.wait_phase("m", "Evicted")

    returns_s: list[float] = []
    node.wait_phase("m", "Ready")
    forwards_s = [asked_s() for _ in range(5)]
    for _ in range(RETURNS):
        parked()
        clones_s.append(cloner.took_s())
        returning_s = asked_s()
        forward_s = statistics.median(asked_s() for _ in range(5))
        returns_s.append(returning_s - forward_s)
    loaded = json.loads(node.get("/api/v1/models/m")[1])
    assert loaded["generation"] == 1
    assert min(forwards_s) > 0
    first = next(line for line in node.find("event=Loaded") if "model=m " in line)
    return Return(float(first.rsplit(" in ", 1)[1].split(" s")[0]), tuple(returns_s))


def test_the_way_back_of_a_parked_model(tmp_path: Path) -> None:
    plain = write("state_dict", tmp_path / "plain", RETURN_MB)
    clones_s: list[float] = []
    found: dict[str, Return] = {}
    with cloning(Path(plain["model_path"])) as cloner:
        for kind in RETURNING:
            keys = write(kind, tmp_path / kind, RETURN_MB)
            config = {"input_shape": [1, WIDTH], **keys.pop("config", {})}
            directory = tmp_path / kind / "desired"
            directory.mkdir()
            if (factory := tmp_path / kind / "net.py").exists():
                (directory / "net.py").write_text(factory.read_text())
            with Node(directory, {}) as node, GRPCComputeClient(node.address) as client:
                declare(
                    directory,
                    keys.pop("model_id"),
                    keep_alive_s=KEEP_ALIVE_S,
                    config=config,
                    **keys,
                )
                found[kind] = ways_back(node, client, cloner, clones_s)
    clone_s = statistics.median(clones_s)
    allowed_s = ALLOWED_RETURN * clone_s + ALLOWED_MORE_S
    print(
        f"\n{RETURN_MB:.0f} MB, map and clone: median {clone_s * 1000:.0f} ms "
        f"(min {min(clones_s) * 1000:.0f}, max {max(clones_s) * 1000:.0f} of {len(clones_s)}); "
        f"allowed {allowed_s * 1000:.0f} ms"
    )
    for kind, back in found.items():
        spread = " to ".join(f"{edge(back.returns_s) * 1000:.0f}" for edge in (min, max))
        print(
            f"{kind:16} first load {back.first_s * 1000:4.0f} ms; return {back.median_s * 1000:4.0f} ms "
            f"({spread}) beyond the forward, {back.median_s / clone_s:.2f} x map and clone"
        )
    if rows := os.environ.get("ROWS"):
        Path(rows).write_text(json.dumps({kind: back.returns_s for kind, back in found.items()}))
    assert all(back.median_s <= allowed_s for back in found.values())
