"""Feeds the metrics from what the manager and the loop report. It measures; it never decides."""

from __future__ import annotations

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.monitoring.metrics import MetricsCollector
from splitlearn_manager.monitoring.readings import UsageReading
from splitlearn_manager.reconcile.reconciler import Reconciler, Turn

# No model can be called so: an id begins with a letter or a digit.
_UNKNOWN = "_unknown"


class MetricsFeed:
    """Connects a node's parts to its `MetricsCollector`."""

    def __init__(
        self,
        metrics: MetricsCollector,
        manager: ModelManager,
        reconciler: Reconciler,
        clock: Clock,
    ) -> None:
        self._metrics = metrics
        self._manager = manager
        self._reconciler = reconciler
        self._clock = clock
        self._known: frozenset[str] = frozenset()
        manager.on_event(self._on_event)
        manager.on_change(self._on_change)
        self._on_change()
        metrics.set_in_flight_source(
            lambda: {i.model_id: i.in_flight for i in manager.table.all},
        )

    def after_request(self, model_id: str, status: str, duration_s: float) -> None:
        """Called after each request. Names that clients made up are counted under one label."""
        known = model_id in self._reconciler.status.phases
        outcome = "success" if status == "OK" else status
        self._metrics.record_inference(model_id if known else _UNKNOWN, outcome, duration_s)

    def after_turn(self, turn: Turn, watch_mode: str) -> None:
        """Called by the loop after each turn."""
        metrics = self._metrics
        metrics.record_scan(self._clock.wall())
        metrics.set_watch_mode(watch_mode)
        metrics.record_reconcile("success", turn.took_s)
        phases = self._reconciler.status.phases
        for model_id, phase in phases.items():
            metrics.set_phase(model_id, str(phase))
        known = frozenset(phases)
        for model_id in self._known - known:
            metrics.remove_model(model_id)
        self._known = known

    def after_error(self) -> None:
        """Called by the loop when a turn broke off."""
        self._metrics.record_reconcile("error", 0.0)

    def measure(self, usage: UsageReading) -> None:
        """Called by the health checker at its interval."""
        self._metrics.update_resources(usage)

    def _on_event(self, event: ManagerEvent) -> None:
        if event.kind is EventKind.LOADED:
            self._metrics.record_load(event.model_id, "success")
        elif event.kind is EventKind.LOAD_FAILED:
            self._metrics.record_load(event.model_id, "failure")
        elif event.kind is EventKind.UNLOADED:
            self._metrics.record_unload(event.model_id)
        elif event.kind is EventKind.EVICTED:
            self._metrics.record_eviction()

    def _on_change(self) -> None:
        snapshot = self._manager.snapshot()
        ledger = snapshot.ledger
        self._metrics.set_models_loaded(len(self._manager.table.all))
        self._metrics.set_reservations({d: ledger.used_mb(d) for d in ledger.budgets_mb})
        self._metrics.set_quotas(ledger.budgets_mb)
