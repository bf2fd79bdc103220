"""Measures the load of this machine, for monitoring data in responses and streams.

Memory is the system's: `memory_mb` is what is not available to new programs, of which `memory_percent` is
the share. GPUs are summed, and the busiest gives the utilization. Measuring never waits: the processor's
load is the mean since the measurement before. A machine without NVIDIA's library simply has no GPU values.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

_MIB = 1024 * 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuLoad:
    """All GPUs together; utilization (percent) is that of the busiest, None where not reported."""

    utilization: float | None
    memory_used_mb: float
    memory_total_mb: float


@dataclass(frozen=True)
class LoadSnapshot:
    """The machine's load at one moment; `gpu` is None without one."""

    timestamp: float
    cpu_percent: float
    memory_mb: float
    memory_percent: float
    gpu: GpuLoad | None = None


class LoadMonitor(Protocol):
    """What the servicer asks for snapshots."""

    def snapshot(self, max_age_s: float = 0.0) -> LoadSnapshot:
        """Return the load now, or one that is at most `max_age_s` old."""


class Nvml(Protocol):
    """What is used of NVIDIA's library (`pynvml`)."""

    @property
    def NVMLError(self) -> type[Exception]: ...

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int: ...

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> NvmlMemory: ...

    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> NvmlUtilization: ...


class NvmlMemory(Protocol):
    """Bytes."""

    @property
    def used(self) -> int: ...

    @property
    def total(self) -> int: ...


class NvmlUtilization(Protocol):
    """Percent."""

    @property
    def gpu(self) -> int: ...


class SystemMonitor:
    """Reads the load from psutil and, where there is one, NVIDIA's library.

    Args:
        wall_clock: gives the seconds since the Unix epoch.
        clock: gives the time in seconds, for the age of a snapshot.
        nvml: NVIDIA's library; the installed one unless given.
    """

    def __init__(
        self,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        nvml: Nvml | None = None,
    ) -> None:
        self._wall_clock = wall_clock
        self._clock = clock
        self._read_gpus = _gpu_reader(nvml or _installed_nvml())
        self._cpu = _CpuMeter()
        self._lock = threading.Lock()
        self._last = self._measure()
        self._last_at_s = self._clock()

    def snapshot(self, max_age_s: float = 0.0) -> LoadSnapshot:
        """Return the load now, or one that is at most `max_age_s` old.

        While another thread measures, the snapshot before is returned instead of waiting for it.
        """
        if self._clock() - self._last_at_s < max_age_s or not self._lock.acquire(blocking=False):
            return self._last
        try:
            self._last = self._measure()
            self._last_at_s = self._clock()
            return self._last
        finally:
            self._lock.release()

    def _measure(self) -> LoadSnapshot:
        memory = psutil.virtual_memory()
        return LoadSnapshot(
            timestamp=self._wall_clock(),
            cpu_percent=self._cpu.percent(),
            memory_mb=(memory.total - memory.available) / _MIB,
            memory_percent=memory.percent,
            gpu=self._read_gpus(),
        )


class _CpuMeter:
    """The processor's load since it was asked before.

    psutil's own `cpu_percent` compares with the calling *thread's* last reading, which is no measure at all
    when every request comes from another thread.
    """

    def __init__(self) -> None:
        self._busy_s, self._total_s = _cpu_times()
        self._percent = 0.0

    def percent(self) -> float:
        busy_s, total_s = _cpu_times()
        passed_s = total_s - self._total_s
        if passed_s > 0:
            share = (busy_s - self._busy_s) / passed_s
            self._percent = 100 * min(1.0, max(0.0, share))
            self._busy_s, self._total_s = busy_s, total_s
        return self._percent


def _cpu_times() -> tuple[float, float]:
    times = psutil.cpu_times()._asdict()
    # Time of guests is part of user time already.
    total_s = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
    return total_s - times["idle"] - times.get("iowait", 0.0), total_s


def _installed_nvml() -> Nvml | None:
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return None
    nvml: Nvml = pynvml
    return nvml


def _gpu_reader(nvml: Nvml | None) -> Callable[[], GpuLoad | None]:
    if nvml is None:
        return lambda: None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        _log.debug("gpu_monitoring=off reason=%s", error)
        return lambda: None

    def utilization(handle: object) -> float | None:
        try:
            return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except nvml.NVMLError:
            # Some GPUs (a slice of a shared one, for instance) report memory but no utilization.
            return None

    def read() -> GpuLoad | None:
        try:
            memory = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        except nvml.NVMLError as error:
            _log.debug("gpu_monitoring=failed reason=%s", error)
            return None
        busy = [value for value in map(utilization, handles) if value is not None]
        return GpuLoad(
            utilization=max(busy, default=None),
            memory_used_mb=sum(int(m.used) for m in memory) / _MIB,
            memory_total_mb=sum(int(m.total) for m in memory) / _MIB,
        )

    return read if handles else lambda: None
