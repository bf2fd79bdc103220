"""Idle means idle: a node on which nothing changes, for minutes, neither acts nor grows.

One half of the time a client asks its models for answers at a low rate and the metrics are fetched every
five seconds, the other half nobody asks anything. Memory (RSS), open files and threads are read from
outside, so that looking at them costs the node nothing.

Flat means, for each half after its first fifth: the memory's trend (the median of the slopes between all
pairs of samples, which a few outliers do not move) makes no more than `ALLOWED_MB` of the half, and the
numbers of files and threads are the same in the middle of its first and of its last third.

`make soak MINUTES=60` takes longer, and sees smaller leaks.
"""

from __future__ import annotations

import os
import re
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path
from time import monotonic

import psutil
import pytest
import torch
from torch import nn

from splitlearn_comm import GRPCComputeClient
from splitlearn_manager.cli.asking import ask
from splitlearn_manager.server.state_dir import socket_of
from support.node import Node
from support.served import X, constant, declare, save_version, write_factory

MINUTES = float(os.environ.get("MINUTES") or 10)
SAMPLES = 150
"""In each half."""

WARM_UP = 200
"""Requests to each model, and looks at the metrics, until memory that is reused is there to be reused."""

REQUESTS_A_SECOND = 5
ALLOWED_MB = 0.5
CONSTANTS = [f"m{n}" for n in range(4)]
ASKED = [*CONSTANTS, "weights", "linear"]


@dataclass(frozen=True)
class Sample:
    """What the node used at one moment; `cpu_s` since its start."""

    at_s: float
    rss_mb: float
    files: int
    threads: int
    cpu_s: float


@dataclass(frozen=True)
class Done:
    """What the node has done so far, by its own account."""

    loads: float
    unloads: float
    evictions: float
    errors: float
    last_event: int


def sample(process: psutil.Process, began: float) -> Sample:
    with process.oneshot():
        times = process.cpu_times()
        return Sample(
            monotonic() - began,
            process.memory_info().rss / 2**20,
            process.num_fds(),
            process.num_threads(),
            times.user + times.system,
        )


def done(node: Node) -> Done:
    _, text = node.get("/metrics")

    def total(name: str) -> float:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        return sum(float(value) for value in found)

    events = ask(socket_of(node.state_dir), "events", after=0)
    return Done(
        loads=total("model_load_total"),
        unloads=total("model_unload_total"),
        evictions=total("splitlearn_evictions_total"),
        errors=total('splitlearn_reconcile_total{result="error"}'),
        last_event=int(str(events["next"])),
    )


def watch(process: psutil.Process, seconds: float, every: Callable[[], None]) -> list[Sample]:
    """Samples over so many seconds; `every` is called in between, `REQUESTS_A_SECOND` times a second."""
    pause, began = threading.Event(), monotonic()
    samples: list[Sample] = []
    while (now := monotonic() - began) < seconds:
        if now >= len(samples) * seconds / SAMPLES:
            samples.append(sample(process, began))
        every()
        pause.wait(1 / REQUESTS_A_SECOND)
    return samples


def trend(samples: Sequence[Sample]) -> float:
    """MB that memory grows over the samples' time, by the median slope of all pairs (Theil and Sen)."""
    slopes = [(b.rss_mb - a.rss_mb) / (b.at_s - a.at_s) for a, b in combinations(samples, 2)]
    return statistics.median(slopes) * (samples[-1].at_s - samples[0].at_s)


def table(half: str, samples: Sequence[Sample]) -> list[str]:
    """A line for each tenth of the half."""
    step = max(1, len(samples) // 10)
    lines = []
    for begin in range(0, len(samples) - step, step):
        one, two = samples[begin], samples[begin + step]
        cpu = 100 * (two.cpu_s - one.cpu_s) / (two.at_s - one.at_s)
        lines.append(
            f"{half:9s} {one.at_s / 60:6.1f} min {one.rss_mb:9.2f} MB {one.files:6d} {one.threads:8d}"
            f" {cpu:7.2f} %"
        )
    return lines


def verdict(half: str, samples: Sequence[Sample]) -> list[str]:
    """What grew, in words; empty when nothing did."""
    grew = []
    kept = samples[len(samples) // 5 :]
    growth = trend(kept)
    if growth > ALLOWED_MB:
        grew.append(
            f"{half}: memory grows by {growth:.2f} MB in {kept[-1].at_s - kept[0].at_s:.0f} s"
        )
    third = len(kept) // 3
    for what in ("files", "threads"):
        before = statistics.median(getattr(s, what) for s in kept[:third])
        after = statistics.median(getattr(s, what) for s in kept[-third:])
        if after > before:
            grew.append(f"{half}: {what} grow from {before:g} to {after:g}")
    return grew


def summary(half: str, samples: Sequence[Sample]) -> str:
    """The half in a line, without its first fifth."""
    kept = samples[len(samples) // 5 :]
    memory = [s.rss_mb for s in kept]
    spans = {what: {getattr(s, what) for s in kept} for what in ("files", "threads")}
    minutes = (kept[-1].at_s - kept[0].at_s) / 60
    cpu = 100 * (kept[-1].cpu_s - kept[0].cpu_s) / (kept[-1].at_s - kept[0].at_s)
    return (
        f"{half}: in {minutes:.1f} min memory between {min(memory):.2f} and {max(memory):.2f} MB, "
        f"trend {trend(kept):+.3f} MB (at most {ALLOWED_MB:g}); "
        f"files {min(spans['files'])} to {max(spans['files'])}, "
        f"threads {min(spans['threads'])} to {max(spans['threads'])}; CPU {cpu:.2f} %"
    )


def write_directory(directory: Path) -> None:
    directory.mkdir()
    write_factory(directory)
    for number, model_id in enumerate(CONSTANTS):
        declare(directory, model_id, config=constant(float(number)))
    save_version(directory / "weights.pt", 3)
    declare(directory, "weights", model_path="weights.pt")
    torch.save(nn.Linear(4, 4), directory / "linear.pt")
    declare(directory, "linear", model_path="linear.pt", priority=1)


def ask_all(client: GRPCComputeClient) -> None:
    for model_id in ASKED:
        client.compute(X, model_id=model_id)


@pytest.mark.timeout(60 * MINUTES + 600)
def test_a_node_on_which_nothing_changes_does_nothing_and_does_not_grow(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    write_directory(directory)
    half_s = 30 * MINUTES
    with Node(directory, {"max_models": 20}) as node, node.client() as client:
        for model_id in ASKED:
            node.wait_phase(model_id, "Ready")
        for _ in range(WARM_UP):
            ask_all(client)
            node.get("/metrics")
        before = done(node)
        process = psutil.Process(node.process.pid)
        turns = count()

        def ask_one() -> None:
            turn = next(turns)
            client.compute(X, model_id=ASKED[turn % len(ASKED)])
            if turn % (5 * REQUESTS_A_SECOND) == 0:
                node.get("/metrics")

        asked = watch(process, half_s, ask_one)
        silent = watch(process, half_s, lambda: None)
        after = done(node)
    print("\nhalf          time       memory  files  threads      CPU")
    print("\n".join([*table("requests", asked), *table("silence", silent)]))
    for name, samples in (("requests", asked), ("silence", silent)):
        print(summary(name, samples))
    print(f"done before {before}\ndone after  {after}")
    assert before.loads == len(ASKED)
    grew = [*verdict("requests", asked), *verdict("silence", silent)]
    assert not grew, "; ".join(grew)
    assert after == before, "the node acted although nothing had changed"
