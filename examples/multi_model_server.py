"""Serves three models on one port, two of them behind one endpoint, and calls them.

python examples/multi_model_server.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from splitlearn_comm import GRPCComputeClient
from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig


def main() -> None:
    # Port 0 lets the system choose one that is free.
    config = ServerConfig(port=0, metrics_port=0)
    with tempfile.TemporaryDirectory() as folder, ManagedServer(config) as server:
        for number, model_id in enumerate(["model_a", "model_b", "model_c"], start=1):
            path = Path(folder) / f"{model_id}.pt"
            model = nn.Linear(4, 4, bias=False)
            nn.init.constant_(model.weight, float(number))
            torch.save(model, path)
            endpoint = "shared" if model_id != "model_c" else None
            server.load_model(
                ModelConfig(model_id=model_id, model_path=str(path), endpoint=endpoint)
            )

        with GRPCComputeClient(f"127.0.0.1:{server.port}") as client:
            x = torch.ones(1, 4)
            for name in ["model_a", "model_b", "model_c", "shared", "shared"]:
                print(f"{name}: {client.compute(x, model_id=name)[0].tolist()}")


if __name__ == "__main__":
    main()
