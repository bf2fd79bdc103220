"""One compute function on one port: `GRPCComputeServer`, what user code starts.

It sets the function up, listens, and tears the function down again after the last request. Serving several
models, loading and unloading them is not its business: that is another `ComputeBackend`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

import grpc

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.compute_function import ComputeFunction
from splitlearn_comm.server.addresses import join_address
from splitlearn_comm.server.backend import SingleFunctionBackend
from splitlearn_comm.server.grpc_server import (
    DEFAULT_MAX_MESSAGE_LENGTH,
    DEFAULT_MAX_STREAMS,
    DEFAULT_MAX_WAITING,
    Interceptor,
    NetworkServer,
    build_server,
)
from splitlearn_comm.server.monitoring import LoadMonitor, SystemMonitor
from splitlearn_comm.server.servicer import ComputeServicer

_log = logging.getLogger(__name__)


class GRPCComputeServer:
    """Serves one compute function; also a context manager that starts and stops it.

    Args:
        compute_fn: answers every request, whatever model_id it names.
        host: the address to listen on; other machines reach only one that is not loopback.
        port: 0 picks a free one, see the attribute `port` once started.
        max_workers: requests computed at once.
        max_message_length: bytes, each way.
        codec: how tensors travel; plain float32 unless given. Clients must use the same.
        version: what clients are told.
        max_waiting: requests that may wait beyond those computed at once.
        max_streams: monitoring streams at once.
        monitor: gives the machine's load; the real one unless given.
        credentials: TLS; plain text without.
        interceptors: as for `grpc.server`; see `splitlearn_comm.server.grpc_server.build_server`.
    """

    def __init__(
        self,
        compute_fn: ComputeFunction,
        host: str = "127.0.0.1",
        port: int = 50051,
        max_workers: int = 10,
        *,
        max_message_length: int = DEFAULT_MAX_MESSAGE_LENGTH,
        codec: TensorCodec | None = None,
        version: str = "1.0",
        max_waiting: int = DEFAULT_MAX_WAITING,
        max_streams: int = DEFAULT_MAX_STREAMS,
        monitor: LoadMonitor | None = None,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[Interceptor] = (),
    ) -> None:
        self.compute_fn = compute_fn
        self.host = host
        self.port = port
        self._max_workers = max_workers
        self._max_message_length = max_message_length
        self._codec = codec
        self._version = version
        self._max_waiting = max_waiting
        self._max_streams = max_streams
        self._monitor = monitor
        self._credentials = credentials
        self._interceptors = tuple(interceptors)
        self._lifecycle = threading.Lock()
        self._running: NetworkServer | None = None

    def start(self) -> None:
        """Set the function up and begin to answer.

        Raises:
            RuntimeError: if the server runs already.
            ServerStartError: if the port is taken or the address is not one of this machine.
        """
        with self._lifecycle:
            if self._running is not None:
                raise RuntimeError(f"the server runs already, on port {self.port}")
            self.compute_fn.setup()
            try:
                self._running = self._build()
                self._running.start()
            except BaseException:
                self.compute_fn.teardown()
                raise
            self.port = self._running.port
        _log.info("serving=%s address=%s", self._version, join_address(self.host, self.port))

    def stop(self, grace: float = 5.0) -> None:
        """Stop answering, wait up to `grace` seconds for running requests, tear the function down.

        A server that does not run is left as it is.
        """
        with self._lifecycle:
            if self._running is None:
                return
            finished = self._running.stop(grace)
            self._running = None
            if not finished:
                _log.warning("stopped=unfinished grace_s=%s a model still runs", grace)
            self.compute_fn.teardown()

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped; True if `timeout` seconds passed first."""
        running = self._running
        return running.wait_for_termination(timeout) if running is not None else False

    def __enter__(self) -> GRPCComputeServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _build(self) -> NetworkServer:
        backend = SingleFunctionBackend(self.compute_fn, self._codec, self._version)
        servicer = ComputeServicer(backend, self._monitor or SystemMonitor())
        return build_server(
            servicer,
            join_address(self.host, self.port),
            max_workers=self._max_workers,
            max_waiting=self._max_waiting,
            max_streams=self._max_streams,
            max_message_length=self._max_message_length,
            credentials=self._credentials,
            interceptors=self._interceptors,
        )
