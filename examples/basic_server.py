"""Saves a small model and serves it, until Ctrl-C.

    python examples/basic_server.py [--port 50051] [--metrics-port 8000]

Then, in a second terminal: python examples/client.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--metrics-port", type=int, default=8000)
    arguments = parser.parse_args()

    model = nn.Sequential(nn.Linear(768, 1024), nn.ReLU(), nn.Linear(1024, 768))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model, path)

        config = ServerConfig(port=arguments.port, metrics_port=arguments.metrics_port)
        with ManagedServer(config) as server:
            server.load_model(ModelConfig(model_id="my_model", model_path=str(path), device="cpu"))
            print(f"serving my_model on 127.0.0.1:{server.port}", flush=True)
            try:
                server.wait_for_termination()
            except KeyboardInterrupt:
                print("stopping")


if __name__ == "__main__":
    main()
