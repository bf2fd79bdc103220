"""What the tests on a real GPU share; without one they are all skipped, and say why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.resource_manager import ResourceManager
from support.real_gpu import Managers, RealGpu, Weights, save_layers, why_no_gpu


@pytest.fixture(scope="session")
def gpu() -> RealGpu:
    """The GPU, whose context exists by now."""
    if (reason := why_no_gpu()) is not None:
        pytest.skip(reason)
    return RealGpu()


@pytest.fixture(scope="session")
def weights(gpu: RealGpu, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Gives the file of a model of so many MB."""
    directory = tmp_path_factory.mktemp("weights")

    def file(mb: float) -> Path:
        path = directory / f"{mb:g}.pt"
        return path if path.exists() else save_layers(path, mb)

    return file


@pytest.fixture
def manager_with(gpu: RealGpu) -> Iterator[Managers]:
    """Makes managers with these quotas, in MB by device, and 80 % where there is none."""
    made: list[ModelManager] = []

    def make(quotas_mb: Mapping[str, float] | None = None, max_models: int = 10) -> ModelManager:
        resources = ResourceManager(80, quotas_mb)
        made.append(ModelManager(max_models=max_models, resources=resources))
        return made[-1]

    yield make
    for manager in made:
        for model in manager.list_models():
            if model["state"] == "READY":
                manager.unload_model(str(model["model_id"]))
        manager.shutdown(5.0)
    gpu.tidy()
