"""How long an edit takes: from the write of a YAML file to the first answer of the new version.

A real node serves the small MLP; its file is edited again and again (another seed, so another model)
while one client calls all the time. Printed beside it: what the same work takes without a node, that is
building the model and running it once, plus `settle_s`, below which no edit can be accepted.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from support.node import Node

DESIRED = Path(__file__).parents[2] / "desired"
EDITS = 30
SETTLE_S = 0.25
PROMISED_S = 1.0


def seconds_without_a_node() -> float:
    x = torch.randn(1, 10, 768)
    began = perf_counter()
    with torch.inference_mode():
        nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768))(x)
    return perf_counter() - began


def test_edit_to_answer(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    for name in ("mlp.yaml", "quickstart.py"):
        shutil.copy(DESIRED / name, directory)
    text = (directory / "mlp.yaml").read_text()
    x = torch.randn(1, 10, 768)
    taken, alone = [], []
    with Node(directory) as node, node.client() as client:
        node.wait_phase("mlp", "Ready")
        for seed in range(1, EDITS + 1):
            before = client.compute(x, model_id="mlp")
            began = perf_counter()
            (directory / "mlp.yaml").write_text(f"{text}    seed: {seed}\n")
            while torch.equal(client.compute(x, model_id="mlp"), before):
                pass
            taken.append(perf_counter() - began)
            alone.append(SETTLE_S + seconds_without_a_node())
            node.wait_generation("mlp", seed + 1)
    median, limit = statistics.median(taken), statistics.median(alone)
    print(
        f"\nedit to first answer, {EDITS} edits: median {median:.3f} s, "
        f"min {min(taken):.3f} s, max {max(taken):.3f} s"
        f"\nsettle + the same work without a node: {limit:.3f} s; ratio {median / limit:.2f}"
    )
    assert median <= PROMISED_S
