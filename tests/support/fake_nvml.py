"""An NVML module made of plain data: GPUs with memory, which can be made to fail.

    nvml = FakeNvml(FakeGpu(total_mb=1000, used_mb=250), FakeGpu(total_mb=2000))
    ResourceManager(nvml=nvml, torch_has_cuda=lambda: True, environ={})

Change a `FakeGpu` to change what the next reading says.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

BYTES_PER_MB = 2**20


class FakeNvmlError(Exception):
    """What a driver says when it cannot answer."""


@dataclass
class FakeGpu:
    """One GPU. Memory in MB (2**20 bytes).

    Attributes:
        uuid: left empty, it is `GPU-` and eight times the GPU's position.
        fails: reading its memory raises.
        measures_use: it knows its utilization; a slice does not.
    """

    total_mb: float = 1024.0
    used_mb: float = 0.0
    name: str = "Fake GPU"
    uuid: str = ""
    utilization_percent: int = 0
    fails: bool = False
    measures_use: bool = True


class FakeNvml:
    """Stands in for the module `pynvml`; a handle is the `FakeGpu` itself.

    Args:
        gpus: the machine's GPUs, in the driver's order.
        slices: MIG slices, found by their UUIDs alone.
        fails_to_start: there is no driver.
    """

    NVMLError = FakeNvmlError

    def __init__(
        self, *gpus: FakeGpu, slices: tuple[FakeGpu, ...] = (), fails_to_start: bool = False
    ) -> None:
        self.gpus = gpus
        self.slices = slices
        self.fails_to_start = fails_to_start
        self.starts = 0
        for position, gpu in enumerate(gpus):
            gpu.uuid = gpu.uuid or f"GPU-{str(position) * 8}"

    def nvmlInit(self) -> None:
        self.starts += 1
        if self.fails_to_start:
            raise FakeNvmlError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        for gpu in (*self.gpus, *self.slices):
            if gpu.uuid == uuid:
                return gpu
        raise FakeNvmlError("not found")

    def nvmlDeviceGetUUID(self, handle: object) -> str:
        return _gpu(handle).uuid

    def nvmlDeviceGetName(self, handle: object) -> str:
        return _gpu(handle).name

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
        gpu = _gpu(handle)
        if gpu.fails:
            raise FakeNvmlError("GPU is lost")
        return SimpleNamespace(
            total=int(gpu.total_mb * BYTES_PER_MB),
            used=int(gpu.used_mb * BYTES_PER_MB),
            free=int((gpu.total_mb - gpu.used_mb) * BYTES_PER_MB),
        )

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> SimpleNamespace:
        gpu = _gpu(handle)
        if not gpu.measures_use:
            raise FakeNvmlError("not supported")
        return SimpleNamespace(gpu=gpu.utilization_percent)


def _gpu(handle: object) -> FakeGpu:
    assert isinstance(handle, FakeGpu)
    return handle
