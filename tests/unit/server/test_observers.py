"""What the node does shows in its metrics, and what is gone is gone from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitlearn_manager.monitoring.metrics import MetricsCollector
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.server.observers import MetricsFeed
from support.fakes import Bench, FakeSource, broken, model


class Fed:
    """A loop by hand, and the metrics that are fed from it."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.source = FakeSource()
        self.metrics = MetricsCollector()
        self.reconciler = Reconciler(
            self.source,
            self.bench.manager,
            self.bench.clock,
            on_turn=lambda turn: self.feed.after_turn(turn, "polling"),
            on_error=lambda: self.feed.after_error(),
        )
        self.feed = MetricsFeed(self.metrics, self.bench.manager, self.reconciler, self.bench.clock)

    def declare(self, model_id: str, **keys: object) -> None:
        self.source.declare(model(model_id, **keys), at=self.bench.clock.now())

    def settle(self) -> None:
        while True:
            turn = self.reconciler.turn()
            if not self.bench.executor.waiting and not turn.executed:
                return
            self.bench.executor.run_all()

    def value(self, sample: str, **labels: str) -> float | None:
        """The value of the one sample of that name with these labels among its labels."""
        body, _ = self.metrics.render()
        found = [
            s.value
            for family in text_string_to_metric_families(body.decode())
            for s in family.samples
            if s.name == sample and labels.items() <= s.labels.items()
        ]
        assert len(found) <= 1, f"{sample} {labels}: {found}"
        return found[0] if found else None


@pytest.fixture
def fed() -> Fed:
    return Fed()


def test_loads_unloads_and_what_is_loaded_are_counted(fed: Fed) -> None:
    assert fed.value("models_loaded") == 0
    fed.declare("m")
    fed.settle()
    assert fed.value("model_load_total", model_id="m", status="success") == 1
    assert fed.value("models_loaded") == 1
    assert fed.value("splitlearn_reservation_mb", device="cpu") == 10
    assert fed.value("splitlearn_quota_mb", device="cpu") == 1000
    assert fed.value("splitlearn_watch_mode", mode="polling") == 1


def test_a_failed_load_is_counted_as_a_failure(fed: Fed) -> None:
    fed.bench.runtime.failures["m"] = broken()
    fed.declare("m")
    fed.settle()
    assert fed.value("model_load_total", model_id="m", status="failure") == 1
    assert fed.value("model_load_total", model_id="m", status="success") is None
    assert fed.value("splitlearn_model_phase", model_id="m", phase="Failed") == 1


def test_where_a_model_stands_is_shown_with_its_next_try(fed: Fed) -> None:
    fed.bench.runtime.failures["m"] = broken()
    fed.declare("m")
    fed.settle()
    assert fed.value("splitlearn_model_generation", model_id="m") == 1
    assert fed.value("splitlearn_model_observed_generation", model_id="m") is None
    assert fed.value("splitlearn_model_condition", model_id="m", type="Ready", status="False") == 1
    assert fed.value("splitlearn_model_health", model_id="m", health="Degraded") == 1
    retry_at = fed.value("splitlearn_model_next_retry_timestamp_seconds", model_id="m")
    assert retry_at is not None
    assert retry_at > fed.bench.clock.wall()
    assert fed.value("splitlearn_models", phase="Failed") == 1


def test_the_node_is_shown(fed: Fed) -> None:
    fed.settle()
    assert fed.value("splitlearn_source_available") == 1
    assert fed.value("splitlearn_settled") == 1
    scanned_at = fed.value("splitlearn_last_scan_timestamp_seconds")
    fed.bench.clock.advance(60.0)
    fed.source.state = replace(fed.source.state, source_available=False, source_message="is gone")
    fed.settle()
    assert fed.value("splitlearn_source_available") == 0
    assert fed.value("splitlearn_last_scan_timestamp_seconds") == scanned_at


def test_the_time_from_the_sight_of_a_change_to_its_acceptance_is_measured_once(fed: Fed) -> None:
    fed.bench.clock.advance(1.0)
    fed.declare("m")
    seen = fed.source.state.models["m"]
    earlier = replace(seen, seen_at=seen.accepted_at - 0.3)
    fed.source.state = replace(fed.source.state, models={"m": earlier})
    fed.settle()
    fed.declare("n")  # another mapping, with the same model in it
    fed.settle()
    assert fed.value("splitlearn_change_detection_seconds_count") == 1
    assert fed.value("splitlearn_change_detection_seconds_sum") == pytest.approx(0.3)


def test_a_parked_model_counts_as_evicted(fed: Fed) -> None:
    fed.declare("m", keep_alive_s=1.0)
    fed.settle()
    fed.bench.clock.advance(2.0)
    fed.settle()
    assert fed.value("splitlearn_evictions_total") == 1
    assert fed.value("model_unload_total", model_id="m") == 1
    assert fed.value("models_loaded") == 0


def test_the_series_of_a_model_that_is_gone_are_removed(fed: Fed) -> None:
    fed.declare("m")
    fed.settle()
    fed.feed.after_request("m", "OK", 0.1)
    assert fed.value("inference_requests_total", model_id="m", status="success") == 1
    fed.source.remove("m")
    fed.settle()
    assert b'"m"' not in fed.metrics.render()[0]


def test_requests_are_counted_by_model_and_outcome(fed: Fed) -> None:
    fed.declare("m")
    fed.settle()
    for status in ("OK", "OK", "INTERNAL"):
        fed.feed.after_request("m", status, 0.25)
    assert fed.value("inference_requests_total", model_id="m", status="success") == 2
    assert fed.value("inference_requests_total", model_id="m", status="INTERNAL") == 1
    assert fed.value("inference_duration_seconds_count", model_id="m") == 3


def test_names_that_clients_made_up_have_one_label_between_them(fed: Fed) -> None:
    for number in range(50):
        fed.feed.after_request(f"made-up-{number}", "NOT_FOUND", 0.1)
    assert fed.value("inference_requests_total", model_id="_unknown", status="NOT_FOUND") == 50
    assert b"made-up" not in fed.metrics.render()[0]


def test_a_turn_that_broke_off_is_counted_as_an_error(fed: Fed) -> None:
    fed.settle()
    assert fed.value("splitlearn_reconcile_total", result="success") == 1
    fed.feed.after_error()
    assert fed.value("splitlearn_reconcile_total", result="error") == 1
