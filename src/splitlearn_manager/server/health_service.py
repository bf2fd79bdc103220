"""`grpc.health.v1` for the node and for each model, and server reflection.

The service name "" stands for the node, a model's id (or endpoint) for the model. Both services run
on threads of their own, so that a probe is answered while all compute threads are busy. A stream of
reflection keeps its thread for as long as its caller keeps it open, which must not cost a probe its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from splitlearn_comm.server.grpc_server import SERVICE, OnPool
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.routing.table import RoutingTable

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService:
    """Tells probes which models serve. `publish` and `drain` may be called from any thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="grpc-health")
        self._servicer = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=self._pool
        )
        self._published: dict[str, int] = {}

    def register(self, server: grpc.Server) -> None:
        """Adds the service; the node itself is SERVING from now on."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        for name in ("", SERVICE):
            self._set(name, _SERVING)

    def publish(self, table: RoutingTable[ManagedModel], names: Iterable[str]) -> None:
        """Brings the models' health up to date: SERVING if READY, else NOT_SERVING if declared."""
        ready = {*table.by_model, *table.by_endpoint}
        known = {*ready, *names}
        for name in self._published.keys() - known - {"", SERVICE}:
            self._set(name, _UNKNOWN)
        for name in known:
            self._set(name, _SERVING if name in ready else _NOT_SERVING)

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on: load balancers look elsewhere."""
        self._servicer.enter_graceful_shutdown()
        self._pool.shutdown(wait=False)

    def _set(self, name: str, status: int) -> None:
        if self._published.get(name) != status:
            self._published[name] = status
            self._servicer.set(name, status)


def enable_reflection(server: grpc.Server) -> None:
    """Lets tools such as grpcurl ask which services there are."""
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    pool = ThreadPoolExecutor(2, thread_name_prefix="grpc-reflection")
    tells = OnPool(reflection.ReflectionServicer(names).ServerReflectionInfo, pool)
    servicer = SimpleNamespace(ServerReflectionInfo=tells)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
