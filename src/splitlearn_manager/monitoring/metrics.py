"""The Prometheus metrics of one server, under the names that docs/metrics.md lists.

Each `MetricsCollector` has a registry of its own, so several servers live in one process. Recording
a request touches counters that were looked up before: a few microseconds, and no lock of ours.

A model's series exist from the first record about it until `remove_model`. Requests may end after
that; so the ids of removed models are remembered, and what is recorded for them is dropped until
`record_load` or `admit_model` says that the model is back. Record no name that a client made up: each
model id and each status is a series.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from splitlearn_manager.monitoring.readings import UsageReading
from splitlearn_manager.monitoring.status_series import ModelReading, StatusSeries

# The text format that every Prometheus reads; the names above need nothing newer.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Far more than can be removed while one request is still running.
_REMOVED_IDS_KEPT = 1024

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LATENCY_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_DETECTION_S = (0.1, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_RECONCILE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class NodeReading:
    """The node at one moment.

    Attributes:
        models: how many models are in each phase.
        problems: mistakes in the directory's files.
        prune_guard_blocked: models that wait for somebody's confirmation to go.
        state_kept: what must survive a restart can be written.
    """

    models: Mapping[str, int]
    source_available: bool = True
    problems: int = 0
    prune_guard_blocked: int = 0
    state_kept: bool = True
    settled: bool = False
    restart_required: bool = False


class _Instruments:
    """The metrics themselves, registered in one registry. The client adds `_total` to counters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.loads = counter("model_load", "Loads that ended, by outcome.", "model_id", "status")
        self.unloads = counter("model_unload", "Unloads that ended.", "model_id")
        self.loaded = gauge("models_loaded", "Models that are READY.")
        self.requests = counter(
            "inference_requests", "Requests that ended, by outcome.", "model_id", "status"
        )
        self.latency = histogram(
            "inference_duration_seconds",
            "Time from a request's arrival to its answer.",
            _LATENCY_S,
            "model_id",
        )
        self.batch_size = histogram(
            "splitlearn_batch_size", "Rows of each batch that ran.", _ROWS, "model_id"
        )
        self.queued = histogram(
            "splitlearn_queue_seconds",
            "Time that the first request of each batch waited for it to run.",
            _LATENCY_S,
            "model_id",
        )
        self.cpu = gauge("cpu_usage_percent", "Use of all CPU cores, 0 to 100.")
        self.memory = gauge("memory_usage_mb", "Memory used on this machine or in its container.")
        self.memory_percent = gauge("memory_usage_percent", "The same, of what may be used.")
        self.gpu_memory = gauge("gpu_memory_mb", "GPU memory used, by all processes.", "gpu_id")

        own = "splitlearn_"
        self.reconciles = counter(own + "reconcile", "Turns of the loop, by result.", "result")
        self.reconcile_time = histogram(
            own + "reconcile_duration_seconds", "Time of one turn of the loop.", _RECONCILE_S
        )
        self.last_scan = gauge(
            own + "last_scan_timestamp_seconds", "Unix time of the latest complete scan."
        )
        self.detection = histogram(
            own + "change_detection_seconds",
            "Time from the first sight of a change in the directory to its acceptance.",
            _DETECTION_S,
        )
        self.watch_mode = gauge(own + "watch_mode", "1 for how changes are noticed.", "mode")
        self.models = gauge(own + "models", "Models by phase.", "phase")
        self.source = gauge(own + "source_available", "1 while the directory can be read.")
        self.problems = gauge(own + "problems", "Mistakes in the directory's files.")
        self.blocked = gauge(
            own + "prune_guard_blocked_models", "Models that wait for a confirmation to go."
        )
        self.state_kept = gauge(
            own + "state_kept", "1 while what must survive a restart can be written."
        )
        self.settled = gauge(own + "settled", "1 while nothing is under way or about to be.")
        self.restart = gauge(
            own + "restart_required", "1 while a setting waits for the next start."
        )
        self.hung = gauge(
            own + "hung_loads", "Loads that were given up and whose loader has not come back."
        )
        self.reserved = gauge(own + "reservation_mb", "Memory reserved by models.", "device")
        self.quota = gauge(own + "quota_mb", "Memory that models may reserve.", "device")
        self.others = gauge(
            own + "others_mb", "Memory used by others and by the node beside its models.", "device"
        )
        self.pressure = gauge(
            own + "memory_pressure",
            "1 while others have taken the memory of models: idle ones go, loads wait.",
            "device",
        )
        self.evictions = counter(own + "evictions", "Models unloaded to make room or when idle.")
        self.load_waits = histogram(
            own + "load_wait_seconds",
            "Time that requests waited for their model to be loaded, by outcome.",
            _LATENCY_S,
            "outcome",
        )


class _InFlight:
    """`splitlearn_in_flight{model_id}`, asked for at each scrape."""

    def __init__(self, source: Callable[[], Mapping[str, int]]) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for model_id, requests in sorted(self._source().items()):
            family.add_metric([model_id], requests)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "splitlearn_in_flight",
            "Requests accepted and not answered yet.",
            labels=["model_id"],
        )


class _Exposed:
    """A registry without the `_created` series, which double every counter and say little, and
    without those that are written directly."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            if StatusSeries.wrote(metric):
                continue
            # By its whole name: a metric that somebody adds may be called so itself.
            created = f"{metric.name}_created"
            metric.samples = [s for s in metric.samples if s.name != created]
            yield metric


class MetricsCollector:
    """Records what happens and renders it for Prometheus. Safe to use from any thread.

    Args:
        registry: where the metrics are registered; None for a registry of its own.

    Raises:
        ValueError: the registry holds metrics of these names already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._metrics = _Instruments(self.registry)
        # Held while series come or go, never while a request is recorded into series that exist.
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._batches: dict[str, tuple[Histogram, Histogram]] = {}
        self._label_sets: dict[str, set[tuple[Counter | Gauge | Histogram, tuple[str, ...]]]] = {}
        self._removed: dict[str, None] = {}
        self._status: StatusSeries | None = None
        self._watch_mode = ""

    # Models.

    def record_load(self, model_id: str, status: Literal["success", "failure"]) -> None:
        """A load has ended."""
        with self._lock:
            self._removed.pop(model_id, None)
            self._note(self._metrics.loads, model_id, status)
            self._metrics.loads.labels(model_id, status).inc()

    def record_unload(self, model_id: str) -> None:
        """An unload has ended. Of a removed model: dropped."""
        with self._lock:
            if model_id not in self._removed:
                self._note(self._metrics.unloads, model_id)
                self._metrics.unloads.labels(model_id).inc()

    def record_inference(self, model_id: str, status: str, duration_s: float) -> None:
        """A request has ended. Of a removed model: dropped.

        `status` comes from a short, fixed list; `duration_s` is from arrival to answer.
        """
        pair = self._requests.get((model_id, status)) or self._add_requests(model_id, status)
        if pair is not None:
            pair[0].inc()
            pair[1].observe(duration_s)

    def record_batch(self, model_id: str, rows: int, waited_s: float) -> None:
        """A batch of so many rows runs; its first request has waited so long. Of a removed model: dropped."""
        pair = self._batches.get(model_id) or self._add_batches(model_id)
        if pair is not None:
            pair[0].observe(rows)
            pair[1].observe(waited_s)

    def record_eviction(self) -> None:
        """A model was unloaded to make room, or because it was idle."""
        self._metrics.evictions.inc()

    def record_load_wait(self, outcome: Literal["served", "refused"], duration_s: float) -> None:
        """A request that found its model not loaded waited so long, and then was served or not."""
        self._metrics.load_waits.labels(outcome).observe(duration_s)

    def set_models_loaded(self, count: int) -> None:
        """So many models are READY."""
        self._metrics.loaded.set(count)

    def admit_model(self, model_id: str) -> None:
        """The model is there (again): what is recorded of it counts."""
        with self._lock:
            self._removed.pop(model_id, None)

    def set_models_source(self, source: Callable[[], Iterable[ModelReading]]) -> None:
        """At each scrape `source` tells where each model stands. Call once.

        Raises ValueError if there is a source already. If `source` raises, so does the scrape.
        """
        series = StatusSeries(source)
        self.registry.register(series)
        self._status = series

    def set_in_flight_source(self, source: Callable[[], Mapping[str, int]]) -> None:
        """At each scrape `source` tells the requests in flight by model. Call once.

        Raises ValueError if there is a source already. If `source` raises, so does the scrape.
        """
        self.registry.register(_InFlight(source))

    def remove_model(self, model_id: str) -> None:
        """The model is gone: so are all its series, until it is admitted or loaded again."""
        with self._lock:
            self._removed.pop(model_id, None)
            self._removed[model_id] = None
            if len(self._removed) > _REMOVED_IDS_KEPT:
                del self._removed[next(iter(self._removed))]
            for key in [key for key in self._requests if key[0] == model_id]:
                del self._requests[key]
            self._batches.pop(model_id, None)
            for metric, labels in self._label_sets.pop(model_id, set()):
                metric.remove(*labels)

    # The loop and the machine.

    def record_reconcile(self, result: str, duration_s: float) -> None:
        """A turn of the loop has ended; `result` comes from a short, fixed list."""
        self._metrics.reconciles.labels(result).inc()
        self._metrics.reconcile_time.observe(duration_s)

    def record_scan(self, timestamp: float) -> None:
        """A complete scan of the directory ended at this Unix time, in seconds."""
        self._metrics.last_scan.set(timestamp)

    def record_change_detection(self, seconds: float) -> None:
        """A change in the directory was accepted so long after it was first seen."""
        self._metrics.detection.observe(seconds)

    def set_node(self, reading: NodeReading) -> None:
        """The node as of the latest turn."""
        metrics = self._metrics
        with self._lock:
            _replace(metrics.models, reading.models)
            metrics.source.set(reading.source_available)
            metrics.problems.set(reading.problems)
            metrics.blocked.set(reading.prune_guard_blocked)
            metrics.state_kept.set(reading.state_kept)
            metrics.settled.set(reading.settled)
            metrics.restart.set(reading.restart_required)

    def set_hung_loads(self, count: int) -> None:
        """So many loads were given up and hold their memory still."""
        self._metrics.hung.set(count)

    def set_watch_mode(self, mode: str) -> None:
        """Changes are noticed in this way now, and in no other."""
        with self._lock:
            self._metrics.watch_mode.labels(mode).set(1)
            if self._watch_mode not in ("", mode):
                self._metrics.watch_mode.remove(self._watch_mode)
            self._watch_mode = mode

    def set_reservations(self, reserved_mb: Mapping[str, float]) -> None:
        """MB reserved on each device; a device that is not named has no series any more."""
        with self._lock:
            _replace(self._metrics.reserved, reserved_mb)

    def set_quotas(self, quota_mb: Mapping[str, float]) -> None:
        """MB that may be reserved on each device; one that is not named has no series any more."""
        with self._lock:
            _replace(self._metrics.quota, quota_mb)

    def set_pressure(self, others_mb: Mapping[str, float], pressed: Collection[str]) -> None:
        """What others use of each device that is read, and which of these are under pressure."""
        with self._lock:
            _replace(self._metrics.others, others_mb)
            _replace(self._metrics.pressure, {d: float(d in pressed) for d in others_mb})

    def update_resources(self, usage: UsageReading) -> None:
        """The machine was measured."""
        with self._lock:
            self._metrics.cpu.set(usage.cpu_percent)
            self._metrics.memory.set(usage.memory_mb)
            self._metrics.memory_percent.set(usage.memory_percent)
            _replace(self._metrics.gpu_memory, {str(g.index): g.used_mb for g in usage.gpu})

    def render(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its content type."""
        # Without our lock: the source of in-flight counts may take locks of its own.
        status = self._status.text() if self._status is not None else ""
        return generate_latest(_Exposed(self.registry)) + status.encode(), CONTENT_TYPE

    # Series that come and go; with the lock held.

    def _add_requests(self, model_id: str, status: str) -> tuple[Counter, Histogram] | None:
        with self._lock:
            if model_id in self._removed:
                return None
            self._note(self._metrics.requests, model_id, status)
            self._note(self._metrics.latency, model_id)
            pair = (
                self._metrics.requests.labels(model_id, status),
                self._metrics.latency.labels(model_id),
            )
            self._requests[model_id, status] = pair
            return pair

    def _add_batches(self, model_id: str) -> tuple[Histogram, Histogram] | None:
        with self._lock:
            if model_id in self._removed:
                return None
            self._note(self._metrics.batch_size, model_id)
            self._note(self._metrics.queued, model_id)
            pair = (
                self._metrics.batch_size.labels(model_id),
                self._metrics.queued.labels(model_id),
            )
            self._batches[model_id] = pair
            return pair

    def _note(self, metric: Counter | Gauge | Histogram, model_id: str, *labels: str) -> None:
        self._label_sets.setdefault(model_id, set()).add((metric, (model_id, *labels)))


def _replace(gauge: Gauge, values: Mapping[str, float]) -> None:
    """Gives a gauge of one label exactly these series."""
    for sample in next(iter(gauge.collect())).samples:
        (label,) = sample.labels.values()
        if label not in values:
            gauge.remove(label)
    for label, value in values.items():
        gauge.labels(label).set(value)
