"""Feeds the metrics from what the manager and the loop report. It measures; it never decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.monitoring.metrics import MetricsCollector, NodeReading
from splitlearn_manager.monitoring.readings import UsageReading
from splitlearn_manager.monitoring.status_series import ModelReading, VersionReading
from splitlearn_manager.reconcile.conditions import next_retry_s
from splitlearn_manager.reconcile.described import sizes_of
from splitlearn_manager.reconcile.facts import health_of, sync_of
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.turns import Turn

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
        self._desired: Mapping[str, DesiredModel] = {}
        self._detected_s = clock.now()
        self._revision = -1
        manager.on_event(self._on_event)
        manager.on_change(self._on_change)
        self._on_change()
        metrics.set_in_flight_source(
            lambda: {i.model_id: i.in_flight for i in manager.table.all},
        )
        metrics.set_models_source(self._readings)

    def after_request(self, model_id: str, status: str, duration_s: float) -> None:
        """Called after each request. Names that clients made up are counted under one label."""
        known = model_id in self._reconciler.status.phases
        outcome = "success" if status == "OK" else status
        self._metrics.record_inference(model_id if known else _UNKNOWN, outcome, duration_s)

    def after_wait(self, in_vain: bool, duration_s: float) -> None:
        """Called when a request has waited for a model to be loaded."""
        self._metrics.record_load_wait("refused" if in_vain else "served", duration_s)

    def after_turn(self, turn: Turn, watch_mode: str) -> None:
        """Called by the loop after each turn."""
        metrics = self._metrics
        if turn.looked and turn.desired.source_available:
            metrics.record_scan(self._clock.wall())
        metrics.set_watch_mode(watch_mode)
        metrics.record_reconcile("success", turn.took_s)
        self._detect(turn.desired.models)
        status = self._reconciler.status
        if status.revision == self._revision:
            return
        self._revision = status.revision
        known = frozenset(status.phases)
        for model_id in known - self._known:
            metrics.admit_model(model_id)
        for model_id in self._known - known:
            metrics.remove_model(model_id)
        self._known = known
        node = status.node_facts
        metrics.set_node(
            NodeReading(
                models=Counter(str(phase) for phase in status.phases.values()),
                source_available=node.source_available,
                problems=len(node.problems),
                prune_guard_blocked=len(node.prune_guard.model_ids) if node.prune_guard else 0,
                state_kept=not node.state_problem,
                settled=node.settled,
                restart_required=bool(node.info.restart_required),
            )
        )

    def _detect(self, desired: Mapping[str, DesiredModel]) -> None:
        """Measures what was accepted since the turn before."""
        if desired is self._desired:
            return
        self._desired, before_s = desired, self._detected_s
        for model in desired.values():
            if model.accepted_at <= before_s:
                continue
            self._detected_s = max(self._detected_s, model.accepted_at)
            if model.seen_at < model.accepted_at:  # else it was known before: restored, or held
                self._metrics.record_change_detection(model.accepted_at - model.seen_at)

    def _readings(self) -> list[ModelReading]:
        """Where each model stands at this moment."""
        status = self._reconciler.status
        moment = status.moment
        readings = []
        for model_id, entry in status.entries.items():
            facts = entry.facts
            retry_s, sizes = next_retry_s(facts), sizes_of(facts)
            readings.append(
                ModelReading(
                    model_id=model_id,
                    phase=str(entry.phase),
                    sync=str(sync_of(facts)),
                    health=str(health_of(facts)),
                    generation=facts.generation,
                    observed_generation=facts.observed_generation,
                    conditions=[(kind, state) for kind, state, _ in entry.since],
                    next_retry_at=moment.unix(retry_s) if retry_s is not None else None,
                    estimated_mb=sizes.estimated_mb,
                    weights_mb=sizes.weights_mb,
                    activations_mb=sizes.activations_mb,
                    versions=[
                        VersionReading(
                            view.spec.generation,
                            "serves" if view.state is State.READY else "tried",
                            view.requests,
                            view.errors,
                        )
                        for view in facts.views
                        if view.state is State.READY or view.trial
                    ],
                )
            )
        return readings

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
        self._metrics.set_hung_loads(sum(v.state is State.FAILED for v in snapshot.instances))
        self._metrics.set_reservations({d: ledger.used_mb(d) for d in ledger.budgets_mb})
        self._metrics.set_quotas(ledger.budgets_mb)
        others = {device: ceiling.others_mb for device, ceiling in ledger.ceilings.items()}
        self._metrics.set_pressure(others, ledger.pressed)
