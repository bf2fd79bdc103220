"""What a large desired directory costs: directories of 100 to 10,000 files, each served by a real node.

    first start    from the process's start until everything was read and decided (`/readyz`)
    restart        the same, over the state directory that the first run left
    steady CPU     of the whole process over a quiet minute, the watcher at work, nobody asking
    edit           from the write of one file to the acceptance of its new generation, and until it is shown
    memory         RSS over that of a node with as many files as it has models loaded

First start and edit also in CPU seconds of the node, which other work on the machine changes less.

Each model has a weights file of its own. Two tiny models are loaded, all others wait for room, so what
is measured is the directory. Beside each figure stands a plain program that does only what cannot be
avoided, on the same files in the same run: one listing and one stat a file; ruamel.yaml's safe loader
over every file.

`SIZES=100,1000 make bench` chooses other sizes; `STEADY_S`, `EDITS` how long to measure; `ROWS` a file
for the figures as JSON. The picture of docs/scale.md is written when all four sizes of it were measured.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, time

import psutil
import pytest

from benchmarks.scale_plot import (
    GOAL_EDIT_S,
    GOAL_FIRST_START_S,
    GOAL_KB_A_FILE,
    GOAL_STEADY_PERCENT,
    draw,
)
from support.node import Node
from support.served import declare, save_version

SIZES = tuple(int(n) for n in os.environ.get("SIZES", "100,1000,3000,10000").split(","))
STEADY_S = float(os.environ.get("STEADY_S", "60"))
EDITS = int(os.environ.get("EDITS", "20"))
ROWS = Path(os.environ["ROWS"]) if "ROWS" in os.environ else None
ASK_EVERY_S = 0.25
"""How often the node is asked whether it is done: each question costs it a little."""
PICTURED = (100, 1000, 3000, 10000)
PICTURE = Path(__file__).parents[2] / "docs" / "scale.svg"

LOADED = 2
SETTLE_S = 0.25
SETTINGS = {"max_models": LOADED, "settle_s": SETTLE_S}

LOOK_ALONE = """
import os, sys, time
def look():
    for entry in os.scandir(sys.argv[1]):
        if entry.name.endswith(".yaml"):
            os.stat(entry.path)
look()
began = time.perf_counter()
for _ in range(5):
    look()
print((time.perf_counter() - began) / 5)
"""

PARSE_ALONE = """
import os, sys, time
from ruamel.yaml import YAML
began = time.perf_counter()
for entry in os.scandir(sys.argv[1]):
    if entry.name.endswith(".yaml"):
        with open(entry.path, "rb") as file:
            YAML(typ="safe", pure=True).load(file.read())
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Measured:
    """One directory's figures. Seconds, percent of one core, MB, KB."""

    files: int
    parse_alone_s: float
    look_alone_s: float
    first_start_s: float
    first_start_cpu_s: float
    restart_s: float
    steady_percent: float
    turns: float
    turn_s: float
    edits_s: tuple[float, ...]
    shown_s: tuple[float, ...]
    edit_cpu_s: float
    rss_mb: float
    peak_mb: float
    base_mb: float

    @property
    def kb_a_file(self) -> float:
        return (self.rss_mb - self.base_mb) * 1024 / (self.files - LOADED)

    @property
    def edit_s(self) -> float:
        return max(self.edits_s)


def write_directory(directory: Path, files: int) -> None:
    directory.mkdir()
    weights = weights_of(directory)
    weights.mkdir()
    save_version(weights / "all.pt", 1)
    for number in range(files):
        os.link(weights / "all.pt", weights / f"{name_of(number)}.pt")
        write_model(directory, number)


def weights_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}-weights")


def write_model(directory: Path, number: int, weight: float = 1.0) -> Path:
    return declare(
        directory,
        name_of(number),
        model_path=f"../{weights_of(directory).name}/{name_of(number)}.pt",
        trusted=True,
        priority=-number,
        batch_size=8,
        weight=weight,
        config={"input_shape": [1, 4]},
    )


def name_of(number: int) -> str:
    return f"model-{number:05d}"


@contextmanager
def started(directory: Path) -> Iterator[tuple[Node, float]]:
    """A node that has converged, and how long that took."""
    began = perf_counter()
    with Node(directory, SETTINGS) as node:
        pause = threading.Event()
        while node.get("/readyz")[0] != 200:
            pause.wait(ASK_EVERY_S)
            assert perf_counter() - began < 600, "no first convergence"
        yield node, perf_counter() - began


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def turns_of(node: Node) -> tuple[float, float]:
    """How many turns the loop has made, and how long they took together."""
    _, text = node.get("/metrics")
    name = "splitlearn_reconcile_duration_seconds"
    found = [re.search(rf"^{name}_{part} (\S+)$", text, re.M) for part in ("count", "sum")]
    count, total = (float(match[1]) if match else 0.0 for match in found)
    return count, total


def steady(node: Node) -> tuple[float, float, float]:
    """Percent of one core over a quiet while; turns in it; seconds a turn."""
    process = psutil.Process(node.process.pid)
    turns, spent = turns_of(node)
    pause = threading.Event()
    pause.wait(2.0)  # what the question itself cost is over
    before, began = cpu_s(process), perf_counter()
    pause.wait(STEADY_S)
    used, took = cpu_s(process) - before, perf_counter() - began
    later_turns, later_spent = turns_of(node)
    made = later_turns - turns
    return 100 * used / took, made, (later_spent - spent) / made if made else 0.0


def edits(node: Node, files: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds from the write of a file to the acceptance of what it says, and until `status` shows it.

    Taken from the node's own notes (history, events), so that asking does not disturb it; each edit begins
    at another moment of the loop's pause.
    """
    rng = random.Random(1)
    pause = threading.Event()
    numbers = rng.sample(range(LOADED, files), min(EDITS, files - LOADED))
    accepted, shown = [], []
    for number in numbers:
        pause.wait(rng.uniform(0.5, 2.5))
        model_id = name_of(number)
        before = node.status(model_id)["generation"]
        began, began_wall = perf_counter(), time()
        write_model(node.directory, number, weight=2.0)
        while node.status(model_id)["generation"] == before:
            pause.wait(ASK_EVERY_S)
            assert perf_counter() - began < 60, f"{model_id} was edited and not accepted"
        versions = json.loads(node.get(f"/api/v1/models/{model_id}/history")[1])["history"]
        events = node.status(model_id)["events"]
        assert isinstance(events, list)
        accepted.append(versions[-1]["at"] - began_wall)
        shown.append(max(e["at"] for e in events if e["reason"] == "SpecAccepted") - began_wall)
    assert min(accepted) > SETTLE_S
    return tuple(accepted), tuple(shown)


def seconds_of(program: str, directory: Path) -> float:
    out = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    return float(out.stdout)


def measure(work: Path, files: int, base_mb: float) -> Measured:
    directory = work / f"desired-{files}"
    write_directory(directory, files)
    with started(directory) as (node, first_start_s):
        process = psutil.Process(node.process.pid)
        first_start_cpu_s = cpu_s(process)
        percent, turns, turn_s = steady(node)
        memory = process.memory_info().rss / 2**20
        peak_mb = peak_of(node.process.pid)
        before = cpu_s(process)
        accepted, shown = edits(node, files)
        edit_cpu_s = (cpu_s(process) - before) / len(accepted)
    with started(directory) as (_, restart_s):
        pass
    measured = Measured(
        files=files,
        parse_alone_s=seconds_of(PARSE_ALONE, directory),
        look_alone_s=seconds_of(LOOK_ALONE, directory),
        first_start_s=first_start_s,
        first_start_cpu_s=first_start_cpu_s,
        restart_s=restart_s,
        steady_percent=percent,
        turns=turns,
        turn_s=turn_s,
        edits_s=accepted,
        shown_s=shown,
        edit_cpu_s=edit_cpu_s,
        rss_mb=memory,
        peak_mb=peak_mb,
        base_mb=base_mb,
    )
    shutil.rmtree(directory)
    shutil.rmtree(weights_of(directory))
    return measured


def peak_of(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure_base(work: Path) -> float:
    """RSS of a node with the loaded models' files alone, after the same quiet while."""
    directory = work / "desired-base"
    write_directory(directory, LOADED)
    with started(directory) as (node, _):
        threading.Event().wait(min(STEADY_S, 20.0))
        return float(psutil.Process(node.process.pid).memory_info().rss / 2**20)


def table(rows: list[Measured]) -> str:
    head = (
        "files   first start     CPU  restart  parse alone │ steady CPU  turns     a turn  look alone"
        " │ edit median    max   shown      CPU │    RSS   peak  KB a file"
    )
    lines = [head]
    for m in rows:
        lines.append(
            f"{m.files:6d}  {m.first_start_s:9.2f} s {m.first_start_cpu_s:5.1f} s"
            f" {m.restart_s:6.2f} s {m.parse_alone_s:10.2f} s"
            f" │ {m.steady_percent:8.2f} % {m.turns:6.0f} {1000 * m.turn_s:7.1f} ms"
            f" {1000 * m.look_alone_s:8.1f} ms"
            f" │ {1000 * statistics.median(m.edits_s):8.0f} ms {1000 * m.edit_s:5.0f} ms"
            f" {1000 * statistics.median(m.shown_s):4.0f} ms"
            f" {1000 * m.edit_cpu_s:5.0f} ms"
            f" │ {m.rss_mb:4.0f} MB {m.peak_mb:4.0f} MB {m.kb_a_file:8.1f}"
        )
    return "\n".join(lines)


def verdicts(largest: Measured) -> list[str]:
    """The goals at the largest size, each with PASS or FAIL."""
    figures = (
        ("first start", largest.first_start_s, GOAL_FIRST_START_S, "s"),
        ("steady CPU", largest.steady_percent, GOAL_STEADY_PERCENT, "% of one core"),
        ("slowest edit", 1000 * largest.edit_s, 1000 * GOAL_EDIT_S, "ms"),
        ("memory", largest.kb_a_file, GOAL_KB_A_FILE, "KB a file"),
    )
    return [
        f"{'PASS' if value <= goal else 'FAIL'}  {what}: {value:.2f}, at most {goal:g} {unit}"
        for what, value, goal, unit in figures
    ]


def slopes(rows: list[Measured]) -> str:
    """How cost grows from the smallest to the largest: 1 is linear."""
    first, last = rows[0], rows[-1]

    def slope(of: str) -> float:
        one, other = getattr(first, of), getattr(last, of)
        if one <= 0 or other <= 0 or first.files == last.files:
            return float("nan")
        return math.log(other / one) / math.log(last.files / first.files)

    figures = (
        "parse_alone_s",
        "first_start_s",
        "restart_s",
        "look_alone_s",
        "steady_percent",
        "edit_s",
    )
    return ", ".join(f"{of} {slope(of):.2f}" for of in figures)


@pytest.mark.timeout(3600)
def test_directory_size(tmp_path: Path) -> None:
    base_mb = measure_base(tmp_path)
    rows = [measure(tmp_path, files, base_mb) for files in SIZES]
    print(f"\nload average {os.getloadavg()[0]:.1f} at the end")
    print(f"node with {LOADED} files: {base_mb:.0f} MB; settle_s {SETTLE_S:g} s\n{table(rows)}")
    print(f"growth, as exponents (1 is linear): {slopes(rows)}")
    print("\n".join(verdicts(rows[-1])))
    if ROWS is not None:
        ROWS.write_text(json.dumps([asdict(row) for row in rows]))
    if set(PICTURED) <= set(SIZES):
        draw(rows, PICTURE)
