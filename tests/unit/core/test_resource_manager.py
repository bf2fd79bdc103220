"""Measuring the machine, and the budgets that follow from it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pynvml
import pytest

from splitlearn_manager.core.gpus import Nvml, torch_built_with_cuda, visible
from splitlearn_manager.core.host_memory import (
    MemoryLimit,
    cgroup_limits,
    host_memory,
    memory_stall,
)
from splitlearn_manager.core.resource_manager import ResourceManager, budget_device
from splitlearn_manager.errors import ConfigError
from support.fake_nvml import FakeGpu, FakeNvml

MB = 2**20
PHYSICAL_MB = psutil.virtual_memory().total / MB
UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333")


class SteppingClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.now_s


def manager(
    *gpus: FakeGpu,
    percent: float = 80,
    quotas: dict[str, float] | None = None,
    environ: dict[str, str] | None = None,
    limits: tuple[MemoryLimit, ...] = (),
) -> ResourceManager:
    return ResourceManager(
        percent,
        quotas,
        FakeNvml(*gpus),
        environ=environ or {},
        torch_has_cuda=lambda: True,
        memory_limits=lambda: limits,
    )


# What is used.


def test_usage_measures_this_very_machine() -> None:
    usage = ResourceManager().get_current_usage()

    assert 0 <= usage.cpu_percent <= 100
    assert 0 < usage.memory_mb <= PHYSICAL_MB
    assert 0 < usage.memory_percent <= 100
    assert usage.process_memory_mb == pytest.approx(
        psutil.Process().memory_info().rss / MB, rel=0.2
    )


def test_usage_shows_the_memory_of_every_gpu_in_mb() -> None:
    rm = manager(FakeGpu(total_mb=1000, used_mb=250, utilization_percent=40), FakeGpu(total_mb=500))

    first, second = rm.get_current_usage().gpu

    assert (first.device, first.total_mb, first.used_mb, first.free_mb) == (
        "cuda:0",
        1000,
        250,
        750,
    )
    assert first.utilization_percent == 40
    assert (second.device, second.used_mb) == ("cuda:1", 0)


def test_cpu_use_is_the_share_between_two_looks_whichever_thread_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = psutil.cpu_times()
    zero = type(times)(*[0.0] * len(times))
    readings = iter([zero, zero._replace(user=3.0, idle=1.0), zero._replace(user=3.0, idle=5.0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    clock = SteppingClock()
    rm = ResourceManager(clock=clock)
    seen: list[float] = []

    def look() -> None:
        clock.now_s += 1
        seen.append(rm.get_current_usage().cpu_percent)

    look()
    other = threading.Thread(target=look)
    other.start()
    other.join()

    assert seen == [75.0, 0.0]


def test_looks_in_quick_succession_give_the_same_cpu_use(monkeypatch: pytest.MonkeyPatch) -> None:
    times = psutil.cpu_times()
    zero = type(times)(*[0.0] * len(times))
    readings = iter([zero, zero._replace(user=1.0, idle=1.0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    clock = SteppingClock()
    rm = ResourceManager(clock=clock)

    clock.now_s = 1.0
    first = rm.get_current_usage().cpu_percent
    clock.now_s = 1.01

    assert (first, rm.get_current_usage().cpu_percent) == (50.0, 50.0)


def test_gpu_info_lists_plain_values() -> None:
    (info,) = manager(FakeGpu(total_mb=1000, used_mb=250, name="H")).get_gpu_info()

    assert info == {
        "device": "cuda:0",
        "index": 0,
        "name": "H",
        "uuid": "GPU-00000000",
        "total_mb": 1000.0,
        "used_mb": 250.0,
        "free_mb": 750.0,
        "utilization_percent": 0.0,
    }


def test_a_gpu_that_does_not_measure_its_use_still_has_memory() -> None:
    (gpu,) = manager(FakeGpu(total_mb=1000, measures_use=False)).get_current_usage().gpu

    assert gpu.utilization_percent is None
    assert gpu.total_mb == 1000


def test_log_line_names_every_figure(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "splitlearn_manager"):
        manager(FakeGpu(total_mb=1000, used_mb=250)).log_resource_usage()

    (line,) = caplog.messages
    for key in ("cpu_percent=", "memory_mb=", "memory_percent=", "process_memory_mb="):
        assert key in line
    assert "cuda:0_used_mb=250 cuda:0_total_mb=1000" in line


# GPUs that are not there, hidden, or failing.


def test_no_driver_means_no_gpus_and_is_asked_once() -> None:
    nvml = FakeNvml(FakeGpu(), fails_to_start=True)
    rm = ResourceManager(nvml=nvml, environ={}, torch_has_cuda=lambda: True)

    assert rm.get_current_usage().gpu == ()
    assert rm.get_gpu_info() == []
    assert list(rm.budgets_mb()) == ["cpu"]
    assert nvml.starts == 1


def test_torch_without_cuda_means_no_gpus_and_no_question_to_the_driver() -> None:
    nvml = FakeNvml(FakeGpu())
    rm = ResourceManager(nvml=nvml, environ={}, torch_has_cuda=lambda: False)

    assert rm.find_best_device() == "cpu"
    assert nvml.starts == 0


def test_a_failing_gpu_is_left_out_and_the_others_keep_their_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = FakeGpu(total_mb=1000)
    rm = manager(lost, FakeGpu(total_mb=2000))
    assert rm.budgets_mb()["cuda:0"] == 800
    lost.fails = True

    assert [gpu.device for gpu in rm.get_current_usage().gpu] == ["cuda:1"]
    assert rm.budgets_mb()["cuda:0"] == 800
    assert "cuda:0 cannot be read: GPU is lost" in rm.budget_problems()
    assert len([m for m in caplog.messages if "cannot be read" in m]) == 1

    lost.fails = False
    assert [gpu.device for gpu in rm.get_current_usage().gpu] == ["cuda:0", "cuda:1"]
    assert rm.budget_problems() == ()


def test_a_gpu_that_was_never_readable_has_a_budget_only_by_quota() -> None:
    assert list(manager(FakeGpu(fails=True)).budgets_mb()) == ["cpu"]
    assert manager(FakeGpu(fails=True), quotas={"cuda:0": 700}).budgets_mb()["cuda:0"] == 700


@pytest.mark.parametrize("built_with_cuda", [True, False])
def test_torch_counts_as_built_with_cuda_by_its_library(
    built_with_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "torch/__init__.py", "raise AssertionError('imported')\n")
    if built_with_cuda:
        write(tmp_path / "torch/lib/libtorch_cuda.so", "")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))

    assert torch_built_with_cuda() is built_with_cuda


def test_the_real_nvml_module_has_every_function_that_is_asked() -> None:
    asked = {name for name in vars(Nvml) if name.startswith("nvml")} | {"NVMLError"}

    assert len(asked) > 5
    assert [name for name in asked if not hasattr(pynvml, name)] == []
    assert [name for name in asked if not hasattr(FakeNvml, name)] == []


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, (0, 1, 2)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("2,0", (2, 0)),
        (" 1 , 2 ", (1, 2)),
        ("1,-1,0", (1,)),
        ("0,7,1", (0,)),
        ("1,1", ()),
        ("2gpu", (2,)),
        ("GPU-bbbb3333,GPU-aaaa1111", (2, 0)),
        ("GPU-b", (2,)),
        ("GPU-aaaa", ()),
        ("GPU-b,GPU-bbbb3333", ()),
        ("MIG-1234", ("MIG-1234",)),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    setting: str | None, shown: tuple[int | str, ...]
) -> None:
    assert visible(setting, UUIDS) == shown


def test_cuda_numbers_are_those_after_cuda_visible_devices() -> None:
    small, large = FakeGpu(total_mb=100), FakeGpu(total_mb=900)
    rm = manager(small, large, environ={"CUDA_VISIBLE_DEVICES": "1,0"})

    assert rm.budgets_mb()["cuda:0"] == 720
    assert rm.find_best_device() == "cuda:0"


def test_a_slice_is_a_device_with_the_slices_memory() -> None:
    nvml = FakeNvml(FakeGpu(total_mb=8000), slices=(FakeGpu(total_mb=1000, uuid="MIG-7"),))
    rm = ResourceManager(
        nvml=nvml, environ={"CUDA_VISIBLE_DEVICES": "MIG-7"}, torch_has_cuda=lambda: True
    )

    assert rm.budgets_mb()["cuda:0"] == 800


def test_hidden_gpus_are_given_as_the_reason_why_a_quota_has_no_effect() -> None:
    rm = manager(FakeGpu(), quotas={"cuda:0": 1}, environ={"CUDA_VISIBLE_DEVICES": ""})

    assert rm.budget_problems() == (
        "memory_quota_mb: cuda:0 is no device of this machine, which has cpu; its quota has no "
        "effect (CUDA_VISIBLE_DEVICES hides every GPU)",
    )


def test_gpus_of_different_kinds_are_reported_until_their_order_is_fixed() -> None:
    gpus = (FakeGpu(name="A"), FakeGpu(name="B"))

    (problem,) = manager(*gpus).budget_problems()
    assert "the GPUs differ (A, B)" in problem
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in problem
    assert manager(*gpus, environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}).budget_problems() == ()


# What may be used.


def test_best_device_is_the_gpu_with_most_free_memory() -> None:
    rm = manager(FakeGpu(total_mb=1000, used_mb=900), FakeGpu(total_mb=500))

    assert rm.find_best_device() == "cuda:1"
    assert rm.find_best_device(min_free_memory_mb=500) == "cuda:1"
    assert rm.find_best_device(min_free_memory_mb=501) == "cpu"
    assert rm.find_best_device(prefer_gpu=False) == "cpu"


def test_available_means_free_and_within_the_limit() -> None:
    half_used = (MemoryLimit(limit_bytes=1000 * MB, used_bytes=500 * MB),)
    rm = manager(FakeGpu(total_mb=1000, used_mb=700), limits=half_used)

    assert rm.check_available_resources(300)
    assert not rm.check_available_resources(301)
    assert rm.check_available_resources(100, required_gpu=True)
    assert not rm.check_available_resources(101, required_gpu=True)


def test_available_follows_a_quota_instead_of_the_share() -> None:
    rm = manager(FakeGpu(total_mb=1000, used_mb=700), quotas={"cuda:0": 250})

    assert rm.check_available_resources(250, required_gpu=True)
    assert not rm.check_available_resources(251, required_gpu=True)


def test_nothing_is_available_on_a_gpu_that_is_not_there() -> None:
    assert not manager().check_available_resources(required_gpu=True)


def test_memory_above_the_limit_is_not_available_however_little_is_asked() -> None:
    rm = manager(FakeGpu(total_mb=1000, used_mb=900))

    assert not rm.check_available_resources(0, required_gpu=True)


# Budgets.


def test_budget_is_the_quota_else_the_share_of_what_the_device_has() -> None:
    rm = manager(FakeGpu(total_mb=1000), FakeGpu(total_mb=2000), percent=50, quotas={"cuda:1": 300})

    assert rm.budgets_mb() == {
        "cpu": pytest.approx(PHYSICAL_MB / 2),
        "cuda:0": 500,
        "cuda:1": 300,
    }


def test_a_container_limit_is_what_the_cpu_has() -> None:
    rm = manager(limits=(MemoryLimit(limit_bytes=100 * MB, used_bytes=25 * MB),))

    assert rm.budgets_mb()["cpu"] == 80
    usage = rm.get_current_usage()
    assert (usage.memory_mb, usage.memory_percent) == (25, 25)


def test_readings_tell_of_each_device_what_everybody_uses() -> None:
    rm = manager(FakeGpu(total_mb=1000, used_mb=700), limits=(MemoryLimit(100 * MB, 25 * MB),))

    readings = rm.readings()

    assert readings.keys() == {"cpu", "cuda:0"}
    assert (readings["cpu"].total_mb, readings["cpu"].used_mb) == (100, 25)
    assert (readings["cuda:0"].total_mb, readings["cuda:0"].used_mb) == (1000, 700)


def test_a_gpu_that_cannot_be_read_has_no_reading() -> None:
    gpu = FakeGpu(total_mb=1000)
    rm = manager(gpu)
    assert "cuda:0" in rm.readings()

    gpu.fails = True

    assert "cuda:0" not in rm.readings()


def test_limits_change_live() -> None:
    rm = manager(FakeGpu(total_mb=1000))

    rm.configure(10, {"cpu": 7})

    assert rm.budgets_mb() == {"cpu": 7, "cuda:0": 100}
    assert rm.max_memory_percent == 10


@pytest.mark.parametrize(
    ("percent", "quotas", "key"),
    [
        (0, {}, "max_memory_percent"),
        (101, {}, "max_memory_percent"),
        (80, {"cpu": -1.0}, "memory_quota_mb"),
        (80, {"cpu": float("nan")}, "memory_quota_mb"),
        (80, {"tpu": 1.0}, "'tpu'"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_and_the_old_one_stays(
    percent: float, quotas: dict[str, float], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        ResourceManager(percent, quotas)
    rm = manager(quotas={"cpu": 5})
    with pytest.raises(ConfigError, match=key):
        rm.configure(percent, quotas)
    assert rm.budgets_mb()["cpu"] == 5


def test_a_quota_without_a_device_is_reported_and_budgets_nothing() -> None:
    rm = manager(FakeGpu(), quotas={"cuda:3": 100})

    assert "cuda:3" not in rm.budgets_mb()
    (problem,) = rm.budget_problems()
    assert problem == (
        "memory_quota_mb: cuda:3 is no device of this machine, which has cpu, cuda:0; "
        "its quota has no effect"
    )


def test_a_quota_above_what_the_device_has_counts_and_is_reported() -> None:
    rm = manager(FakeGpu(total_mb=1000), quotas={"cuda:0": 2000})

    assert rm.budgets_mb()["cuda:0"] == 2000
    assert rm.budget_problems() == (
        "memory_quota_mb: cuda:0: 2,000 MB is more than the 1,000 MB that cuda:0 has",
    )


def test_two_quotas_of_one_device_leave_the_smaller() -> None:
    rm = manager(quotas={"cpu": 300, "mps": 200})

    assert rm.budgets_mb()["cpu"] == 200
    assert rm.budget_problems() == (
        "memory_quota_mb: cpu and mps are both quotas of cpu; the smaller counts",
    )


@pytest.mark.parametrize(
    ("device", "charged"),
    [
        ("cpu", "cpu"),
        ("mps", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:0", "cuda:0"),
        ("cuda:03", "cuda:3"),
    ],
)
def test_budget_device_names_the_device_that_is_charged(device: str, charged: str) -> None:
    assert budget_device(device) == charged


@pytest.mark.parametrize("device", ["auto", "cuda:", "cuda:-1", "CPU", ""])
def test_budget_device_refuses_what_is_no_device(device: str) -> None:
    with pytest.raises(ConfigError, match="expected cpu, cuda, cuda:N or mps"):
        budget_device(device)


# Control groups.


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def test_version_2_limits_of_all_levels_count(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/pod/box\n")
    write(tmp_path / "fs/pod/memory.max", "1000\n")
    write(tmp_path / "fs/pod/memory.current", "400\n")
    write(tmp_path / "fs/pod/box/memory.max", "max\n")
    write(tmp_path / "fs/pod/box/memory.current", "300\n")
    write(tmp_path / "fs/pod/memory.stat", "anon 1\ninactive_file 150\n")

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (
        MemoryLimit(limit_bytes=1000, used_bytes=250),
    )


def test_version_1_limits_count_beside_other_controllers(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "8:cpu,cpuacct:/x\n4:memory:/box\n0::/unified\n")
    write(tmp_path / "fs/memory/box/memory.limit_in_bytes", "2000\n")
    write(tmp_path / "fs/memory/box/memory.usage_in_bytes", "900\n")
    write(tmp_path / "fs/memory/box/memory.stat", "inactive_file 1\ntotal_inactive_file 100\n")

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (
        MemoryLimit(limit_bytes=2000, used_bytes=800),
    )


def test_page_cache_counts_as_free_unless_programs_have_it_mapped(tmp_path: Path) -> None:
    """Files of models that come back are on the active list, and the kernel gives them back all the same."""
    write(tmp_path / "cgroup", "0::/box\n")
    write(tmp_path / "fs/box/memory.max", "2000\n")
    write(tmp_path / "fs/box/memory.current", "1500\n")
    stat = "inactive_file 100\nactive_file 700\nfile_mapped 250\nshmem 50\n"
    write(tmp_path / "fs/box/memory.stat", stat)

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (MemoryLimit(2000, 900),)


def test_cache_that_is_all_mapped_leaves_what_is_inactive(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "4:memory:/box\n")
    write(tmp_path / "fs/memory/box/memory.limit_in_bytes", "2000\n")
    write(tmp_path / "fs/memory/box/memory.usage_in_bytes", "1500\n")
    stat = "total_inactive_file 100\ntotal_active_file 300\ntotal_mapped_file 900\ntotal_shmem 0\n"
    write(tmp_path / "fs/memory/box/memory.stat", stat)

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (MemoryLimit(2000, 1400),)


def test_memory_high_limits_like_memory_max(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "0::/\n")
    write(tmp_path / "fs/memory.max", "max\n")
    write(tmp_path / "fs/memory.high", "1200\n")
    write(tmp_path / "fs/memory.current", "200\n")

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (MemoryLimit(1200, 200),)


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("some avg10=12.50 avg60=3.00 avg300=1.00 total=9\nfull avg10=1.00\n", 12.5),
        ("full avg10=1.00 avg60=0.00 avg300=0.00 total=9\n", None),
        ("some avg10=much\n", None),
        ("", None),
    ],
)
def test_stalls_are_those_of_the_own_group(
    tmp_path: Path, text: str, percent: float | None
) -> None:
    write(tmp_path / "cgroup", "4:memory:/box\n0::/pod/box\n")
    write(tmp_path / "fs/pod/box/memory.pressure", text)
    write(tmp_path / "fs/pod/memory.pressure", "some avg10=99.00\n")

    assert memory_stall(tmp_path / "cgroup", tmp_path / "fs") == percent


def test_stalls_are_not_known_in_version_1(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "4:memory:/box\n")

    assert memory_stall(tmp_path / "cgroup", tmp_path / "fs") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses address space")
def test_a_limit_on_address_space_counts_as_one_on_memory() -> None:
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from splitlearn_manager.core.resource_manager import ResourceManager\n"
        "rm = ResourceManager()\n"
        "def free(): r = rm.readings()['cpu']; return r.total_mb - r.used_mb\n"
        "free()\n"
        "before = free()\n"
        "held = bytearray(200 << 20)\n"
        "print(rm.readings()['cpu'].total_mb, before - free(), before < 3072)\n"
    )
    total, taken, below = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    ).stdout.split()

    assert float(total) == 3072
    assert float(taken) == pytest.approx(200, abs=2)
    assert below == "True"


@pytest.mark.parametrize("path", ["/not/in/this/mount", "/../outside"])
def test_a_container_that_sees_itself_as_the_root_finds_its_limit_there(
    tmp_path: Path, path: str
) -> None:
    write(tmp_path / "cgroup", f"0::{path}\n")
    write(tmp_path / "fs/memory.max", "700\n")
    write(tmp_path / "fs/memory.current", "0\n")
    write(tmp_path / "outside/memory.max", "1\n")
    write(tmp_path / "outside/memory.current", "1\n")

    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "fs") == (
        MemoryLimit(limit_bytes=700, used_bytes=0),
    )


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "absent", tmp_path) == ()


def test_the_tightest_of_machine_and_limits_counts() -> None:
    limits = (MemoryLimit(800 * MB, 100 * MB), MemoryLimit(600 * MB, 50 * MB))

    memory = host_memory(1000 * MB, 900 * MB, limits)

    assert (memory.total_mb, memory.free_mb, memory.used_mb) == (600, 550, 50)


def test_a_limit_above_the_machines_memory_limits_nothing() -> None:
    memory = host_memory(1000 * MB, 900 * MB, [MemoryLimit(2**62, 999 * MB)])

    assert (memory.total_mb, memory.free_mb) == (1000, 900)


def test_a_container_over_its_limit_has_nothing_free() -> None:
    memory = host_memory(1000 * MB, 900 * MB, [MemoryLimit(100 * MB, 120 * MB)])

    assert (memory.free_mb, memory.percent) == (0, 100)


# What it costs.


def test_measuring_never_imports_torch() -> None:
    code = (
        "import sys\n"
        "from splitlearn_manager.core.resource_manager import ResourceManager\n"
        "rm = ResourceManager()\n"
        "rm.get_current_usage(), rm.budgets_mb(), rm.find_best_device()\n"
        "sys.exit('torch' in sys.modules)\n"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
