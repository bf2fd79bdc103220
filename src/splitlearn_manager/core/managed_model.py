"""The record of one instance, and the leases that requests hold on it.

A *lease* is a request's hold on an instance; once the instance drains it grants no more of them, and
it is closed when the last one is given back. When that happens is the manager's to decide.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.rollout import Traffic, Trial
from splitlearn_manager.errors import SplitlearnError

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel


class ManagedModel:
    """The record of one instance. Made by the manager; read by everybody; changed only by the manager.

    `state`, `spec`, `device` and the timestamps change under the manager's lock. The lease count has
    a lock of its own, because the request path must never wait for the manager's.

    Attributes:
        key: unique name of this instance, `model_id#serial`.
        spec: the version it runs; replaced by `adjust` for keys that are applied in place.
        device: where it runs, such as `cpu` or `cuda:0`.
        loading_since_s, ready_since_s, draining_since_s: on the manager's monotonic clock.
        measured_mb: size of its weights once loaded, in MB (2**20 bytes); None before.
        measured: all that its load measured, and what was estimated before; None until then.
        queue: what the side that serves keeps with it; not looked at here.
        held: it takes no new requests for the time being, because others wait for its room.
        trial: while it is LOADING: it is tried beside the version that serves; None if it is not.
        verified: what was found of its answers before it served, a sentence each.
        error: why it FAILED.
        version: what callers are told of which version answers: the generation.
        largest_batch: up to what size of dimension 0 batches are thought to fit, because a larger one ran
            out of memory; None if none did.
    """

    def __init__(
        self, key: str, spec: ModelSpec, *, owner: Owner, device: str, loading_since_s: float
    ) -> None:
        self.key = key
        self.spec = spec
        self.owner = owner
        self.device = device
        self.state = State.LOADING
        self.loading_since_s = loading_since_s
        self.ready_since_s: float | None = None
        self.draining_since_s: float | None = None
        self.drain_overdue = False
        self.close_started = False
        self.last_used_s = loading_since_s
        self.measured_mb: float | None = None
        self.measured: Measurement | None = None
        self.unload_reason = ""
        self.verified: tuple[str, ...] = ()
        self.trial: Trial | None = None
        self.error: SplitlearnError | None = None
        self.largest_batch: int | None = None
        self.running: RunningModel | None = None
        self.requests = 0
        self.errors = 0
        self.busy_s = 0.0
        self._apart = Traffic()
        self.queue: object = None
        self.held = False
        self._leases = 0
        self._granting = False
        self._lease_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ManagedModel {self.key} {self.state} on {self.device}, {self._leases} leases>"

    @property
    def spec(self) -> ModelSpec:
        """What it was loaded for, or has taken over since without being loaded again."""
        return self._spec

    @spec.setter
    def spec(self, spec: ModelSpec) -> None:
        # As attributes: each request reads them several times.
        self._spec = spec
        self.config = spec.config
        self.model_id = spec.config.model_id
        self.weight = spec.config.weight
        self.version = str(spec.generation)

    # What routing reads of a candidate.

    @property
    def in_flight(self) -> int:
        """Leases held at this moment."""
        return self._leases

    @property
    def idle(self) -> bool:
        return self._leases == 0

    @property
    def traffic(self) -> Traffic:
        """The plain forwards that have ended so far, by which two versions are compared: others go to the
        one that serves alone, and take another time."""
        return Traffic(self.requests, self.errors, self.busy_s).since(self._apart)

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts for people, a sentence each: those of the load, and what has happened since."""
        of_load = (*self.running.notes, *self.verified) if self.running else ()
        if self.largest_batch is None:
            return of_load
        return (
            *of_load,
            f"ran out of memory: batches of at most {self.largest_batch} are thought to fit",
        )

    def shrink_batches(self, failed: int) -> int | None:
        """Takes note that there was no memory for a batch of `failed`. Gives the limit if it is a new one."""
        limit = max(1, failed // 2)
        with self._lease_lock:
            if self.largest_batch is not None and self.largest_batch <= limit:
                return None
            self.largest_batch = limit
            return limit

    def describe(self, reserved_mb: float) -> dict[str, object]:
        """What is known of it, for people and programs."""
        answered = self.requests
        return {
            "model_id": self.model_id,
            "state": str(self.state),
            "owner": str(self.owner),
            "device": self.device,
            "generation": self.spec.generation,
            "model_path": self.config.model_path,
            "endpoint": self.config.effective_endpoint,
            **self._memory(),
            "reserved_mb": reserved_mb,
            "in_flight": self.in_flight,
            "request_count": answered,
            "error_count": self.errors,
            "avg_request_ms": self.busy_s / answered * 1000.0 if answered else 0.0,
            "warmed": bool(self.running and self.running.warmed),
            "notes": list(self.notes),
        }

    def _memory(self) -> dict[str, object]:
        """What was estimated of it and measured, in MB."""
        measured, batch_size = self.measured, self.config.batch_size
        if measured is None:
            return {"memory_mb": self.measured_mb}
        return {
            "memory_mb": measured.total_mb(batch_size),
            "estimated_mb": measured.estimated_mb,
            "weights_mb": measured.weights_mb,
            "activations_mb": measured.activations_mb(batch_size),
        }

    # Leases.

    def open_for_leases(self) -> None:
        """Lets requests in: called once, when the instance becomes READY."""
        with self._lease_lock:
            self._granting = True

    def hold_leases(self, hold: bool) -> None:
        """Lets no new requests in while `hold`; those that run go on. Only for one that does not drain."""
        with self._lease_lock:
            self.held = hold
            self._granting = not hold

    def acquire(self, now: float) -> bool:
        """Takes a lease; False once the instance drains or is held (the caller looks at the new routing
        table)."""
        with self._lease_lock:
            if not self._granting:
                return False
            self._leases += 1
            self.last_used_s = now
            return True

    def release(
        self, now: float, *, duration_s: float, ok: bool, counts: bool = True, plain: bool = True
    ) -> bool:
        """Gives a lease back; True if it was the last one of an instance that drains.

        Args:
            counts: whether it is counted as a request.
            plain: whether it is one of `traffic`.
        """
        with self._lease_lock:
            self._leases -= 1
            self.last_used_s = now
            if counts:
                self.requests += 1
                self.busy_s += duration_s
                self.errors += not ok
            if counts and not plain:
                before = self._apart
                self._apart = Traffic(
                    before.requests + 1, before.errors + (not ok), before.busy_s + duration_s
                )
            return self._leases == 0 and not self._granting

    def stop_leases(self) -> bool:
        """Begins to drain: no new leases. True if none is held."""
        with self._lease_lock:
            self._granting = False
            return self._leases == 0

    def stop_leases_if_idle(self) -> bool:
        """As `stop_leases`, but only if nothing uses the instance; False leaves it as it was."""
        with self._lease_lock:
            if self._leases:
                return False
            self._granting = False
            return True
