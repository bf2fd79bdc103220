"""The shipped directory, served as the README says."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from support.node import Node

DESIRED = Path(__file__).parents[2] / "desired"


def test_the_shipped_directory_serves_both_models_and_says_what_to_type_next(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "desired"
    shutil.copytree(DESIRED, directory)
    with Node(directory) as node:
        node.wait_phase("mlp", "Ready")
        node.wait_phase("minilm", "Ready")
        with node.client() as client:
            assert client.compute(torch.randn(2, 10, 768), model_id="mlp").shape == (2, 10, 768)
            ids = torch.tensor([[101.0, 2023.0, 102.0]])
            assert client.compute(ids, model_id="minilm").shape == (1, 384)
        assert node.stop() == 0
    printed = "\n".join(node.printed)
    assert "Serving 2 of 2 models" in printed
    assert ' -c "import torch; from splitlearn_comm' in printed
