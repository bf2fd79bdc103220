"""`grpc.health.v1` for the node and for each model, and server reflection.

The service name "" stands for the node, a model's id (or endpoint) for the model. Both services run on
threads of their own, so that a probe is answered while all others are busy. A stream of reflection
keeps its thread for as long as its caller keeps it open, which must not cost a probe its own; whoever
watches a name keeps none.

The service is not the one that comes with gRPC's library: that one has the threads of all servers of a
process be those of the latest, and keeps every name that a caller ever watched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from splitlearn_comm.server.grpc_server import SERVICE, OnPool
from splitlearn_comm.server.pool import BoundedPool
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.routing.table import RoutingTable

_WORKERS = 2
_WAITING = 64
"""Calls that wait for a thread. Further ones are refused, so that nobody can fill the memory with them."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@dataclass(frozen=True)
class _StaysOpen(OnPool):
    """A handler of calls that stay open until their callers have enough, or the server stops."""

    experimental_non_blocking: bool = False
    ends_at_stop: bool = True

    def __call__(self, *arguments: object) -> object:
        return self.handle(*arguments)


class HealthService:
    """Tells probes which models serve. `publish` and `drain` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._published: dict[str, int] = {}
        self._watching: dict[str, set[Callable[[Any], None]]] = {}
        self._draining = False

    def register(self, server: grpc.Server) -> None:
        """Adds the service; the node itself is SERVING from now on."""
        pool = BoundedPool("grpc-health", _WORKERS, _WAITING)
        servicer = SimpleNamespace(
            Check=OnPool(self._check, pool),
            List=OnPool(self._list, pool),
            Watch=_StaysOpen(self._watch, pool, experimental_non_blocking=True),
        )
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        with self._lock:
            for name in ("", SERVICE):
                self._set(name, _SERVING)

    def publish(self, table: RoutingTable[ManagedModel], names: Iterable[str]) -> None:
        """Brings the models' health up to date: SERVING if READY, else NOT_SERVING if declared."""
        ready = {*table.by_model, *table.by_endpoint}
        known = {*ready, *names}
        with self._lock:
            if self._draining:
                return
            for name in self._published.keys() - known - {"", SERVICE}:
                del self._published[name]
                self._tell(name)
            for name in known:
                self._set(name, _SERVING if name in ready else _NOT_SERVING)

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on: load balancers look elsewhere."""
        with self._lock:
            self._draining = True
            for name in self._published:
                self._set(name, _NOT_SERVING)

    # The lock is held.

    def _set(self, name: str, status: int) -> None:
        if self._published.get(name) != status:
            self._published[name] = status
            self._tell(name)

    def _tell(self, name: str) -> None:
        for send in self._watching.get(name, ()):
            send(self._answer(name))

    def _answer(self, name: str) -> Any:
        return health_pb2.HealthCheckResponse(status=self._published.get(name, _UNKNOWN))

    # Calls.

    def _check(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            if request.service not in self._published:
                context.set_code(grpc.StatusCode.NOT_FOUND)
            return self._answer(request.service)

    def _list(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            statuses = {name: self._answer(name) for name in self._published}
        return health_pb2.HealthListResponse(statuses=statuses)

    def _watch(
        self, request: Any, context: grpc.ServicerContext, send: Callable[[Any], None]
    ) -> None:
        name = request.service
        with self._lock:
            self._watching.setdefault(name, set()).add(send)
            send(self._answer(name))
        if not context.add_callback(lambda: self._leave(name, send)):
            self._leave(name, send)  # the caller has gone already

    def _leave(self, name: str, send: Callable[[Any], None]) -> None:
        with self._lock:
            watching = self._watching.get(name, set())
            watching.discard(send)
            if not watching:
                self._watching.pop(name, None)


def enable_reflection(server: grpc.Server) -> None:
    """Lets tools such as grpcurl ask which services there are."""
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    pool = BoundedPool("grpc-reflection", _WORKERS, _WAITING)
    tells = _StaysOpen(reflection.ReflectionServicer(names).ServerReflectionInfo, pool)
    servicer = SimpleNamespace(ServerReflectionInfo=tells)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
