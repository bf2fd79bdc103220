"""The first GPU of this machine, as the driver and torch see it, and models of known sizes for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pynvml
import torch
from torch import nn

from splitlearn_manager.core.model_manager import ModelManager

Managers = Callable[..., ModelManager]
Weights = Callable[[float], Path]

WIDTH = 2048
LAYER_MB = WIDTH * WIDTH * 4 / 2**20
"""MB (2**20 bytes) of one layer of `save_layers`."""

_MB = 2**20


def why_no_gpu() -> str | None:
    """Why nothing can be tested on a GPU here; None if it can. Makes no CUDA context."""
    if torch.version.cuda is None:
        return "the installed torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        pynvml.nvmlInit()
        return None if pynvml.nvmlDeviceGetCount() else "the driver knows no GPU"
    except pynvml.NVMLError as error:
        return f"the driver cannot be asked: {error}"


class RealGpu:
    """`cuda:0`. Memory in MB (2**20 bytes)."""

    device = "cuda:0"

    def __init__(self) -> None:
        # The context, and what the first product and the first convolution keep, are taken now.
        x = torch.ones(64, 64, device=self.device)
        float((x @ x).sum())
        self.uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)

    @property
    def total_mb(self) -> float:
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle).total / _MB

    @property
    def used_mb(self) -> float:
        """Of all processes, as the driver says."""
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / _MB

    @property
    def torch_mb(self) -> float:
        """Of this process's tensors, as torch's allocator counts them."""
        return torch.cuda.memory_allocated(self.device) / _MB

    @property
    def torch_peak_mb(self) -> float:
        """The most that `torch_mb` was since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self.device) / _MB

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def fill(self, *, leaving_mb: float) -> torch.Tensor:
        """Takes all but so much of what is free; given back once the tensor is dropped and `tidy` called."""
        free_mb = pynvml.nvmlDeviceGetMemoryInfo(self._handle).free / _MB
        return torch.empty(int((free_mb - leaving_mb) * _MB), dtype=torch.uint8, device=self.device)

    def tidy(self) -> None:
        """Gives the driver back what no tensor uses."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def save_layers(path: Path, mb: float, seed: int = 0) -> Path:
    """A checkpoint of linear layers, `mb` of weights in all (a multiple of LAYER_MB)."""
    torch.manual_seed(seed)
    module = nn.Sequential()
    for _ in range(round(mb / LAYER_MB)):
        layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta").to_empty(device="cpu")
        # So that what comes out of many layers is of the size of what goes in.
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
        module.append(layer)
    torch.save(module, path)
    return path
