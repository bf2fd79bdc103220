"""6 GiB of desired models on a node that may have 2 GiB: it survives, serves each one, is never killed.

The limit is a control group where the system permits one, else address space. Four clients ask for models
of 50 to 400 MB at random, each of them at least once, and wait as long as it takes.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from pathlib import Path

import psutil

from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client.retry import FixedDelay
from support.big_models import X, declare_big, write_factory
from support.memory_cap import ADDRESS_SPACE, CGROUP, MemoryCap, cgroups_permitted
from support.node import Node
from support.waiting import eventually

LIMIT_MB = 2048
DESIRED_MB = 6 * 1024
SIZES_MB = (50, 100, 200, 400)
CLIENTS, REQUESTS = 4, 60
SETTINGS = {"max_models": 100, "settle_s": 0.1, "resync_s": 0.2, "max_memory_percent": 100}


def sizes_mb() -> list[int]:
    """Sizes that together are at least what is desired."""
    sizes: list[int] = []
    for mb in itertools.cycle(SIZES_MB):
        if sum(sizes) >= DESIRED_MB:
            return sizes
        sizes.append(mb)
    raise AssertionError


def ask(node: Node, orders: list[int], waits: list[float], failures: list[str]) -> None:
    """Asks for models in turn; each answers its number."""
    retry = FixedDelay(max_attempts=10_000, delay_s=0.1)
    with GRPCComputeClient(node.address, timeout=300, retry_strategy=retry) as client:
        for number in orders:
            began = time.monotonic()
            try:
                answer = client.compute(X, model_id=f"m{number}").tolist()
            except Exception as error:
                failures.append(f"m{number}: {error}")
                return
            waits.append(time.monotonic() - began)
            if answer != [[1.0 + number] * 4]:
                failures.append(f"m{number} answered {answer}")


def test_six_gib_of_models_in_two(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    sizes = sizes_mb()
    for number, mb in enumerate(sizes):
        declare_big(directory, f"m{number}", mb, 1.0 + number)
    rng = random.Random(1)
    asked = [*range(len(sizes)), *rng.choices(range(len(sizes)), k=CLIENTS * REQUESTS)]
    rng.shuffle(asked)
    kind = CGROUP if cgroups_permitted() else ADDRESS_SPACE
    waits: list[float] = []
    failures: list[str] = []
    with (
        MemoryCap(kind, LIMIT_MB) as cap,
        Node(directory, SETTINGS, launcher=cap.launcher) as node,
    ):
        eventually(lambda: node.status(f"m{len(sizes) - 1}"), "the models are declared")
        clients = [
            threading.Thread(target=ask, args=(node, asked[n::CLIENTS], waits, failures))
            for n in range(CLIENTS)
        ]
        began = time.monotonic()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        took = time.monotonic() - began
        alive = node.process.poll() is None
        rss_mb = psutil.Process(node.process.pid).memory_info().rss / 2**20 if alive else 0.0
        evicted, relieved = (
            len(node.find("event=Evicted")),
            len([line for line in node.find("event=Evicted") if "reason=MemoryPressure" in line]),
        )
        failed = node.find("event=LoadFailed")
        kills, peak_mb = cap.kills(), cap.peak_mb()
    waits.sort()
    print(
        f"\n{len(sizes)} models of {sum(sizes):,} MB on a node that may have {LIMIT_MB:,} MB ({kind}): "
        f"{len(waits)} requests answered in {took:.0f} s, waits median {waits[len(waits) // 2]:.2f} s, "
        f"longest {waits[-1]:.1f} s; {evicted} evictions ({relieved} because others took memory), "
        f"{len(failed)} failed loads; resident at the end {rss_mb:,.0f} MB, peak of the group with page "
        f"cache {peak_mb:,.0f} MB, killed {kills} times"
    )
    assert not failures
    assert len(waits) == len(asked)
    assert alive
    assert kills == 0
