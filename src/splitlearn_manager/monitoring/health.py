"""Whether this server is well, from what its parts say when they are asked.

    unhealthy   the loop that keeps models as desired has died; only a restart helps
    degraded    it works, but a model is Failed, or memory use is above max_memory_percent
    healthy     neither

Being ready (the first convergence is done) is shown, and says nothing about being well. The checker
also measures the machine at every interval and hands the figures on; it changes nothing itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from splitlearn_manager.monitoring.readings import Resources, UsageReading

logger = logging.getLogger(__name__)

FAILED_PHASE = "Failed"
# Longest wait for a tick that is running when the checker is stopped.
_STOP_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer, in words for people."""

    ok: bool
    message: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the parts of a server say of themselves at one moment."""

    phases: Mapping[str, str]
    usage: UsageReading
    max_memory_percent: float
    loop_alive: bool
    ready: bool


def checks_of(facts: Facts) -> dict[str, Check]:
    """The checks, by name: loop, ready, models, memory."""
    failed = sorted(m for m, phase in facts.phases.items() if phase == FAILED_PHASE)
    used, limit = facts.usage.memory_percent, facts.max_memory_percent
    return {
        "loop": Check(
            facts.loop_alive,
            "the reconcile loop is running" if facts.loop_alive else "the reconcile loop has died",
        ),
        "ready": Check(
            facts.ready,
            "the first convergence is done" if facts.ready else "the first convergence is not done",
        ),
        "models": Check(
            not failed, f"failed: {', '.join(failed)}" if failed else "no model has failed"
        ),
        "memory": Check(
            used <= limit,
            f"memory use is {used:.1f} %, "
            f"{'above' if used > limit else 'within'} max_memory_percent {limit:g}",
        ),
    }


def status_of(checks: Mapping[str, Check]) -> str:
    """healthy, degraded or unhealthy."""
    if not checks["loop"].ok:
        return "unhealthy"
    return "healthy" if checks["models"].ok and checks["memory"].ok else "degraded"


class HealthChecker:
    """Asks the parts of a server how they are: when told to, and at every interval once started.

    Args:
        models: the phase of each model, by model id.
        resources: measures the machine.
        loop_alive: whether the loop still turns.
        ready: whether the first convergence is done.
        interval_s: seconds between two ticks (`health_check_interval`).
        clock: seconds on a clock that never jumps.
    """

    def __init__(
        self,
        *,
        models: Callable[[], Mapping[str, str]],
        resources: Resources,
        loop_alive: Callable[[], bool],
        ready: Callable[[], bool],
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._resources = resources
        self._loop_alive = loop_alive
        self._ready = ready
        self._interval_s = interval_s
        self._clock = clock
        self._began_s = clock()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._last_status = "healthy"

    def check_health(self) -> dict[str, object]:
        """How the server is now.

        Returns:
            `status`: healthy, degraded or unhealthy; `models`: phase by model id; `resources`:
            cpu_percent, memory_mb, memory_percent, process_memory_mb and `gpus`, each with device,
            total_mb and used_mb; `uptime_s`; `checks`: `ok` and `message` of loop, ready, models and
            memory. All of it fits JSON.
        """
        facts = self._facts()
        checks = checks_of(facts)
        return {
            "status": status_of(checks),
            "models": dict(facts.phases),
            "resources": _as_dict(facts.usage),
            "uptime_s": self._clock() - self._began_s,
            "checks": {
                name: {"ok": check.ok, "message": check.message} for name, check in checks.items()
            },
        }

    def start(self, on_tick: Callable[[UsageReading], None]) -> None:
        """Measures the machine now and at every interval, and hands the figures to `on_tick`.

        The health is judged at the same time, and a change of it is logged. What `on_tick` raises
        is logged, and the next tick comes all the same. Raises RuntimeError if already started.
        """
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("the health checker is running already")
            stopped = self._stopped = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(on_tick, stopped), name="health-checker", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Ends the ticks and waits for one that is running; without effect if none do."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stopped.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP_WAIT_S)

    def _run(self, on_tick: Callable[[UsageReading], None], stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                self._tick(on_tick)
            except Exception:
                logger.exception("a periodic health check failed")
            stopped.wait(self._interval_s)

    def _tick(self, on_tick: Callable[[UsageReading], None]) -> None:
        facts = self._facts()
        on_tick(facts.usage)
        checks = checks_of(facts)
        status = status_of(checks)
        if status != self._last_status:
            level = logging.INFO if status == "healthy" else logging.WARNING
            # Not being ready is no reason: a server that still loads may well be healthy.
            why = [check.message for n, check in checks.items() if not check.ok and n != "ready"]
            logger.log(level, "health=%s was=%s why=%r", status, self._last_status, "; ".join(why))
            self._last_status = status

    def _facts(self) -> Facts:
        return Facts(
            phases=self._models(),
            usage=self._resources.get_current_usage(),
            max_memory_percent=self._resources.max_memory_percent,
            loop_alive=self._loop_alive(),
            ready=self._ready(),
        )


def _as_dict(usage: UsageReading) -> dict[str, object]:
    return {
        "cpu_percent": usage.cpu_percent,
        "memory_mb": usage.memory_mb,
        "memory_percent": usage.memory_percent,
        "process_memory_mb": usage.process_memory_mb,
        "gpus": [
            {"device": f"cuda:{gpu.index}", "total_mb": gpu.total_mb, "used_mb": gpu.used_mb}
            for gpu in usage.gpu
        ],
    }
