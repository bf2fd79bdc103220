"""Owns the models of a node, for callers that wait: load, unload, reload, shutdown.

They are the same operations as the reconciler's (`operations`), one after another; here their ends are waited
for, and what went wrong is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.eviction import AdmissionRequest, Admitted, AwaitRoom, MakeRoom
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.model_reader import over_own_limit
from splitlearn_manager.core.operations import Operations
from splitlearn_manager.errors import (
    AdmissionError,
    InsufficientMemory,
    LoadError,
    LoadTimeout,
    MaxModels,
    MemoryPressure,
    ModelNotFound,
    OperationInProgress,
    OverMemoryLimit,
    SplitlearnError,
)


class ModelManager(Operations):
    """See the module's text; the arguments are those of `Operations`, all optional and keyword-only."""

    def load_model(self, config: ModelConfig) -> bool:
        """Loads a model and waits until it serves; evicts the least recently used where room is short.

        Returns True. Raises the typed error of what went wrong: AdmissionError, LoadError, or
        OperationInProgress if the id is taken.
        """
        self._await_unloads(config.model_id)
        if (held := self._instances.get(config.model_id)) is not None and held.state is State.READY:
            raise OperationInProgress(
                f"model {config.model_id!r} is loaded already: reload_model() loads its files anew",
                reason="AlreadyLoaded",
            )
        self._load_and_wait(ModelSpec.of(config), Owner.API)
        return True

    def reload_model(self, model_id: str) -> bool:
        """Loads the model's files anew: beside the old version where both fit, else in its place.

        Returns True. Raises ModelNotFound, or what `load_model` raises; then the old version goes on
        serving (unless both did not fit and it had to go first). Raises OperationInProgress if it had to,
        and its requests still run `drain_timeout_s` later (the new one is loaded when they end).
        """
        self._await_unloads(model_id)
        served = self._instances.table.by_model.get(model_id)
        if served is None:
            raise ModelNotFound(f"no model {model_id!r} is loaded")
        config = served.config
        weights = self._reader.fingerprint(config)
        spec = ModelSpec.of(config, weights=weights, generation=served.spec.generation)
        mode = served.config.update
        mb = self.size_mb(spec)
        beside = self._request(spec, mb, may_evict=mode == "surge")
        fits = isinstance(self._instances.decide(beside, served.owner), Admitted)
        if mode == "surge" or (mode == "auto" and fits):
            self._load_and_wait(spec, served.owner)
            return True
        serial = self._outcome_serial(model_id)
        if not self.begin_replace(spec, served.device, mb):
            raise InsufficientMemory(
                f"the new version of {model_id!r} needs {mb:,.0f} MB: too much"
            )
        self._wait(lambda: self._outcome_serial(model_id) > serial or _is_overdue(served))
        if self._outcome_serial(model_id) == serial:
            raise OperationInProgress(
                f"model {model_id!r} still answers {served.in_flight} requests; it takes no new ones, and "
                "its new version is loaded when they end",
                reason="DrainOverdue",
            )
        outcome = self.snapshot().outcomes[model_id]
        if not outcome.ok:
            raise LoadError(outcome.message, reason=outcome.reason)
        return True

    def unload_model(self, model_id: str) -> bool:
        """Drains and unloads a model and waits until its memory is back.

        Returns True. Raises ModelNotFound if it is not loaded, OperationInProgress if requests still
        run `drain_timeout_s` later (it is unloaded when they end), SplitlearnError (reason
        `OwnedByDirectory`) if a file declares it.
        """
        instance = self._instances.get(model_id)
        if instance is None or instance.state is State.FAILED:
            raise ModelNotFound(f"no model {model_id!r} is loaded")
        if instance.owner is Owner.DIRECTORY:
            raise SplitlearnError(
                f"model {model_id!r} is declared by a file, and would be loaded again: remove the file",
                reason="OwnedByDirectory",
            )
        if instance.state is State.READY:
            self._await_unloads(model_id)
        if not self.begin_unload(model_id, "Requested") and instance.state is not State.UNLOADING:
            raise OperationInProgress(
                f"model {model_id!r} is {instance.state}; unload it when it serves"
            )
        self._wait(lambda: instance.state is State.GONE or _is_overdue(instance))
        if instance.state is not State.GONE:
            raise OperationInProgress(
                f"model {model_id!r} still answers {instance.in_flight} requests; it takes no new ones "
                "and is unloaded when they end",
                reason="DrainOverdue",
            )
        return True

    def shutdown(self, grace_s: float | None = None) -> None:
        """Refuses new loads, drains and unloads everything, and waits for it.

        Args:
            grace_s: longest wait; by default each model's own `drain_timeout_s`. What still runs then
                is left to its end.
        """
        self._closing = True
        began = self._clock.now()
        for instance in self._instances.all():
            self._instances.cancel_successor(instance.model_id)
            if instance.trial is not None:
                self.cancel_rollout(instance.model_id, instance.key)
            if instance.state is State.READY:
                self.begin_unload(instance.model_id, "Shutdown", key=instance.key)

        def settled() -> bool:
            if grace_s is not None and self._clock.now() - began >= grace_s:
                return True
            return all(
                i.state is State.FAILED or i.state is State.LOADING or i.drain_overdue
                for i in self._instances.all()
            )

        self._wait(settled, at_most_s=grace_s)

    def get_model(self, model_id: str) -> ManagedModel | None:
        """The record of the instance that serves the model (else of its newest), or None."""
        return self._instances.get(model_id)

    def get_model_info(self, model_id: str) -> dict[str, object]:
        """What is known of a model. Raises ModelNotFound."""
        instance = self._instances.get(model_id)
        if instance is None:
            raise ModelNotFound(f"no model {model_id!r} is loaded")
        return instance.describe(self._instances.reserved_mb(instance))

    def list_models(self) -> list[dict[str, object]]:
        """What is known of every model: of the instance that serves it, else of its newest one."""
        ids = dict.fromkeys(instance.model_id for instance in self._instances.all())
        found = [self._instances.get(model_id) for model_id in ids]
        return [i.describe(self._instances.reserved_mb(i)) for i in found if i is not None]

    def get_statistics(self) -> dict[str, object]:
        """Counts over all models: loaded, requests, errors, and MB reserved and allowed on each device."""
        instances = self._instances.all()
        ledger = self._instances.ledger
        return {
            "models_loaded": sum(i.state is State.READY for i in instances),
            "max_models": ledger.max_models,
            "total_requests": sum(i.requests for i in instances),
            "total_errors": sum(i.errors for i in instances),
            "reserved_mb": {device: ledger.used_mb(device) for device in ledger.budgets_mb},
            "budget_mb": dict(ledger.budgets_mb),
        }

    # Inside.

    def _request(self, spec: ModelSpec, mb: float, *, may_evict: bool) -> AdmissionRequest:
        return AdmissionRequest(
            model_id=spec.model_id,
            devices=self.devices_for(spec.config),
            mb=mb,
            priority=spec.config.priority,
            demanded_s=self._clock.now(),
            may_evict=may_evict,
        )

    def _await_unloads(self, model_id: str) -> None:
        """Waits for an earlier version that is on its way out, unless its requests take too long."""
        self._wait(
            lambda: (
                not any(
                    i.model_id == model_id and i.state is State.UNLOADING and not i.drain_overdue
                    for i in self._instances.all()
                )
            )
        )

    def _load_and_wait(self, spec: ModelSpec, owner: Owner) -> None:
        """Makes room, loads, waits; raises what went wrong."""
        mb = self.size_mb(spec)
        if (problem := over_own_limit(spec.config, mb, self.measured(spec))) is not None:
            raise OverMemoryLimit(problem)
        request = self._request(spec, mb, may_evict=True)
        while (instance := self._try_admitted(request, spec, owner, mb)) is None:
            pass
        self._wait(lambda: _load_has_ended(instance))
        if instance.error is not None:
            raise instance.error

    def _try_admitted(
        self, request: AdmissionRequest, spec: ModelSpec, owner: Owner, mb: float
    ) -> ManagedModel | None:
        """One step towards a load: starts it, or makes room, or waits for room; raises if there is none."""
        held = self._instances.ledger
        decision = self._instances.decide(request, owner)
        if isinstance(decision, Admitted):
            return self.begin_load(spec, owner, decision.device, mb)
        if isinstance(decision, MakeRoom):
            for victim in decision.victims:
                self.begin_evict(victim.model_id, victim.key, "MadeRoom")
        elif isinstance(decision, AwaitRoom):
            # Either that memory is back, or it takes too long.
            self._wait(
                lambda: (
                    self._instances.ledger is not held
                    or not isinstance(self._instances.decide(request, owner), AwaitRoom)
                )
            )
        else:
            message = f"model {spec.model_id!r}: {decision.message}"
            raise _ADMISSION_ERRORS.get(decision.reason, AdmissionError)(
                message, reason=decision.reason
            )
        return None

    def _outcome_serial(self, model_id: str) -> int:
        outcome = self.snapshot().outcomes.get(model_id)
        return outcome.serial if outcome else 0

    def _wait(self, done: Callable[[], bool], *, at_most_s: float | None = None) -> None:
        """Blocks the caller (a Python API call) until `done`; keeps time-outs going meanwhile."""
        while True:
            due = self.tick()
            if at_most_s is not None:
                due = at_most_s if due is None else min(due, at_most_s)
            with self._changed:
                if done():
                    return
                self._changed.wait(due)


_ADMISSION_ERRORS: Mapping[str, type[AdmissionError]] = {
    "InsufficientMemory": InsufficientMemory,
    "MaxModels": MaxModels,
    "MemoryPressure": MemoryPressure,
}


def _is_overdue(instance: ManagedModel) -> bool:
    """Whether it drains for longer than it should, for requests that still run."""
    return instance.drain_overdue and not instance.idle


def _load_has_ended(instance: ManagedModel) -> bool:
    """Whether it serves, or has failed and its memory is back (unless its loader is not to be waited for)."""
    if instance.state is State.LOADING:
        return False
    given_up = isinstance(instance.error, LoadTimeout)
    return instance.error is None or given_up or instance.state is State.GONE
