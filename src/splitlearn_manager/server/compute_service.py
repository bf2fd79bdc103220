"""From a request to the model that answers it: routing, leases, and what a refusal looks like.

    request name ─► router ─► READY instance ─► lease ─► batcher (plain forwards), or its compute function
                       │      or a version that is tried beside it (plain forwards, a share of them)
                       │
                       └ nobody READY: evicted or pending models are waited for, within the deadline (plain
                         forwards in the waiting room, others on their threads); loading, draining and
                         failed ones answer "try again"; unknown names do not exist; a request that names
                         nobody asks for the model that was parked last

The tensors, the messages and the statuses are `splitlearn_comm`'s.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import NotReady, OutOfMemory, UnknownTarget
from splitlearn_comm.server.backend import Health, Inference, Opened, ServiceInfo
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.errors import ModelNotFound, ModelUnavailable, SplitlearnError
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.routing.router import ModelRouter
from splitlearn_manager.routing.table import RoutingTable
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.refusals import refusal_of
from splitlearn_manager.server.shadows import Shadows
from splitlearn_manager.server.waiting_room import LONGEST_WAIT_S, WaitingRoom

# Leases are refused only in the microseconds between the swap of the table and the next read of it.
_LEASE_ROUNDS = 1000
MOST_WAITING = 512
"""Half of the requests that the network lets wait: those for models that are there must have room."""
# Phases are those of the last turn: a model that is Ready and not in the table was parked since. One that is
# updated and not in the table makes room for its new version, which is there soon.
_WAKES_ON_REQUEST = frozenset({Phase.EVICTED, Phase.PENDING, Phase.READY, Phase.UPDATING})


class ManagedBackend:
    """The node as `splitlearn_comm`'s servicer sees it.

    Args:
        batcher: runs plain forwards.
        max_waiters: requests that may wait for models each on a thread, at least 1: those of training and
            with a cache. So many threads are lost to others meanwhile, so it should be less than there are.
        most_waiting: plain forwards that may wait for models.
        observe: called after each request with model id, status name and seconds.
        draw: uniform random numbers in [0, 1), by which requests go to versions that are tried.
        observe_wait: called after each wait for a model with whether it was in vain, and seconds.
    """

    def __init__(
        self,
        manager: ModelManager,
        router: ModelRouter,
        reconciler: Reconciler,
        batcher: Batcher,
        *,
        version: str,
        max_waiters: int,
        most_waiting: int = MOST_WAITING,
        observe: Callable[[str, str, float], None],
        observe_wait: Callable[[bool, float], None] = lambda in_vain, duration_s: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._manager = manager
        self._router = router
        self._reconciler = reconciler
        self._batcher = batcher
        self._version = version
        self._codec = TensorCodec()
        self._draw = draw
        self._shadows = Shadows(manager, batcher)
        self._waiters = threading.Semaphore(max_waiters)
        self._room = WaitingRoom(
            reconciler, self._entered, most=most_waiting, observe_wait=observe_wait
        )
        self._observe = observe
        self._observe_wait = observe_wait
        # Models that requests wait for at this moment, and how many: while one of them loads, further
        # requests join the wait instead of being sent away.
        self._awaited: Counter[str] = Counter()
        self._awaited_lock = threading.Lock()
        self.draining = False

    @property
    def version(self) -> str:
        return self._version

    def enter(self, model_id: str, inference: Inference) -> bool:
        """Queues a plain forward for the READY model that answers it, or has it wait for one.

        Raises Overloaded, NotReady, UnknownTarget, or InvalidRequest for bytes that are no tensor.
        """
        if not self._entered(model_id, inference):
            try:
                awaited = self._asleep(model_id)
            except SplitlearnError as error:
                raise refusal_of(error) from None
            self._room.add(awaited, model_id, inference)
        return True

    def _entered(self, model_id: str, inference: Inference) -> bool:
        """Whether there is a READY model just now, and its batcher has the request."""
        for _ in range(_LEASE_ROUNDS):
            table = self._manager.table
            try:
                chosen = self._router.route(model_id, table)
            except (ModelNotFound, ModelUnavailable):
                return False
            if self._leased(chosen, table, inference):
                return True
        raise NotReady(f"model {model_id!r} is being replaced; try again")

    def _leased(
        self, chosen: ManagedModel, table: RoutingTable[ManagedModel], inference: Inference
    ) -> bool:
        """Queue a request for an instance, or for the version that is tried beside it."""
        tried = table.trials.get(chosen.model_id) if table.trials else None
        trial = tried.version.trial if tried is not None and not tried.shadow else None
        if tried is not None and self._draw() * 100 >= tried.percent:
            tried = None
        lease = None
        if tried is not None and not tried.shadow:
            lease = self._manager.try_lease(tried.version)
        lease = lease or self._manager.try_lease(chosen)
        if lease is None:
            return False
        try:
            packed = inference.unpack(self._codec)
            if tried is not None and tried.shadow:
                inference, packed = self._shadows.follow(tried.version, inference, packed)
            self._batcher.submit(lease, inference, packed)
            if trial is not None:
                trial.watch(lease, partial(_gave_up, inference))
        except BaseException:
            lease.ok = False
            lease.release()
            raise
        return True

    @contextmanager
    def open(
        self,
        model_id: str,
        *,
        forward_id: str | None = None,
        remaining_s: float | None = None,
    ) -> Iterator[Opened]:
        """Holds a lease on the model that answers. Raises NotReady or UnknownTarget."""
        if forward_id is not None and not model_id:
            raise UnknownTarget(f"no model keeps a forward pass {forward_id!r}")
        try:
            lease = self._lease(model_id, remaining_s)
        except SplitlearnError as error:
            raise refusal_of(error) from None
        lease.plain = False
        with lease:
            running = lease.instance.running
            if running is None:
                raise NotReady(f"model {lease.instance.model_id!r} is being unloaded")
            try:
                with working_for(remaining_s):
                    instance = lease.instance
                    yield Opened(
                        instance.model_id, running.compute_function, self._codec, instance.version
                    )
            except OutOfMemory as error:
                self._manager.ran_out_of_memory(lease.instance, error.batch)
                raise

    def health(self) -> Health:
        ready = len(self._manager.table.all)
        if self.draining:
            return Health("draining", "the node is shutting down")
        return Health(message=f"{ready} models ready")

    def service_info(self) -> ServiceInfo:
        served = self._manager.table.all
        return ServiceInfo(
            service_name="splitlearn-manager",
            device=",".join(sorted({instance.device for instance in served})) or "cpu",
            custom_info={
                "models": ",".join(instance.model_id for instance in served),
                **{f"model.{i.model_id}": f"READY on {i.device}" for i in served},
            },
        )

    def observe(self, model_id: str, status: str, duration_s: float) -> None:
        self._observe(model_id, status, duration_s)

    def _lease(self, name: str, remaining_s: float | None) -> Lease:
        try:
            return self._routed(name)
        except (ModelNotFound, ModelUnavailable):
            pass
        wait_s = LONGEST_WAIT_S if remaining_s is None else min(remaining_s, LONGEST_WAIT_S)
        until = monotonic() + wait_s
        while True:
            with self._waiting_for(self._asleep(name), until - monotonic(), name):
                try:
                    return self._routed(name)
                except (ModelNotFound, ModelUnavailable):
                    # Taken away between its READY and our lease, for an update or by Python.
                    if monotonic() >= until:
                        raise ModelUnavailable(f"model {name!r} was unloaded; try again") from None

    def _routed(self, name: str) -> Lease:
        chosen: ManagedModel | None = None
        for _ in range(_LEASE_ROUNDS):
            chosen = self._router.route(name, self._manager.table)
            if (lease := self._manager.try_lease(chosen)) is not None:
                return lease
        raise ModelUnavailable(f"model {name!r} is being replaced; try again")

    def _asleep(self, name: str) -> str:
        """The id of a model of that name (or endpoint) that a request may wake.

        Raises ModelNotFound or ModelUnavailable if there is none.
        """
        phases = self._reconciler.status.phases
        known = self._reconciler.names.get(name, ()) if name else self._parked_last()
        for model_id in known:
            phase = phases.get(model_id)
            # One that has served and loads is on its way back, as evicted ones are, or its next version is.
            returns = phase is Phase.LOADING and self._reconciler.has_served(model_id)
            returns = returns or (phase is Phase.FAILED and self._reconciler.status.comes(model_id))
            if phase in _WAKES_ON_REQUEST or returns or self._is_awaited(model_id):
                return model_id
        if known and name:
            states = ", ".join(f"{m} is {self._reconciler.status.in_short(m)}" for m in known)
            raise ModelUnavailable(f"not ready: {states}; try again")
        if not name:
            raise ModelUnavailable("no model is READY; try again")
        if (instance := self._manager.get_model(name)) is not None:
            raise ModelUnavailable(f"model {name!r} is {instance.state}; try again")
        raise ModelNotFound(f"no model or endpoint is called {name!r}")

    def _parked_last(self) -> tuple[str, ...]:
        """The model that nobody named is for, if any: one that is waited for, or the last to be parked."""
        phases = self._reconciler.status.phases
        awaited = [model_id for model_id in phases if self._is_awaited(model_id)]
        just_parked = [model_id for model_id, phase in phases.items() if phase is Phase.READY]
        parked = [m for m in self._reconciler.parked if phases.get(m) is Phase.EVICTED]
        return (*awaited, *just_parked, *parked)[:1]

    def _is_awaited(self, model_id: str) -> bool:
        return self._room.waits_for(model_id) or model_id in self._awaited

    @contextmanager
    def _waiting_for(self, model_id: str, wait_s: float, name: str) -> Iterator[None]:
        """Waits until the model serves under that name; it goes on serving until the end of the block.

        Raises ModelUnavailable if it does not serve in time, or too many wait already.
        """
        if not self._waiters.acquire(blocking=False):
            raise ModelUnavailable(f"model {model_id!r} is asked for by many already; try again")
        with self._awaited_lock:
            self._awaited[model_id] += 1
        began, in_vain = monotonic(), True
        try:
            with self._reconciler.waiting_for(model_id, wait_s, name):
                in_vain = False
                self._observe_wait(in_vain, monotonic() - began)
                yield
        finally:
            if in_vain:
                self._observe_wait(in_vain, monotonic() - began)
            with self._awaited_lock:
                self._awaited[model_id] -= 1
                if not self._awaited[model_id]:
                    del self._awaited[model_id]
            self._waiters.release()


def _gave_up(inference: Inference) -> bool:
    """Whether its caller waits no more. One that is gone is not told from one that has its answer."""
    return inference.until_s is not None and monotonic() >= inference.until_s
