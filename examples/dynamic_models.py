"""Loads, updates and unloads a model while a client keeps calling it: no request fails.

python examples/dynamic_models.py
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import torch
from torch import nn

from splitlearn_comm import GRPCComputeClient
from splitlearn_manager import ManagedServer, ModelConfig, ServerConfig


def save(path: Path, factor: float) -> None:
    """Writes a model that multiplies by `factor`; renamed into place, as an update should be."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, factor)
    beside = path.with_suffix(".new")
    torch.save(model, beside)
    os.replace(beside, path)


def main() -> None:
    answers: list[float] = []
    stop = threading.Event()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.pt"
        save(path, 1.0)
        with ManagedServer(ServerConfig(port=0, metrics_port=0)) as server:
            server.load_model(ModelConfig(model_id="times", model_path=str(path)))

            def keep_calling() -> None:
                with GRPCComputeClient(f"127.0.0.1:{server.port}") as client:
                    while not stop.is_set():
                        answers.append(client.compute(torch.ones(1, 1), model_id="times").item())

            caller = threading.Thread(target=keep_calling)
            caller.start()
            for version in (2.0, 3.0):
                save(path, version)
                server.reload_model("times")
                while version not in answers:
                    stop.wait(0.01)
                print(f"version {version:g} answers")
            stop.set()
            caller.join()
            server.unload_model("times")
            print(
                f"{len(answers)} answers, none failed, versions in order: {answers == sorted(answers)}"
            )
            print(f"models loaded: {len(server.model_manager.list_models())}")


if __name__ == "__main__":
    main()
