"""A normal day with more models than fit: 50 of 100 MB, a quota for 12, 8 clients asking by a Zipf law.

    answers    every request is answered within its deadline of 30 s, by the model that it named
    memory     the node's RSS over that of the same node without models, against the quota
    waits      the share of requests that waited for a load, against the share of misses of an ideal LRU of
               12 slots over the same requests in the order in which they arrived

The ideal loads in no time: a second request for a model that is still being loaded waits in the node, and
is a hit there. Each model answers with its own number, so that an answer of another one is seen.

The clients are processes of their own and ask again as soon as they have an answer, so the node is as
busy as they can make it. `REQUESTS` is how many each of them asks (250), `ROWS` a file for
the figures and the course of the run as JSON. The picture of docs/memory.md is written by a run of the usual
size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

import psutil

from benchmarks.overcommit_plot import draw
from support.node import Node
from support.served import declare
from support.waiting import eventually

MODELS = 50
SLOTS = 12
WIDTH = 5120
MODEL_MB = 100.0
QUOTA_MB = SLOTS * MODEL_MB + 25  # a forward takes some beside the weights, less than that for all
CLIENTS = 8
DEADLINE_S = 30.0
USUAL_REQUESTS = 250
REQUESTS = int(os.environ.get("REQUESTS", USUAL_REQUESTS))
ROWS = Path(os.environ["ROWS"]) if "ROWS" in os.environ else None
PICTURE = Path(__file__).parents[2] / "docs" / "overcommit.svg"

ALLOWED_OVER_QUOTA = 1.05
ALLOWED_OVER_LRU = 1.15

MAKE_MODELS = """
import sys, torch
from torch import nn
directory, count, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
layer = nn.Linear(width, width, bias=False)
for number in range(count):
    with torch.no_grad():
        layer.weight.fill_((number + 1) / width)
    torch.save(layer, f"{directory}/m{number:02d}.pt")
"""

CLIENT = """
import itertools, json, random, sys, time
import torch
from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client.retry import FixedDelay
address, seed, requests, models, width, deadline_s = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(seed)
weights = list(itertools.accumulate(1 / rank for rank in range(1, models + 1)))
x = torch.ones(1, width)
once = FixedDelay(max_attempts=1)
with GRPCComputeClient(address, timeout=deadline_s, retry_strategy=once) as client:
    print("connected", flush=True)
    sys.stdin.readline()
    for number in rng.choices(range(models), cum_weights=weights, k=requests):
        began, error = time.monotonic(), ""
        try:
            answer = client.compute(x, model_id=f"m{number:02d}")
            if not torch.allclose(answer, torch.full_like(answer, number + 1.0), rtol=1e-3):
                error = f"m{number:02d} answered {answer.flatten()[0]}"
        except Exception as failure:
            error = repr(failure)
        took = time.monotonic() - began
        print(json.dumps({"at_s": began, "model": number, "took_s": took, "error": error}), flush=True)
"""


@dataclass(frozen=True)
class Asked:
    """One request of a client. `at_s` is on the machine's monotonic clock."""

    at_s: float
    model: int
    took_s: float
    error: str


@dataclass(frozen=True)
class Sample:
    """The node at one moment, as its metrics tell it. Counts are since it started."""

    at_s: float
    rss_mb: float
    reserved_mb: float
    resident: int
    evictions: int
    answered: int
    waited: int


@dataclass(frozen=True)
class Day:
    """What a run gave. `base_mb` is the RSS without models, `peak_mb` the highest with them."""

    asked: tuple[Asked, ...]
    samples: tuple[Sample, ...]
    first: tuple[int, ...]
    base_mb: float
    peak_mb: float
    quota_mb: float
    waited: int
    waited_s: float
    evictions: int

    @property
    def wait_share(self) -> float:
        return self.waited / len(self.asked)

    @property
    def ideal_share(self) -> float:
        arrived = sorted(self.asked, key=lambda request: request.at_s)
        return lru_misses(self.first, [request.model for request in arrived]) / len(arrived)

    @property
    def models_mb(self) -> float:
        return self.peak_mb - self.base_mb


def lru_misses(first: Iterable[int], trace: Sequence[int]) -> int:
    """How many of the trace an LRU of `SLOTS` that holds `first` does not hold when they come."""
    held = OrderedDict.fromkeys(first)
    misses = 0
    for model in trace:
        if model in held:
            held.move_to_end(model)
            continue
        misses += 1
        if len(held) == SLOTS:
            held.popitem(last=False)
        held[model] = None
    return misses


class Watch:
    """Samples the node's RSS and metrics until the `with` ends.

    Attributes:
        peak_mb: the highest RSS: the kernel's own mark where it keeps one, else the highest of the samples.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._process = psutil.Process(node.process.pid)
        self._marks = Path(f"/proc/{node.process.pid}")
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=t) for t in (self._watch_memory, self._watch_all)]
        self.samples: list[Sample] = []
        self.peak_mb = 0.0

    def __enter__(self) -> Watch:
        with self._unless_unsupported():
            (self._marks / "clear_refs").write_text("5")
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
        with self._unless_unsupported():
            status = (self._marks / "status").read_text()
            mark = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            self.peak_mb = max(self.peak_mb, int(mark.split()[1]) / 1024)

    @staticmethod
    @contextmanager
    def _unless_unsupported() -> Iterator[None]:
        if sys.platform == "linux":
            yield

    def _rss_mb(self) -> float:
        return float(self._process.memory_info().rss) / 2**20

    def _watch_memory(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_mb = max(self.peak_mb, self._rss_mb())

    def _watch_all(self) -> None:
        while not self._ended.wait(0.2):
            self.samples.append(self.look())

    def look(self) -> Sample:
        _, text = self._node.get("/metrics")
        values: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] = values.get(name.partition("{")[0], 0) + float(
                    value
                )
        return Sample(
            at_s=monotonic(),
            rss_mb=self._rss_mb(),
            reserved_mb=values["splitlearn_reservation_mb"],
            resident=int(values["models_loaded"]),
            evictions=int(values["splitlearn_evictions_total"]),
            answered=int(values.get("inference_requests_total", 0)),
            waited=int(values.get("splitlearn_load_wait_seconds_count", 0)),
        )


def run_a_day(directory: Path) -> Day:
    """Makes the models, serves them, lets the clients ask, and watches."""
    directory.mkdir()
    weights = directory.parent / "weights"
    weights.mkdir()
    made = [sys.executable, "-c", MAKE_MODELS, str(weights), str(MODELS), str(WIDTH)]
    subprocess.run(made, check=True)
    settings = {
        "memory_quota_mb": {"cpu": QUOTA_MB},
        "max_models": MODELS,
        "max_workers": 4 * CLIENTS,
    }
    keys = {"trusted": True, "batch_size": 1, "config": {"input_shape": [1, WIDTH]}}
    with Node(directory, settings) as node:
        base_mb = rss_without_models(node, weights)
        for number in range(MODELS):
            path = str(weights / f"m{number:02d}.pt")
            declare(directory, f"m{number:02d}", model_path=path, **keys)
        first = eventually(lambda: resident_of(node), f"{SLOTS} models are loaded", 120)
        with Watch(node) as watch:
            before = watch.look()
            asked = ask(node)
            after = watch.look()
        _, text = node.get("/metrics")
    waited_s = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("splitlearn_load_wait_seconds_sum")
    ]
    return Day(
        asked=tuple(asked),
        samples=tuple(watch.samples),
        first=tuple(first),
        base_mb=base_mb,
        peak_mb=watch.peak_mb,
        quota_mb=QUOTA_MB,
        waited=after.waited - before.waited,
        waited_s=sum(waited_s),
        evictions=after.evictions - before.evictions,
    )


def rss_without_models(node: Node, weights: Path) -> float:
    """MB of the node once it has loaded torch, served one model and let it go."""
    path = declare(
        node.directory,
        "first",
        model_path=str(weights / "m00.pt"),
        trusted=True,
        config={"input_shape": [1, WIDTH]},
    )
    node.wait_phase("first", "Ready")
    path.unlink()
    node.wait_gone("first")
    return float(psutil.Process(node.process.pid).memory_info().rss) / 2**20


def resident_of(node: Node) -> list[int]:
    """The models that are loaded, once as many as have room are."""
    _, body = node.get("/api/v1/models")
    ready = [m["model_id"] for m in json.loads(body)["models"] if m["phase"] == "Ready"]
    return [int(model_id[1:]) for model_id in ready] if len(ready) == SLOTS else []


def ask(node: Node) -> list[Asked]:
    """Lets all clients begin at once, and gives what they saw."""
    numbers = (REQUESTS, MODELS, WIDTH, int(DEADLINE_S))
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, node.address, str(seed), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in range(CLIENTS)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
    outputs = [""] * CLIENTS

    def read(number: int) -> None:
        outputs[number] = clients[number].communicate("go\n")[0]

    readers = [threading.Thread(target=read, args=(number,)) for number in range(CLIENTS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return [Asked(**json.loads(line)) for text in outputs for line in text.splitlines()]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def told(day: Day) -> str:
    took = [request.took_s for request in day.asked]
    lasted_s = max(r.at_s + r.took_s for r in day.asked) - min(r.at_s for r in day.asked)
    return (
        f"\n{len(day.asked):,} requests of {CLIENTS} clients in {lasted_s:.0f} s "
        f"({len(day.asked) / lasted_s:.1f} a second), {day.evictions:,} evictions"
        f"\nanswered wrongly or not at all: {sum(bool(r.error) for r in day.asked)}"
        f"\nlatency: median {statistics.median(took):.3f} s, 95 % {percentile(took, 0.95):.3f} s, "
        f"longest {max(took):.2f} s"
        f"\nwaited for a load: {day.wait_share:.1%} of the requests, "
        f"{day.waited_s / max(1, day.waited):.3f} s each; ideal LRU of {SLOTS}: {day.ideal_share:.1%}; "
        f"ratio {day.wait_share / day.ideal_share:.3f} (allowed {ALLOWED_OVER_LRU})"
        f"\nRSS: {day.base_mb:.0f} MB without models, highest {day.peak_mb:.0f} MB, so "
        f"{day.models_mb:.0f} MB for models; quota {day.quota_mb:.0f} MB, "
        f"ratio {day.models_mb / day.quota_mb:.3f} (allowed {ALLOWED_OVER_QUOTA})"
    )


def test_a_day_of_overcommitment(tmp_path: Path) -> None:
    day = run_a_day(tmp_path / "desired")
    print(told(day))
    if ROWS is not None:
        ROWS.write_text(json.dumps(asdict(day)))
    if REQUESTS == USUAL_REQUESTS:
        draw(day, PICTURE)
    wrong = [request.error for request in day.asked if request.error]
    assert not wrong, f"{len(wrong)} requests failed: {wrong[0]}"
    assert max(request.took_s for request in day.asked) <= DEADLINE_S
    assert day.models_mb <= ALLOWED_OVER_QUOTA * day.quota_mb
    assert day.wait_share <= ALLOWED_OVER_LRU * day.ideal_share
