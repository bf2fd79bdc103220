"""A model is changed every second while 32 clients call it, in a thread and in a process of its own.

A quiet time comes first, in the same run, to compare with. Every answer must be that of one version, none may
fail, and no caller may see an older version after a newer one. Prints latencies; draws docs/updates.svg from
the run in a thread.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.node import Node
from support.served import declare, loads, replace_file

CLIENTS = 32
QUIET_S = float(os.environ.get("QUIET_S", "20"))
BUSY_S = float(os.environ.get("BUSY_S", "60"))
EVERY_S = 1.0
SCALE = 1e-4
CALLERS = Path(__file__).with_name("update_callers.py")
PICTURE = Path(__file__).parents[2] / "docs" / "updates.svg"


def checkpoint(path: Path, version: int) -> bytes:
    """An MLP whose answer to ones tells its version: all its weights are that number of ten-thousandths."""
    module = nn.Sequential(
        nn.Linear(768, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 768, bias=False)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(version * SCALE)
    torch.save(module, path)
    return path.read_bytes()


def version_of(value: float) -> int:
    exact = math.sqrt(value / (768 * 1024)) / SCALE
    assert abs(exact - round(exact)) < 0.01, f"the answer {value} is that of no version"
    return round(exact)


@pytest.mark.parametrize("runtime", ["thread", "process"])
def test_updates(tmp_path: Path, runtime: str) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    made = [checkpoint(tmp_path / "made.pt", v) for v in range(1, int(BUSY_S / EVERY_S) + 2)]
    replace_file(directory / "m.pt", made[0])
    keys: dict[str, object] = {"model_path": "m.pt", "runtime": runtime, "update": "surge"}
    declare(directory, "m", **keys, config={"input_shape": [1, 10, 768]})
    with Node(directory, {"settle_s": 0.25}, environment={"OMP_NUM_THREADS": "1"}) as node:
        node.wait_phase("m", "Ready")
        command = [sys.executable, str(CALLERS), node.address, str(CLIENTS), str(QUIET_S + BUSY_S)]
        began, switched = monotonic(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as callers:
            pause = threading.Event()
            pause.wait(QUIET_S)
            first_edit = monotonic()
            for number in range(1, len(made)):
                pause.wait(max(0.0, first_edit + number * EVERY_S - monotonic()))
                # Weights, and every third time a key that needs a load.
                replace_file(directory / "m.pt", made[number])
                if number % 3 == 0:
                    declare(
                        directory, "m", **keys, config={"input_shape": [1 + number % 2, 10, 768]}
                    )
                switched.append(monotonic())
            assert callers.stdout is not None
            found = json.load(callers.stdout)
        loaded, failed = loads(node, "m"), loads(node, "m", "failure")
    assert not found["failures"], found["failures"][:3]
    for answers in found["answers"]:
        versions = [version_of(value) for _, _, value, _ in answers]
        assert versions == sorted(versions), "an older version answered after a newer one"
    answered = np.array([row for answers in found["answers"] for row in answers])
    _report(runtime, answered, first_edit, loaded, failed)
    if runtime == "thread":
        draw(answered, began, switched, PICTURE)


def _report(
    runtime: str, answered: np.ndarray[Any, Any], first_edit: float, loaded: int, failed: int
) -> None:
    quiet = answered[answered[:, 0] < first_edit][:, 1]
    busy = answered[answered[:, 0] >= first_edit + EVERY_S][:, 1]
    print(
        f"\n{runtime}: {len(answered):,} answers, 0 failed; {loaded} loads, {failed} of them failed"
    )
    print("          requests/s   p50 ms   p99 ms   longest ms")
    # The callers take a second or two to start.
    quiet_s = first_edit - float(answered[:, 0].min())
    for name, part, seconds in (("quiet", quiet, quiet_s), ("updates", busy, BUSY_S - EVERY_S)):
        p50, p99 = np.percentile(part, [50, 99])
        print(f"{name:8}  {len(part) / seconds:10,.0f} {p50:8.1f} {p99:8.1f} {part.max():12.1f}")
    print(f"p99 during updates / without: {np.percentile(busy, 99) / np.percentile(quiet, 99):.2f}")


def draw(answered: np.ndarray[Any, Any], began: float, switched: list[float], path: Path) -> None:
    """Writes the picture: requests a second, latency, and the version that answered, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "updates", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    at = answered[:, 0] - began
    edges = np.arange(0.0, at.max(), 0.5)
    middle = edges[:-1] + 0.25
    bins = np.digitize(at, edges) - 1
    latencies = [answered[bins == b, 1] for b in range(len(middle))]
    figure, (rate, latency, version) = plt.subplots(
        3, 1, figsize=(10, 7.5), layout="constrained", sharex=True
    )
    figure.suptitle(
        f"New weights every second from {switched[0] - began:.0f} s on, {CLIENTS} clients; no request failed",
        fontsize=12,
    )
    rate.plot(middle, [len(found) / 0.5 for found in latencies], color="#1f5f8b")
    rate.set_ylabel("requests a second")
    rate.set_ylim(bottom=0)
    for percent, colour in ((50, "#4f9d69"), (99, "#c98a1b")):
        values = [np.percentile(found, percent) if len(found) else np.nan for found in latencies]
        latency.plot(middle, values, color=colour, label=f"p{percent}")
    latency.set_ylabel("milliseconds")
    latency.set_ylim(bottom=0)
    latency.legend(loc="upper left", frameon=False)
    order = np.argsort(at)
    step = max(1, len(order) // 1500)
    chosen = order[::step]
    version.plot(
        at[chosen], [version_of(v) for v in answered[chosen, 2]], ".", markersize=2, color="#1f5f8b"
    )
    version.vlines(
        np.array(switched) - began,
        0,
        len(switched) + 1,
        color="#b3402a",
        linewidth=0.4,
        label="edit",
    )
    version.set_ylabel("version that answered")
    version.set_xlabel("seconds")
    version.legend(loc="upper left", frameon=False)
    for axes in (rate, latency, version):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
