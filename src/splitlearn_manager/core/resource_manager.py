"""What this machine has, what is used of it, and how much of it models may reserve.

Measures CPU, memory and GPUs, and turns limits into a budget for each device: `memory_quota_mb` of
the device where it is set, else `max_memory_percent` of what the device has. The reservations
against these budgets are the ledger's; nothing here reserves, loads or unloads.

Never imports torch, never blocks, and makes no CUDA context. A `ResourceManager` may be used from
any thread. MB are 2**20 bytes throughout.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import psutil

from splitlearn_manager.core.clock import Clock, SystemClock
from splitlearn_manager.core.gpus import GpuReader, GpuUsage, Nvml, torch_built_with_cuda
from splitlearn_manager.core.host_memory import (
    BYTES_PER_MB,
    HostMemory,
    MemoryLimit,
    host_memory,
    memory_limits,
    memory_stall,
)
from splitlearn_manager.core.others_use import Reading
from splitlearn_manager.errors import ConfigError

__all__ = ["GpuUsage", "ResourceManager", "ResourceUsage", "budget_device"]

logger = logging.getLogger(__name__)

# A busier caller than this gets the last value again: over less time the figure means little.
_CPU_WINDOW_S = 0.1


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """Use of the machine at one moment.

    Attributes:
        cpu_percent: of all cores, 0 to 100, since the measurement before.
        memory_mb: used by the machine, or by the container that limits this process.
        memory_percent: the same, of what may be used.
        process_memory_mb: resident memory of this process, without its workers.
        gpu: the GPUs that torch can use and that can be read.
    """

    cpu_percent: float
    memory_mb: float
    memory_percent: float
    process_memory_mb: float
    gpu: tuple[GpuUsage, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the machine models may reserve.

    Attributes:
        max_memory_percent: of each device without a quota, above 0 and at most 100.
        memory_quota_mb: MB by device, as it was written.
    """

    max_memory_percent: float
    memory_quota_mb: Mapping[str, float]

    def __post_init__(self) -> None:
        if not 0 < self.max_memory_percent <= 100:
            raise ConfigError(
                "max_memory_percent: expected more than 0 and at most 100, "
                f"got {self.max_memory_percent}"
            )
        for device, mb in self.memory_quota_mb.items():
            if not 0 <= mb < float("inf"):
                raise ConfigError(f"memory_quota_mb: {device}: expected MB, 0 or more, got {mb}")

    def quotas_mb(self) -> dict[str, float]:
        """The quotas by the device they are charged to; of two for one device, the smaller."""
        quotas: dict[str, float] = {}
        for written, mb in self.memory_quota_mb.items():
            device = budget_device(written)
            quotas[device] = min(mb, quotas.get(device, mb))
        return quotas

    def budget_mb(self, device: str, total_mb: float) -> float:
        """What may be reserved on `device`, which has `total_mb`."""
        return self.quotas_mb().get(device, total_mb * self.max_memory_percent / 100)


def budget_device(device: str) -> str:
    """The device whose budget a model on `device` is charged to: `cpu` or `cuda:N`.

    `mps` shares the machine's memory, so it is charged to `cpu`; `cuda` alone is `cuda:0`.
    Raises ConfigError for anything else.
    """
    if device in ("cpu", "mps"):
        return "cpu"
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or mps, got {device!r}")
    return f"cuda:{int(match[1] or 0)}"


class _CpuMeter:
    """Use of all cores between two looks.

    psutil's own `cpu_percent` keeps its last look for each thread apart, and so says 0 to every
    thread that is new; here all threads share one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = clock.now()
        self._busy_s, self._total_s = _cpu_seconds()
        self._percent = 0.0

    def percent(self) -> float:
        with self._lock:
            now = self._clock.now()
            if now - self._looked_s < _CPU_WINDOW_S:
                return self._percent
            busy, total = _cpu_seconds()
            if total > self._total_s:
                share = (busy - self._busy_s) / (total - self._total_s)
                self._percent = round(100 * max(0.0, min(1.0, share)), 1)
            self._looked_s, self._busy_s, self._total_s = now, busy, total
            return self._percent


def _cpu_seconds() -> tuple[float, float]:
    """Seconds that all cores together were busy, and in all."""
    times = psutil.cpu_times()
    # Linux counts the time of guests in `user` and `nice` too.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


class ResourceManager:
    """Measures this machine and budgets its memory.

    Args:
        max_memory_percent: share of a device's memory that models may reserve, 0 to 100.
        memory_quota_mb: MB for single devices instead of that share, by `cpu`, `cuda:N`, `mps`.
        nvml: stands in for the module `pynvml` (for tests).
        environ: stands in for the process's environment (for tests).
        torch_has_cuda: stands in for a look at the installed torch (for tests).
        memory_limits: stands in for the limits that the process stands under (for tests).
        clock: stands in for the machine's clock (for tests).

    Raises:
        ConfigError: a limit that makes no sense; the message names its key.
    """

    def __init__(
        self,
        max_memory_percent: float = 80,
        memory_quota_mb: Mapping[str, float] | None = None,
        nvml: Nvml | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        torch_has_cuda: Callable[[], bool] = torch_built_with_cuda,
        memory_limits: Callable[[], tuple[MemoryLimit, ...]] = memory_limits,
        clock: Clock | None = None,
    ) -> None:
        self._limits = Limits(max_memory_percent, dict(memory_quota_mb or {}))
        self._limits.quotas_mb()
        self._gpus = GpuReader(nvml, environ=environ, torch_has_cuda=torch_has_cuda)
        self._memory_limits = memory_limits
        self._cpu = _CpuMeter(clock or SystemClock())
        self._process = psutil.Process()

    @property
    def max_memory_percent(self) -> float:
        return self._limits.max_memory_percent

    def configure(self, max_memory_percent: float, memory_quota_mb: Mapping[str, float]) -> None:
        """Sets new limits, from the next call on. Raises ConfigError, with the old ones kept."""
        limits = Limits(max_memory_percent, dict(memory_quota_mb))
        limits.quotas_mb()
        self._limits = limits

    # What is used.

    def get_current_usage(self) -> ResourceUsage:
        """The use of CPU, memory and GPUs now."""
        memory = self._memory()
        return ResourceUsage(
            cpu_percent=self._cpu.percent(),
            memory_mb=memory.used_mb,
            memory_percent=memory.percent,
            process_memory_mb=self._process.memory_info().rss / BYTES_PER_MB,
            gpu=self._gpus.read(),
        )

    def get_gpu_info(self) -> list[dict[str, object]]:
        """The GPUs: device, index, name, uuid, total_mb, used_mb, free_mb, utilization_percent."""
        return [{"device": gpu.device, **asdict(gpu)} for gpu in self._gpus.read()]

    def log_resource_usage(self) -> None:
        """Logs one line at INFO."""
        usage = self.get_current_usage()
        gpus = "".join(
            f" {gpu.device}_used_mb={gpu.used_mb:.0f} {gpu.device}_total_mb={gpu.total_mb:.0f}"
            for gpu in usage.gpu
        )
        logger.info(
            "resources cpu_percent=%.1f memory_mb=%.0f memory_percent=%.1f "
            "process_memory_mb=%.0f%s",
            usage.cpu_percent,
            usage.memory_mb,
            usage.memory_percent,
            usage.process_memory_mb,
            gpus,
        )

    # What is left.

    def check_available_resources(
        self, required_memory_mb: float = 0, required_gpu: bool = False
    ) -> bool:
        """Whether the CPU, or with `required_gpu` some GPU, has `required_memory_mb` left.

        Left is what is free now, up to the device's limit: its quota, or the part of
        `max_memory_percent` that all processes together have not used yet.
        """
        limits = self._limits
        if not required_gpu:
            memory = self._memory()
            left = _left_mb(limits, "cpu", memory.total_mb, memory.free_mb)
            return left >= required_memory_mb
        return any(
            _left_mb(limits, gpu.device, gpu.total_mb, gpu.free_mb) >= required_memory_mb
            for gpu in self._gpus.read()
        )

    def find_best_device(self, prefer_gpu: bool = True, min_free_memory_mb: float = 0) -> str:
        """`cuda:N` of the GPU with most free memory, if it has `min_free_memory_mb`; else `cpu`."""
        gpus = self._gpus.read() if prefer_gpu else ()
        best = max(gpus, key=lambda gpu: gpu.free_mb, default=None)
        return best.device if best and best.free_mb >= min_free_memory_mb else "cpu"

    def readings(self) -> dict[str, Reading]:
        """Each device as it is now, without what cannot be read: `cpu`, `cuda:0`, …"""
        memory = self._memory()
        found = {"cpu": Reading(memory.total_mb, memory.used_mb, memory_stall())}
        for gpu in self._gpus.read():
            found[gpu.device] = Reading(gpu.total_mb, gpu.total_mb - gpu.free_mb)
        return found

    # What may be reserved.

    def budgets_mb(self) -> dict[str, float]:
        """MB that models may reserve on each device of this machine: `cpu`, `cuda:0`, …

        A GPU that could never be read has a budget only if it has a quota.
        """
        limits, quotas = self._limits, self._limits.quotas_mb()
        budgets = {"cpu": limits.budget_mb("cpu", self._memory().total_mb)}
        totals_mb = self._gpus.totals_mb
        for device in self._gpus.devices:
            if device in totals_mb or device in quotas:
                budgets[device] = limits.budget_mb(device, totals_mb.get(device, 0.0))
        return budgets

    def budget_problems(self) -> tuple[str, ...]:
        """One sentence for each limit that cannot mean what it says; none of them is an error."""
        limits, problems = self._limits, []
        totals_mb = {"cpu": self._memory().total_mb, **self._gpus.totals_mb}
        devices = ("cpu", *self._gpus.devices)
        charged: dict[str, str] = {}
        for written, mb in limits.memory_quota_mb.items():
            device = budget_device(written)
            if device not in devices:
                absence = self._gpus.absence
                problems.append(
                    f"memory_quota_mb: {written} is no device of this machine, which has "
                    f"{', '.join(devices)}; its quota has no effect"
                    + (f" ({absence})" if absence else "")
                )
            elif device in totals_mb and mb > totals_mb[device]:
                problems.append(
                    f"memory_quota_mb: {written}: {mb:,.0f} MB is more than the "
                    f"{totals_mb[device]:,.0f} MB that {device} has"
                )
            if device in charged:
                problems.append(
                    f"memory_quota_mb: {charged[device]} and {written} are both quotas of "
                    f"{device}; the smaller counts"
                )
            charged[device] = written
        return (*problems, *self._gpus.problems())

    def _memory(self) -> HostMemory:
        memory = psutil.virtual_memory()
        return host_memory(memory.total, memory.available, self._memory_limits())


def _left_mb(limits: Limits, device: str, total_mb: float, free_mb: float) -> float:
    """MB that may still be taken of a device; below 0 when its share is exceeded already."""
    quota_mb = limits.quotas_mb().get(device)
    if quota_mb is not None:
        return min(free_mb, quota_mb)
    used_mb = total_mb - free_mb
    return min(free_mb, limits.budget_mb(device, total_mb) - used_mb)
