"""The machine's load, measured without waiting, with GPUs and without."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import psutil
import pytest

from splitlearn_comm.server import GpuLoad, SystemMonitor
from splitlearn_comm.server.messages import snapshot_message

MIB = 2**20


class NvmlFailure(Exception):
    pass


class Nvml:
    """NVIDIA's library over plain numbers: (used, total, utilization or None) for each GPU."""

    NVMLError = NvmlFailure

    def __init__(self, *gpus: tuple[int, int, int | None], starts: bool = True) -> None:
        self.gpus = gpus
        self.starts = starts
        self.answers = True

    def nvmlInit(self) -> None:
        if not self.starts:
            raise NvmlFailure("no driver")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self.gpus[index]

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int, int | None]) -> object:
        if not self.answers:
            raise NvmlFailure("gpu is lost")
        return SimpleNamespace(used=handle[0] * MIB, total=handle[1] * MIB)

    def nvmlDeviceGetUtilizationRates(self, handle: tuple[int, int, int | None]) -> object:
        if handle[2] is None:
            raise NvmlFailure("not supported")
        return SimpleNamespace(gpu=handle[2])


def test_memory_is_the_systems() -> None:
    snapshot = SystemMonitor(nvml=Nvml()).snapshot()
    total_mb = psutil.virtual_memory().total / MIB
    assert 0 < snapshot.memory_mb < total_mb
    assert snapshot.memory_percent == pytest.approx(100 * snapshot.memory_mb / total_mb, abs=0.1)


def test_processor_load_is_the_share_of_busy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"user": 10.0, "system": 5.0, "idle": 80.0, "iowait": 5.0, "guest": 2.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(times)))
    monitor = SystemMonitor(nvml=Nvml())
    times.update(user=13.0, idle=86.0, iowait=6.0)
    assert monitor.snapshot().cpu_percent == pytest.approx(30.0)
    # No time has passed: the last value holds.
    assert monitor.snapshot().cpu_percent == pytest.approx(30.0)
    times.update(idle=96.0)
    assert monitor.snapshot().cpu_percent == 0.0


def test_processor_load_does_not_depend_on_the_thread_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"user": 0.0, "idle": 0.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(times)))
    monitor = SystemMonitor(nvml=Nvml())
    seen: list[float] = []
    for _ in range(3):
        times["user"] += 1.0
        times["idle"] += 1.0
        asking = threading.Thread(target=lambda: seen.append(monitor.snapshot().cpu_percent))
        asking.start()
        asking.join(60)
    assert seen == [50.0, 50.0, 50.0]


def test_snapshot_is_reused_while_it_is_young_enough() -> None:
    now = [0.0]
    monitor = SystemMonitor(wall_clock=lambda: now[0], clock=lambda: now[0], nvml=Nvml())
    first = monitor.snapshot()
    now[0] = 0.5
    assert monitor.snapshot(max_age_s=1.0) is first
    assert monitor.snapshot().timestamp == 0.5
    now[0] = 1.6
    assert monitor.snapshot(max_age_s=1.0).timestamp == 1.6


def test_nobody_waits_for_a_measurement_that_hangs() -> None:
    began, go_on = threading.Event(), threading.Event()
    slow = [False]

    def wall_clock() -> float:
        if slow[0]:
            began.set()
            assert go_on.wait(60)
        return 0.0

    monitor = SystemMonitor(wall_clock=wall_clock, nvml=Nvml())
    before = monitor.snapshot()
    slow[0] = True
    hanging = threading.Thread(target=monitor.snapshot)
    hanging.start()
    assert began.wait(60)
    assert monitor.snapshot() is before
    go_on.set()
    hanging.join(60)


def test_gpus_are_summed_and_the_busiest_counts() -> None:
    nvml = Nvml((100, 1000, 20), (300, 2000, 70), (1, 10, None))
    assert SystemMonitor(nvml=nvml).snapshot().gpu == GpuLoad(70.0, 401.0, 3010.0)


@pytest.mark.parametrize(
    "nvml", [Nvml(), Nvml((1, 2, 3), starts=False)], ids=["no gpu", "no driver"]
)
def test_machine_without_gpus_has_no_gpu_values(nvml: Nvml) -> None:
    message = snapshot_message(SystemMonitor(nvml=nvml).snapshot())
    assert not message.gpu_available
    for field in ("gpu_utilization", "gpu_memory_used_mb", "gpu_memory_total_mb"):
        assert not message.HasField(field)


def test_gpu_that_is_lost_later_does_not_break_the_rest() -> None:
    nvml = Nvml((1, 2, 3))
    monitor = SystemMonitor(nvml=nvml)
    assert monitor.snapshot().gpu is not None
    nvml.answers = False
    assert monitor.snapshot().gpu is None


def test_gpu_values_are_on_the_wire_where_they_exist() -> None:
    message = snapshot_message(SystemMonitor(nvml=Nvml((1, 2, None))).snapshot())
    assert message.gpu_available
    assert (message.gpu_memory_used_mb, message.gpu_memory_total_mb) == (1.0, 2.0)
    assert not message.HasField("gpu_utilization")
