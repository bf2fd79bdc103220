"""Optimized models on a real node: in a thread and in a process, told in status, trained, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_comm import GRPCComputeClient
from support.models import save_mlp
from support.node import Node
from support.optimizable import needs_compiler
from support.served import declare, impatient
from support.waiting import eventually

CONFIG = {"input_shape": [-1, 8]}


@needs_compiler
def test_a_compiled_model_in_a_process_is_served_trained_and_brought_back_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    directory = tmp_path / "desired"
    directory.mkdir()
    original = save_mlp(tmp_path / "m.pt")
    keys = {
        "model_path": str(tmp_path / "m.pt"),
        "trusted": True,
        "batch_size": 4,
        "config": CONFIG,
    }
    declare(directory, "compiled", optimize="compile", runtime="process", **keys)
    declare(directory, "frozen", optimize="freeze", **keys)
    # The compiler's own headers need not be compiled once more.
    compiled.mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "compiled").symlink_to(compiled)
    with Node(directory, {"state_dir": str(tmp_path / "state")}) as node:
        frozen = node.wait_phase("frozen", "Ready", 90)
        assert "optimize: freeze in " in str(frozen)
        assert "optimize: compile in " in str(node.wait_phase("compiled", "Ready", 150))
        kept = set((node.state_dir / "compiled").rglob("*.so"))
        assert kept
        x = torch.rand(3, 8)
        with impatient(node) as client:
            for model_id in ("compiled", "frozen"):
                answer = client.compute(x, model_id=model_id)
                assert torch.allclose(answer, original(x), atol=1e-5)
                trained = _step(client, model_id, x)
                after = client.compute(x, model_id=model_id)
                assert torch.allclose(after, trained(x), atol=1e-5)
                assert not torch.allclose(after, answer, atol=1e-3)
                eventually(
                    lambda m=model_id: "not optimized any more" in str(node.status(m)),
                    "the note is there",
                    30,
                )
        # Another version of the file's text: it is loaded anew, optimized as before, from the cache.
        declare(directory, "compiled", optimize="compile", optimize_tolerance=0.01, **keys)
        eventually(
            lambda: "(0.01 allowed)" in str(node.status("compiled")), "the new one serves", 90
        )
        assert set((node.state_dir / "compiled").rglob("*.so")) == kept


def _step(client: GRPCComputeClient, model_id: str, x: torch.Tensor) -> torch.nn.Module:
    """One step of the served model, and of a copy, which is returned."""
    from support.models import mlp

    module = mlp()
    module(x).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    output, _, _ = client.compute_with_cache(
        x, model_id=model_id, training_mode=True, forward_id=f"f-{model_id}"
    )
    client.compute_backward(
        torch.ones_like(output), f"f-{model_id}", model_id=model_id, learning_rate=0.1
    )
    return module


def test_what_cannot_be_optimized_is_refused_by_name_and_served_with_auto(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "choosy.py").write_text(
        "import torch\n\nclass Choosy(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x + 1 if bool(x.sum() > 0) else x\n\ndef build():\n    return Choosy()\n"
    )
    declare(directory, "m", model_path="choosy:build", optimize="freeze", config=CONFIG)
    with Node(directory, environment={"CXX": "no-such-compiler"}) as node:
        refused = node.wait_phase("m", "Failed", 60)
        assert refused["reason"] == "FreezeFailed"
        declare(directory, "m", model_path="choosy:build", optimize="auto", config=CONFIG)
        served = str(node.wait_phase("m", "Ready", 60))
        assert "auto took " in served
        assert "freeze not: FreezeFailed" in served
        assert "compile not: NoCompiler" in served
        with impatient(node) as client:
            assert torch.equal(client.compute(torch.ones(2, 8), model_id="m"), 2 * torch.ones(2, 8))


WIDE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 256)).eval()
"""


def test_a_frozen_model_answers_batches_of_all_sizes_as_the_plain_one(tmp_path: Path) -> None:
    """Its layers are large enough to be packed; whether they are is for the clock to say."""
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "wide.py").write_text(WIDE)
    namespace: dict[str, Any] = {}
    exec(WIDE, namespace)
    plain = namespace["build"]()
    config = {"input_shape": [-1, 3, 10, 10]}
    for model_id, runtime in (("in-thread", "thread"), ("in-process", "process")):
        declare(
            directory,
            model_id,
            model_path="wide:build",
            optimize="freeze",
            runtime=runtime,
            batch_size=16,
            config=config,
        )
    with Node(directory) as node:
        for model_id in ("in-thread", "in-process"):
            assert "optimize: freeze in " in str(node.wait_phase(model_id, "Ready", 90))
        inputs = [torch.randn(rows, 3, 10, 10) for rows in (1, 2, 3, 5, 8, 13, 16, 1)]
        with impatient(node) as client:
            for model_id in ("in-thread", "in-process"):
                answers = client.compute_many(inputs, model_id=model_id)
                for x, answer in zip(inputs, answers, strict=True):
                    assert torch.allclose(answer, plain(x), atol=1e-5)
