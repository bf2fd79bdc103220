"""The NVIDIA GPUs that torch can use, under the numbers that torch gives them, and their memory.

Read through the driver's management library (NVML), so torch need not be imported and no CUDA
context is made, which would cost hundreds of MB. A GPU counts only if the installed torch is built
with CUDA and CUDA_VISIBLE_DEVICES lets it through; the N-th of these is `cuda:N`.

Nothing here raises: no driver means no GPUs, and a GPU that cannot be read is left out for as long
as that lasts. `absence` and `problems` say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from splitlearn_manager.core.host_memory import BYTES_PER_MB

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """One GPU at one moment. Memory in MB (2**20 bytes), of all processes.

    Attributes:
        index: N of `cuda:N`.
        utilization_percent: of the time a kernel ran; None where the driver does not say.
    """

    index: int
    name: str
    uuid: str
    total_mb: float
    used_mb: float
    free_mb: float
    utilization_percent: float | None

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


class NvmlMemory(Protocol):
    """What NVML says of a device's memory, in bytes."""

    @property
    def total(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def free(self) -> int: ...


class NvmlRates(Protocol):
    """What NVML says of a device's use, in percent."""

    @property
    def gpu(self) -> int: ...


class Nvml(Protocol):
    """The part of the module `pynvml` that is used here. A handle is opaque."""

    @property
    def NVMLError(self) -> type[Exception]: ...

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> NvmlMemory: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> NvmlRates: ...


@dataclass(frozen=True, slots=True)
class _Gpu:
    index: int
    handle: object
    uuid: str
    name: str

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"


def torch_built_with_cuda() -> bool:
    """Whether the installed torch has its CUDA library; torch is looked for, never imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def visible(setting: str | None, uuids: Sequence[str]) -> tuple[int | str, ...]:
    """Which GPUs CUDA shows for a value of CUDA_VISIBLE_DEVICES, in CUDA's order.

    Args:
        setting: the variable's value; None when it is not set.
        uuids: `GPU-…` of every GPU of the machine, in NVML's order.

    Returns:
        Positions in `uuids`, or the UUID of a slice (`MIG-…`) as it was given.

    As CUDA does: the first entry that names no GPU hides itself and all after it, a GPU named twice
    hides everything, and a UUID may be shortened as long as one GPU alone has that beginning.
    """
    if setting is None:
        return tuple(range(len(uuids)))
    chosen: list[int | str] = []
    for entry in (part.strip() for part in setting.split(",")):
        found = _named(entry, uuids)
        if found is None:
            break
        if found in chosen:
            return ()
        chosen.append(found)
    return tuple(chosen)


def _named(entry: str, uuids: Sequence[str]) -> int | str | None:
    if entry.startswith("MIG-"):
        return entry
    if entry.startswith("GPU-"):
        matching = [position for position, uuid in enumerate(uuids) if uuid.startswith(entry)]
        return matching[0] if len(matching) == 1 else None
    # Like C's strtoul, which CUDA's reading resembles: digits count, what follows them does not.
    number = re.match(r"\+?(\d+)", entry)
    position = int(number[1]) if number else -1
    return position if 0 <= position < len(uuids) else None


class GpuReader:
    """Finds the GPUs once, when first asked, and reads their memory at each call.

    Args:
        nvml: the module to ask; None for `pynvml`.
        environ: where CUDA_VISIBLE_DEVICES is looked up; None for the process's environment.
        torch_has_cuda: whether the installed torch can use a GPU at all.
    """

    def __init__(
        self,
        nvml: Nvml | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        torch_has_cuda: Callable[[], bool] = torch_built_with_cuda,
    ) -> None:
        self._given = nvml
        self._environ = os.environ if environ is None else environ
        self._torch_has_cuda = torch_has_cuda
        self._lock = threading.Lock()
        self._gpus: tuple[_Gpu, ...] | None = None
        self._absence = ""
        self._totals_mb: dict[str, float] = {}
        self._unreadable: dict[str, str] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """`cuda:N` of every GPU, also of one that cannot be read at the moment."""
        return tuple(gpu.device for gpu in self._found())

    @property
    def absence(self) -> str:
        """Why no GPU is used; empty if one is."""
        self._found()
        return self._absence

    @property
    def totals_mb(self) -> Mapping[str, float]:
        """What each GPU has, by device; without those that could never be read."""
        self.read()
        return dict(self._totals_mb)

    def read(self) -> tuple[GpuUsage, ...]:
        """The memory of every GPU that can be read."""
        readings = (self._read(gpu) for gpu in self._found())
        return tuple(reading for reading in readings if reading is not None)

    def problems(self) -> tuple[str, ...]:
        """One sentence for each thing that keeps the numbers from being right."""
        self.read()
        problems = [
            f"{device} cannot be read: {why}" for device, why in sorted(self._unreadable.items())
        ]
        names = sorted({gpu.name for gpu in self._found()})
        by_number = not self._environ.get("CUDA_VISIBLE_DEVICES", "0").startswith(("GPU-", "MIG-"))
        if len(names) > 1 and by_number and self._environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            problems.append(
                f"the GPUs differ ({', '.join(names)}), and CUDA may number them otherwise than "
                "the driver does; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )
        return tuple(problems)

    def _found(self) -> tuple[_Gpu, ...]:
        with self._lock:
            if self._gpus is None:
                self._gpus, self._absence = self._find()
                if self._absence:
                    logger.debug("no GPU is used: %s", self._absence)
            return self._gpus

    def _find(self) -> tuple[tuple[_Gpu, ...], str]:
        """The GPUs, or why there are none."""
        if not self._torch_has_cuda():
            return (), "the installed torch is built without CUDA"
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
            shown = visible(self._environ.get("CUDA_VISIBLE_DEVICES"), uuids)
            gpus = []
            for index, which in enumerate(shown):
                if isinstance(which, str):
                    handle, uuid = nvml.nvmlDeviceGetHandleByUUID(which), which
                else:
                    handle, uuid = handles[which], uuids[which]
                gpus.append(_Gpu(index, handle, uuid, nvml.nvmlDeviceGetName(handle)))
        except nvml.NVMLError as error:
            return (), f"the NVIDIA driver cannot be asked: {error}"
        if handles and not gpus:
            return (), "CUDA_VISIBLE_DEVICES hides every GPU"
        return tuple(gpus), "" if gpus else "the NVIDIA driver knows no GPU"

    def _read(self, gpu: _Gpu) -> GpuUsage | None:
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
        except self._nvml.NVMLError as error:
            if gpu.device not in self._unreadable:
                logger.warning("device=%s its memory cannot be read: %s", gpu.device, error)
            self._unreadable[gpu.device] = str(error)
            return None
        if self._unreadable.pop(gpu.device, None) is not None:
            logger.info("device=%s its memory can be read again", gpu.device)
        total_mb = memory.total / BYTES_PER_MB
        self._totals_mb[gpu.device] = total_mb
        return GpuUsage(
            index=gpu.index,
            name=gpu.name,
            uuid=gpu.uuid,
            total_mb=total_mb,
            used_mb=memory.used / BYTES_PER_MB,
            free_mb=memory.free / BYTES_PER_MB,
            utilization_percent=self._utilization(gpu),
        )

    def _utilization(self, gpu: _Gpu) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(gpu.handle).gpu)
        except self._nvml.NVMLError:
            return None  # slices and some older GPUs do not measure it

    @property
    def _nvml(self) -> Nvml:
        return self._given or cast("Nvml", importlib.import_module("pynvml"))
