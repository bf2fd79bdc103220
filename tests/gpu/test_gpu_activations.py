"""What a forward takes of a real GPU, told from two small ones: against what torch's allocator saw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.loaders.adapters import CallOptions, adapt
from splitlearn_manager.runtime.activations import measure_activations
from splitlearn_manager.runtime.warmup import first_input
from support.models import model_config
from support.real_gpu import RealGpu

MB = 2**20


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(512, 8192), nn.ReLU(), nn.Linear(8192, 512)), (1, 512)),
        (nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), (1, 3, 128, 128)),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True), 4),
            (1, 64, 256),
        ),
    ],
    ids=["mlp", "convolutions", "encoder"],
)
def test_two_small_forwards_tell_what_a_large_one_takes(
    gpu: RealGpu, module: nn.Module, shape: tuple[int, ...]
) -> None:
    function = ModelComputeFunction(adapt(module.eval(), CallOptions()), gpu.device)
    function.compute(first_input(function, shape))
    found = measure_activations(function, model_config("m.pt"), shape)
    assert found is not None
    for batch in (1, 32):
        large = first_input(function, (batch, *shape[1:]))
        function.compute(large)  # kernels that keep something for this batch have it by now
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(gpu.device)
        torch.cuda.reset_peak_memory_stats(gpu.device)
        function.compute(large)
        torch.cuda.synchronize()
        taken_mb = (torch.cuda.max_memory_allocated(gpu.device) - before) / MB
        # Which algorithm a convolution takes, and what it needs for itself, is cuDNN's choice for each batch.
        assert found.mb(batch) == pytest.approx(taken_mb, rel=0.25, abs=1.0), (batch, taken_mb)
    function.teardown()
    del function, module
    gpu.tidy()
