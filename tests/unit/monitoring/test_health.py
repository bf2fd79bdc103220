"""What counts as healthy, and the ticks that measure the machine."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass, field

import pytest

from splitlearn_manager.core.resource_manager import GpuUsage, ResourceManager, ResourceUsage
from splitlearn_manager.monitoring import HealthChecker
from splitlearn_manager.monitoring.readings import UsageReading

DEADLINE_S = 10.0


@dataclass
class Machine:
    """Says what it is told to."""

    memory_percent: float = 50.0
    max_memory_percent: float = 80.0
    gpu: tuple[GpuUsage, ...] = ()

    def get_current_usage(self) -> ResourceUsage:
        return ResourceUsage(10.0, 1000.0, self.memory_percent, 100.0, self.gpu)


@dataclass
class Parts:
    """A server's parts, and a checker that asks them."""

    phases: dict[str, str] = field(default_factory=lambda: {"a": "Ready"})
    machine: Machine = field(default_factory=Machine)
    loop_alive: bool = True
    ready: bool = True
    now_s: float = 100.0
    interval_s: float = 30.0

    def checker(self) -> HealthChecker:
        return HealthChecker(
            models=lambda: self.phases,
            resources=self.machine,
            loop_alive=lambda: self.loop_alive,
            ready=lambda: self.ready,
            interval_s=self.interval_s,
            clock=lambda: self.now_s,
        )


def check(parts: Parts, name: str) -> dict[str, object]:
    checks = parts.checker().check_health()["checks"]
    assert isinstance(checks, dict)
    found = checks[name]
    assert isinstance(found, dict)
    return found


def test_a_server_with_everything_in_order_is_healthy() -> None:
    health = Parts().checker().check_health()

    assert health["status"] == "healthy"
    assert health["models"] == {"a": "Ready"}


def test_a_failed_model_degrades_and_is_named() -> None:
    parts = Parts(phases={"a": "Ready", "c": "Failed", "b": "Failed"})

    assert parts.checker().check_health()["status"] == "degraded"
    assert check(parts, "models") == {"ok": False, "message": "failed: b, c"}


@pytest.mark.parametrize("phase", ["Pending", "Loading", "Updating", "Evicted", "Terminating"])
def test_a_model_on_its_way_or_parked_does_not_degrade(phase: str) -> None:
    assert Parts(phases={"a": phase}).checker().check_health()["status"] == "healthy"


def test_memory_above_the_limit_degrades() -> None:
    assert Parts(machine=Machine(80.0)).checker().check_health()["status"] == "healthy"
    over = Parts(machine=Machine(80.4))

    assert over.checker().check_health()["status"] == "degraded"
    assert check(over, "memory") == {
        "ok": False,
        "message": "memory use is 80.4 %, above max_memory_percent 80",
    }


def test_a_dead_loop_is_unhealthy_whatever_else() -> None:
    parts = Parts(loop_alive=False, phases={"a": "Failed"})

    assert parts.checker().check_health()["status"] == "unhealthy"
    assert check(parts, "loop")["message"] == "the reconcile loop has died"


def test_not_being_ready_is_shown_and_is_not_being_unwell() -> None:
    parts = Parts(ready=False)

    assert parts.checker().check_health()["status"] == "healthy"
    assert check(parts, "ready") == {"ok": False, "message": "the first convergence is not done"}


def test_uptime_counts_from_the_making() -> None:
    parts = Parts()
    checker = parts.checker()
    parts.now_s += 12.5

    assert checker.check_health()["uptime_s"] == 12.5


def test_health_fits_json_with_every_figure() -> None:
    parts = Parts(machine=Machine(gpu=(GpuUsage(1, "G", "GPU-1", 1000.0, 250.0, 750.0, None),)))

    health = json.loads(json.dumps(parts.checker().check_health()))

    assert health["resources"] == {
        "cpu_percent": 10.0,
        "memory_mb": 1000.0,
        "memory_percent": 50.0,
        "process_memory_mb": 100.0,
        "gpus": [{"device": "cuda:1", "total_mb": 1000.0, "used_mb": 250.0}],
    }
    assert set(health["checks"]) == {"loop", "ready", "models", "memory"}


def test_the_real_resource_manager_fits() -> None:
    checker = HealthChecker(
        models=dict,
        resources=ResourceManager(max_memory_percent=100),
        loop_alive=lambda: True,
        ready=lambda: True,
    )

    assert checker.check_health()["status"] == "healthy"


def test_ticks_measure_at_once_and_again_at_every_interval() -> None:
    checker = Parts(interval_s=0.01).checker()
    seen: list[UsageReading] = []
    three = threading.Event()

    def on_tick(usage: UsageReading) -> None:
        seen.append(usage)
        if len(seen) == 3:
            three.set()

    checker.start(on_tick)
    try:
        assert three.wait(DEADLINE_S)
    finally:
        checker.stop()
    assert seen[0].memory_mb == 1000.0


def test_stopping_ends_the_thread_without_waiting_for_the_interval() -> None:
    checker = Parts(interval_s=3600.0).checker()
    ticked = threading.Event()
    threads: list[threading.Thread] = []

    def on_tick(usage: UsageReading) -> None:
        threads.append(threading.current_thread())
        ticked.set()

    checker.start(on_tick)
    assert ticked.wait(DEADLINE_S)

    checker.stop()
    checker.stop()

    assert not threads[0].is_alive()


def test_a_tick_may_stop_the_checker() -> None:
    checker = Parts(interval_s=0.0).checker()
    ticks: list[threading.Thread] = []
    ended = threading.Event()

    def on_tick(usage: UsageReading) -> None:
        ticks.append(threading.current_thread())
        checker.stop()
        ended.set()

    checker.start(on_tick)
    assert ended.wait(DEADLINE_S)
    ticks[0].join(DEADLINE_S)

    assert len(ticks) == 1
    assert not ticks[0].is_alive()


def test_a_checker_can_be_started_again_but_not_twice() -> None:
    checker = Parts().checker()
    for _ in range(2):
        ticked = threading.Event()
        checker.start(lambda usage, ticked=ticked: ticked.set())
        try:
            with pytest.raises(RuntimeError, match="running already"):
                checker.start(lambda usage: None)
            assert ticked.wait(DEADLINE_S)
        finally:
            checker.stop()


def test_a_tick_that_raises_is_logged_and_the_next_comes(caplog: pytest.LogCaptureFixture) -> None:
    checker = Parts(interval_s=0.01).checker()
    calls: list[int] = []
    second = threading.Event()

    def on_tick(usage: UsageReading) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("first tick")
        second.set()

    checker.start(on_tick)
    try:
        assert second.wait(DEADLINE_S)
    finally:
        checker.stop()
    assert "a periodic health check failed" in caplog.text
    assert "first tick" in caplog.text


def test_a_change_of_health_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(phases={"a": "Failed"}, ready=False, interval_s=0.01)
    checker = parts.checker()
    ticks = threading.Semaphore(0)

    def tick_until(text: str) -> None:
        for _ in range(1000):
            assert ticks.acquire(timeout=DEADLINE_S)
            if text in caplog.text:
                return
        raise AssertionError(f"not logged: {text}")

    with caplog.at_level(logging.INFO, "splitlearn_manager"):
        checker.start(lambda usage: ticks.release())
        try:
            tick_until("health=degraded was=healthy why='failed: a'")
            parts.phases = {"a": "Ready"}
            tick_until("health=healthy was=degraded why=''")
        finally:
            checker.stop()

    assert caplog.text.count("health=") == 2
