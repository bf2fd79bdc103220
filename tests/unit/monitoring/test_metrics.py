"""The metrics, as a scrape shows them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from splitlearn_manager.core.resource_manager import GpuUsage, ResourceUsage
from splitlearn_manager.monitoring import MetricsCollector
from splitlearn_manager.monitoring.metrics import NodeReading
from splitlearn_manager.monitoring.status_series import ModelReading, VersionReading

Labels = tuple[tuple[str, str], ...]

READY = ModelReading(
    "a",
    "Ready",
    "OutOfSync",
    "Healthy",
    generation=4,
    observed_generation=3,
    conditions=[("Ready", "False"), ("Synced", "False")],
    next_retry_at=1.7e9,
    estimated_mb=90.0,
    weights_mb=91.5,
    activations_mb=8.25,
)


@dataclass
class Scrape:
    """What a Prometheus server would have read."""

    values: dict[tuple[str, Labels], float] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, **labels: str) -> float | None:
        return self.values.get((name, tuple(sorted(labels.items()))))

    def naming(self, model_id: str) -> list[str]:
        """The series that carry this model's id."""
        return [name for name, labels in self.values if ("model_id", model_id) in labels]


def scrape(metrics: MetricsCollector) -> Scrape:
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    seen = Scrape()
    for family in text_string_to_metric_families(body.decode("utf-8")):
        seen.types[family.name] = family.type
        for sample in family.samples:
            seen.values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return seen


def usage(*gpus_mb: float) -> ResourceUsage:
    return ResourceUsage(
        cpu_percent=12.5,
        memory_mb=2048.0,
        memory_percent=25.0,
        process_memory_mb=100.0,
        gpu=tuple(
            GpuUsage(i, "G", f"GPU-{i}", 1000, mb, 1000 - mb, None) for i, mb in enumerate(gpus_mb)
        ),
    )


def record_everything(metrics: MetricsCollector) -> None:
    metrics.record_load("a", "success")
    metrics.record_unload("a")
    metrics.set_models_loaded(1)
    metrics.record_inference("a", "success", 0.02)
    metrics.record_eviction()
    metrics.record_load_wait("served", 0.4)
    metrics.set_models_source(lambda: [READY])
    metrics.set_node(NodeReading({"Ready": 1}, problems=2, prune_guard_blocked=3, settled=True))
    metrics.set_hung_loads(1)
    metrics.record_change_detection(0.3)
    metrics.set_in_flight_source(lambda: {"a": 3})
    metrics.record_reconcile("applied", 0.01)
    metrics.record_scan(1_700_000_000.0)
    metrics.set_watch_mode("inotify")
    metrics.set_reservations({"cpu": 90.0})
    metrics.set_quotas({"cpu": 800.0})
    metrics.set_pressure({"cpu": 300.0}, ("cpu",))
    metrics.update_resources(usage(250.0))


def test_every_promised_metric_has_exactly_its_name_and_labels() -> None:
    metrics = MetricsCollector()
    record_everything(metrics)

    seen = scrape(metrics)

    assert seen.get("model_load_total", model_id="a", status="success") == 1
    assert seen.get("model_unload_total", model_id="a") == 1
    assert seen.get("models_loaded") == 1
    assert seen.get("inference_requests_total", model_id="a", status="success") == 1
    assert seen.get("inference_duration_seconds_count", model_id="a") == 1
    assert seen.get("inference_duration_seconds_sum", model_id="a") == 0.02
    assert seen.get("cpu_usage_percent") == 12.5
    assert seen.get("memory_usage_mb") == 2048
    assert seen.get("memory_usage_percent") == 25
    assert seen.get("gpu_memory_mb", gpu_id="0") == 250
    assert seen.get("splitlearn_reconcile_total", result="applied") == 1
    assert seen.get("splitlearn_reconcile_duration_seconds_sum") == 0.01
    assert seen.get("splitlearn_last_scan_timestamp_seconds") == 1_700_000_000
    assert seen.get("splitlearn_watch_mode", mode="inotify") == 1
    assert seen.get("splitlearn_model_phase", model_id="a", phase="Ready") == 1
    assert seen.get("splitlearn_reservation_mb", device="cpu") == 90
    assert seen.get("splitlearn_quota_mb", device="cpu") == 800
    assert seen.get("splitlearn_others_mb", device="cpu") == 300
    assert seen.get("splitlearn_memory_pressure", device="cpu") == 1
    assert seen.get("splitlearn_evictions_total") == 1
    assert seen.get("splitlearn_load_wait_seconds_count", outcome="served") == 1
    assert seen.get("splitlearn_load_wait_seconds_sum", outcome="served") == 0.4
    assert seen.get("splitlearn_in_flight", model_id="a") == 3
    assert seen.get("splitlearn_model_sync", model_id="a", sync="OutOfSync") == 1
    assert seen.get("splitlearn_model_health", model_id="a", health="Healthy") == 1
    assert seen.get("splitlearn_model_generation", model_id="a") == 4
    assert seen.get("splitlearn_model_observed_generation", model_id="a") == 3
    assert seen.get("splitlearn_model_condition", model_id="a", type="Synced", status="False") == 1
    assert seen.get("splitlearn_model_next_retry_timestamp_seconds", model_id="a") == 1.7e9
    assert seen.get("splitlearn_model_estimated_mb", model_id="a") == 90
    assert seen.get("splitlearn_model_measured_mb", model_id="a", part="weights") == 91.5
    assert seen.get("splitlearn_model_measured_mb", model_id="a", part="activations") == 8.25
    assert seen.get("splitlearn_models", phase="Ready") == 1
    assert seen.get("splitlearn_source_available") == 1
    assert seen.get("splitlearn_problems") == 2
    assert seen.get("splitlearn_prune_guard_blocked_models") == 3
    assert seen.get("splitlearn_state_kept") == 1
    assert seen.get("splitlearn_settled") == 1
    assert seen.get("splitlearn_restart_required") == 0
    assert seen.get("splitlearn_hung_loads") == 1
    assert seen.get("splitlearn_change_detection_seconds_count") == 1
    assert seen.get("splitlearn_change_detection_seconds_sum") == 0.3


def test_nothing_else_is_exposed() -> None:
    metrics = MetricsCollector()
    record_everything(metrics)

    assert scrape(metrics).types == {
        "model_load": "counter",
        "model_unload": "counter",
        "models_loaded": "gauge",
        "inference_requests": "counter",
        "inference_duration_seconds": "histogram",
        "cpu_usage_percent": "gauge",
        "memory_usage_mb": "gauge",
        "memory_usage_percent": "gauge",
        "gpu_memory_mb": "gauge",
        "splitlearn_reconcile": "counter",
        "splitlearn_reconcile_duration_seconds": "histogram",
        "splitlearn_last_scan_timestamp_seconds": "gauge",
        "splitlearn_watch_mode": "gauge",
        "splitlearn_model_phase": "gauge",
        "splitlearn_reservation_mb": "gauge",
        "splitlearn_quota_mb": "gauge",
        "splitlearn_others_mb": "gauge",
        "splitlearn_memory_pressure": "gauge",
        "splitlearn_evictions": "counter",
        "splitlearn_load_wait_seconds": "histogram",
        "splitlearn_batch_size": "histogram",
        "splitlearn_queue_seconds": "histogram",
        "splitlearn_in_flight": "gauge",
        "splitlearn_model_sync": "gauge",
        "splitlearn_model_health": "gauge",
        "splitlearn_model_generation": "gauge",
        "splitlearn_model_observed_generation": "gauge",
        "splitlearn_model_condition": "gauge",
        "splitlearn_model_next_retry_timestamp_seconds": "gauge",
        "splitlearn_model_estimated_mb": "gauge",
        "splitlearn_model_measured_mb": "gauge",
        "splitlearn_version_requests": "gauge",
        "splitlearn_version_errors": "gauge",
        "splitlearn_models": "gauge",
        "splitlearn_source_available": "gauge",
        "splitlearn_problems": "gauge",
        "splitlearn_prune_guard_blocked_models": "gauge",
        "splitlearn_state_kept": "gauge",
        "splitlearn_settled": "gauge",
        "splitlearn_restart_required": "gauge",
        "splitlearn_hung_loads": "gauge",
        "splitlearn_change_detection_seconds": "histogram",
    }


def test_outcomes_are_counted_apart() -> None:
    metrics = MetricsCollector()
    for status in ("success", "success", "failure"):
        metrics.record_load("a", "success" if status == "success" else "failure")
        metrics.record_inference("a", status, 0.2)

    seen = scrape(metrics)

    assert seen.get("model_load_total", model_id="a", status="failure") == 1
    assert seen.get("inference_requests_total", model_id="a", status="success") == 2
    assert seen.get("inference_requests_total", model_id="a", status="failure") == 1
    assert seen.get("inference_duration_seconds_count", model_id="a") == 3
    assert seen.get("inference_duration_seconds_bucket", model_id="a", le="0.1") == 0
    assert seen.get("inference_duration_seconds_bucket", model_id="a", le="0.25") == 3


def test_two_collectors_in_one_process_do_not_meet() -> None:
    one, other = MetricsCollector(), MetricsCollector()

    one.record_load("a", "success")

    assert scrape(other).naming("a") == []


def test_a_given_registry_is_used_and_cannot_be_shared_by_two() -> None:
    registry = CollectorRegistry()
    MetricsCollector(registry).set_models_loaded(2)

    assert registry.get_sample_value("models_loaded") == 2
    with pytest.raises(ValueError, match="Duplicated"):
        MetricsCollector(registry)


def test_a_metric_that_somebody_adds_is_exposed_whatever_its_name() -> None:
    collector = MetricsCollector()
    Gauge("orders_created", "Ours.", registry=collector.registry).set(3)
    assert b"\norders_created 3.0\n" in collector.render()[0]


def test_where_models_stand_is_asked_for_at_each_scrape() -> None:
    metrics = MetricsCollector()
    readings = [ModelReading("a", "Loading", "OutOfSync", "Progressing")]
    metrics.set_models_source(lambda: readings)
    assert scrape(metrics).get("splitlearn_model_phase", model_id="a", phase="Loading") == 1

    readings[:] = [READY]

    phases = [labels for name, labels in scrape(metrics).values if name.endswith("model_phase")]
    assert phases == [(("model_id", "a"), ("phase", "Ready"))]


def test_what_is_not_known_of_a_model_has_no_series() -> None:
    metrics = MetricsCollector()
    metrics.set_models_source(lambda: [ModelReading("a", "Pending", "OutOfSync", "Progressing")])

    assert scrape(metrics).naming("a") == [
        "splitlearn_model_phase",
        "splitlearn_model_sync",
        "splitlearn_model_health",
    ]


def test_two_versions_of_one_generation_have_a_series_each() -> None:
    metrics = MetricsCollector()
    versions = [VersionReading(2, "serves", 90, 1), VersionReading(2, "tried", 10, 0)]
    reading = ModelReading("a", "Updating", "OutOfSync", "Progressing", versions=versions)
    metrics.set_models_source(lambda: [reading])

    seen = scrape(metrics)
    for role, requests, errors in (("serves", 90, 1), ("tried", 10, 0)):
        labels = {"model_id": "a", "generation": "2", "role": role}
        assert seen.get("splitlearn_version_requests", **labels) == requests
        assert seen.get("splitlearn_version_errors", **labels) == errors


def test_the_series_of_models_are_in_the_registry_too_and_say_the_same() -> None:
    metrics = MetricsCollector()
    odd = ModelReading('a"\\\n', "Ready", "Synced", "Healthy", generation=2)
    metrics.set_models_source(lambda: [READY, odd])

    seen = scrape(metrics).values
    of_registry = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if "model_id" in sample.labels
    }

    assert len(of_registry) == 15
    assert {key: value for key, value in seen.items() if key in of_registry} == of_registry


def test_a_phase_that_no_model_is_in_loses_its_series() -> None:
    metrics = MetricsCollector()
    metrics.set_node(NodeReading({"Ready": 1, "Failed": 2}))
    metrics.set_node(NodeReading({"Ready": 3}))

    seen = scrape(metrics)
    assert seen.get("splitlearn_models", phase="Ready") == 3
    assert seen.get("splitlearn_models", phase="Failed") is None


def test_one_watch_mode_is_current() -> None:
    metrics = MetricsCollector()
    for mode in ("inotify", "polling", "polling"):
        metrics.set_watch_mode(mode)

    assert scrape(metrics).get("splitlearn_watch_mode", mode="polling") == 1
    assert scrape(metrics).get("splitlearn_watch_mode", mode="inotify") is None


def test_devices_that_are_gone_lose_their_series() -> None:
    metrics = MetricsCollector()
    metrics.set_reservations({"cpu": 1.0, "cuda:0": 2.0})
    metrics.set_quotas({"cpu": 1.0, "cuda:0": 2.0})
    metrics.set_pressure({"cpu": 1.0, "cuda:0": 2.0}, ("cpu", "cuda:0"))
    metrics.update_resources(usage(1.0, 2.0))

    metrics.set_reservations({"cpu": 5.0})
    metrics.set_quotas({"cpu": 6.0})
    metrics.set_pressure({"cpu": 9.0}, ())
    metrics.update_resources(usage(7.0))

    seen = scrape(metrics)
    assert seen.get("splitlearn_reservation_mb", device="cpu") == 5
    assert seen.get("splitlearn_quota_mb", device="cpu") == 6
    assert seen.get("gpu_memory_mb", gpu_id="0") == 7
    assert seen.get("splitlearn_reservation_mb", device="cuda:0") is None
    assert seen.get("splitlearn_quota_mb", device="cuda:0") is None
    assert seen.get("splitlearn_memory_pressure", device="cpu") == 0
    assert seen.get("splitlearn_memory_pressure", device="cuda:0") is None
    assert seen.get("splitlearn_others_mb", device="cuda:0") is None
    assert seen.get("gpu_memory_mb", gpu_id="1") is None


def test_all_series_of_a_removed_model_go_and_those_of_others_stay() -> None:
    metrics = MetricsCollector()
    in_flight = {"a": 1, "b": 2}
    metrics.set_in_flight_source(lambda: in_flight)
    for model_id in in_flight:
        metrics.record_load(model_id, "success")
        metrics.admit_model(model_id)
        metrics.record_inference(model_id, "success", 0.1)
        metrics.record_inference(model_id, "failure", 0.1)
        metrics.record_unload(model_id)
    before = len(scrape(metrics).naming("b"))

    in_flight.pop("a")
    metrics.remove_model("a")

    assert scrape(metrics).naming("a") == []
    assert len(scrape(metrics).naming("b")) == before > 0


def test_late_records_do_not_bring_a_removed_model_back() -> None:
    metrics = MetricsCollector()
    metrics.record_inference("a", "success", 0.1)
    metrics.remove_model("a")

    metrics.record_inference("a", "success", 0.1)
    metrics.record_inference("a", "failure", 0.1)
    metrics.record_unload("a")

    assert scrape(metrics).naming("a") == []


@pytest.mark.parametrize("by", ["load", "admission"])
def test_a_model_that_comes_back_starts_from_nothing(by: str) -> None:
    metrics = MetricsCollector()
    for _ in range(5):
        metrics.record_inference("a", "success", 0.1)
    metrics.remove_model("a")

    if by == "load":
        metrics.record_load("a", "success")
    else:
        metrics.admit_model("a")
    metrics.record_inference("a", "success", 0.1)

    assert scrape(metrics).get("inference_requests_total", model_id="a", status="success") == 1


def test_removing_a_model_twice_or_an_unknown_one_is_harmless() -> None:
    metrics = MetricsCollector()
    metrics.record_load("a", "success")
    for model_id in ("a", "a", "never"):
        metrics.remove_model(model_id)

    assert scrape(metrics).naming("a") == []


def test_many_models_that_came_and_went_leave_no_series_and_a_bounded_memory() -> None:
    metrics = MetricsCollector()
    for i in range(3000):
        metrics.admit_model(f"m{i}")
        metrics.record_inference(f"m{i}", "success", 0.1)
        metrics.remove_model(f"m{i}")

    assert not any("model_id" in dict(labels) for _, labels in scrape(metrics).values)
    assert len(metrics._removed) == 1024
    assert (metrics._requests, metrics._label_sets) == ({}, {})


def test_threads_record_at_once_and_no_record_is_lost() -> None:
    metrics = MetricsCollector()

    def work() -> None:
        for _ in range(500):
            metrics.record_inference("a", "success", 0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert scrape(metrics).get("inference_requests_total", model_id="a", status="success") == 2000


def test_a_model_removed_while_requests_end_stays_removed() -> None:
    metrics = MetricsCollector()
    metrics.record_load("a", "success")
    removed = threading.Event()

    def work() -> None:
        while not removed.is_set():
            metrics.record_inference("a", "success", 0.001)
        metrics.record_inference("a", "success", 0.001)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    metrics.remove_model("a")
    removed.set()
    for thread in threads:
        thread.join()

    assert scrape(metrics).naming("a") == []


def test_in_flight_is_asked_for_at_each_scrape() -> None:
    metrics, counts = MetricsCollector(), {"a": 1}
    metrics.set_in_flight_source(lambda: counts)
    assert scrape(metrics).get("splitlearn_in_flight", model_id="a") == 1

    counts["a"] = 5

    assert scrape(metrics).get("splitlearn_in_flight", model_id="a") == 5


def test_odd_label_values_survive_the_format() -> None:
    metrics = MetricsCollector()
    metrics.record_reconcile('a "quoted"\nline\\', 0.1)

    assert scrape(metrics).get("splitlearn_reconcile_total", result='a "quoted"\nline\\') == 1
