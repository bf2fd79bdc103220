"""`ManagedServer`: the whole node in one object, from Python or from a directory of YAML files.

It puts the parts together (manager, router, reconciler, gRPC, HTTP) and starts and stops them in the
right order. It decides nothing itself: what is loaded is the caller's or the directory's wish, and how
that is done is the manager's and the reconciler's business.

Stopping: refuse new requests, let running ones end, unload the models, close the ports.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from splitlearn_comm.core.errors import NotReady, ServerStartError
from splitlearn_comm.server.addresses import join_address
from splitlearn_comm.server.grpc_server import NetworkServer, build_server
from splitlearn_comm.server.monitoring import SystemMonitor
from splitlearn_comm.server.servicer import ComputeServicer
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.core.clock import Clock, SystemClock
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.resource_manager import ResourceManager
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import (
    NO_INSTRUCTIONS,
    DesiredModel,
    DesiredState,
    Instructions,
    Source,
)
from splitlearn_manager.desired.watcher import Watcher
from splitlearn_manager.errors import ServerError
from splitlearn_manager.logs import log_event
from splitlearn_manager.monitoring.health import HealthChecker
from splitlearn_manager.monitoring.http import MonitoringServer
from splitlearn_manager.monitoring.metrics import MetricsCollector
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import NodeInfo
from splitlearn_manager.reconcile.store import DirectoryFiles, Store
from splitlearn_manager.reconcile.turns import Turn
from splitlearn_manager.routing.router import ModelRouter
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.compute_service import ManagedBackend
from splitlearn_manager.server.golden import record_golden
from splitlearn_manager.server.health_service import HealthService, enable_reflection
from splitlearn_manager.server.live_settings import LiveSettings
from splitlearn_manager.server.node_api import node_answers
from splitlearn_manager.server.observers import MetricsFeed
from splitlearn_manager.server.presence import Presence
from splitlearn_manager.server.state_dir import compiled_of, record_of, state_dir_for
from splitlearn_manager.server.states import NodeStates
from splitlearn_manager.server.threads import ThreadPlan, processors
from splitlearn_manager.version import VERSION

log = logging.getLogger(__name__)

# The loop has stopped working if no turn has ended for so many times its longest pause.
_DEAD_AFTER_RESYNCS = 30
_LOOPBACK = ("127.", "localhost", "::1", "[::1]")


class NothingDeclared:
    """The source of a node without a directory: its models come from the Python API alone."""

    def restore(self, models: Iterable[DesiredModel]) -> None:
        """Nothing is kept for such a node."""

    def look(self, now: float, instructions: Instructions = NO_INSTRUCTIONS) -> DesiredState:
        return DesiredState(source_available=True, complete=True)


class ManagedServer:
    """A node that serves models over gRPC.

    Args:
        config: addresses, limits, pace; the defaults of `ServerConfig` unless given.
        directory: declares models, see the reconciler; None serves only what `load_model` loads.
        live_settings: whether the directory's server.yaml is followed while the node runs.
        manager: owns the models; one with the config's limits unless given.
        on_progress: called with (done, total) while many files are read at the start.

    Attributes:
        model_manager, resource_manager, router, health_checker, metrics, reconciler, batcher,
            threads: its parts.
        state_dir: where it keeps what outlives it; None without a directory.
        port, metrics_port: what it listens on, once started.
    """

    def __init__(
        self,
        config: ServerConfig | None = None,
        *,
        directory: str | Path | None = None,
        live_settings: bool = True,
        manager: ModelManager | None = None,
        clock: Clock | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config or ServerConfig()
        self.port = self.config.port
        self.metrics_port = self.config.metrics_port
        self._live = live_settings
        self._clock = clock or SystemClock()
        self.model_manager = manager or ModelManager(
            max_models=self.config.max_models,
            resources=ResourceManager(
                max_memory_percent=self.config.max_memory_percent,
                memory_quota_mb=self.config.memory_quota_mb,
            ),
            clock=self._clock,
        )
        self.resource_manager = self.model_manager.resources
        self.router = ModelRouter(self.config.routing)
        self.metrics = MetricsCollector()
        self.threads = ThreadPlan(processors(), lambda: len(self.model_manager.table.all))
        self.threads.configure(self.config.parallel_forwards, self.config.intra_op_threads)
        self.batcher = Batcher(
            self.threads,
            apart=self.config.max_workers,
            out_of_memory=self.model_manager.ran_out_of_memory,
            ran=self.metrics.record_batch,
        )
        self.model_manager.on_event(self._cut_what_waits)
        self._source, self._watcher = self._open_source(directory, on_progress)
        self.state_dir: Path | None = None
        store: Store | None = None
        if directory is not None:
            self.state_dir = self.config.resolved_state_dir or state_dir_for(directory)
            store = Store(DirectoryFiles(record_of(self.state_dir)), os.path.abspath(directory))
            self.model_manager.keep_compiled_in(compiled_of(self.state_dir))
        self.reconciler = Reconciler(
            self._source,
            self.model_manager,
            self._clock,
            store=store,
            about=self.about,
            resync_s=self.config.resync_s,
            max_parallel_loads=self.config.max_parallel_loads,
            on_turn=self._after_turn,
            on_error=lambda: self._feed.after_error(),
        )
        self._settings = LiveSettings(self.config, self)
        self._feed = MetricsFeed(self.metrics, self.model_manager, self.reconciler, self._clock)
        self._grpc_health = HealthService()
        self.health_checker = HealthChecker(
            models=lambda: {m: str(p) for m, p in self.reconciler.status.phases.items()},
            resources=self.resource_manager,
            loop_alive=self.loop_alive,
            ready=self.is_ready,
            interval_s=self.config.health_check_interval,
        )
        self._lifecycle = threading.Lock()
        self._network: NetworkServer | None = None
        self._http: MonitoringServer | None = None
        self._backend: ManagedBackend | None = None
        self._loop: threading.Thread | None = None
        self._directory = directory
        self._presence: Presence | None = None
        self._started_at = self._clock.wall()
        self._stopped = threading.Event()

    # Models, from Python.

    def load_model(self, config: ModelConfig) -> bool:
        """Loads a model and waits until it serves. Returns True; raises a typed error otherwise.

        See `ModelManager.load_model`.
        """
        return self.model_manager.load_model(config)

    def unload_model(self, model_id: str) -> bool:
        """Drains and unloads a model. Returns True; raises ModelNotFound if it is not loaded."""
        return self.model_manager.unload_model(model_id)

    def reload_model(self, model_id: str) -> bool:
        """Loads a model's files anew, without a failed request where there is room for both."""
        return self.model_manager.reload_model(model_id)

    # Life.

    def start(self) -> None:
        """Opens the ports and begins to serve and to reconcile. Returns at once.

        Raises ServerError if a port cannot be listened on, or another node serves the directory;
        nothing is left running then.
        """
        with self._lifecycle:
            if self._network is not None:
                raise ServerError("the server has been started already")
            if self._stopped.is_set():
                raise ServerError("the server was stopped; make a new one")
            network = self._open()
            self.reconciler.restore()
            network.start()
            self.port = network.port
            if self._watcher is not None:
                self._watcher.start()
            self._loop = threading.Thread(target=self.reconciler.run, name="reconcile", daemon=True)
            self._loop.start()
            self.health_checker.start(self._feed.measure)
        host = self.config.host
        if not host.startswith(_LOOPBACK):
            message = "other machines reach this node, without TLS or a token"
            log_event(log, logging.WARNING, "OpenToOthers", message, host=host)
        http = join_address(host, self.metrics_port) if self._http is not None else "off"
        log_event(log, logging.INFO, "Serving", grpc=join_address(host, self.port), http=http)

    def converge(self) -> tuple[DesiredState, list[Mapping[str, object]]]:
        """Loads what the directory declares, and says how that went; nothing is served.

        To be called instead of `start`, and followed by `stop`. Raises ServerError if another node
        serves the directory.
        """
        with self._lifecycle:
            self._presence = self._open_presence(listen=False)
        self.reconciler.restore()
        found: list[DesiredState] = []

        def settled(turn: Turn) -> bool:
            found[:] = [turn.desired]
            return turn.settled

        self.reconciler.run(until=settled)
        return found[0], list(self.reconciler.status.published.values())

    def stop(self, grace: float = 5.0) -> None:
        """Stops serving: no new requests, running ones get `grace` seconds, models are unloaded.

        May be called more than once and from any thread; a later call waits for the first.
        """
        with self._lifecycle:
            if self._stopped.is_set():
                return
            if self._backend is not None:
                self._backend.draining = True
            self._grpc_health.drain()
            self.reconciler.stop()
            if self._loop is not None:
                self._loop.join()
            if self._watcher is not None:
                self._watcher.stop()
            if self._network is not None:
                self._network.stop(grace)
                self._network = None
            self.batcher.stop()
            self.model_manager.shutdown(grace)
            self.health_checker.stop()
            self._close_ports()
            self._stopped.set()
        log_event(log, logging.INFO, "Stopped")

    def record_golden(
        self, model_id: str, target: Path, inputs_from: Path | None = None
    ) -> dict[str, object]:
        """Writes what the version of a model that serves answers: see `server.golden.record_golden`."""
        return record_golden(self.model_manager, model_id, target, inputs_from)

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Waits until `stop` has ended; True once it has, False if `timeout` seconds passed first."""
        return self._stopped.wait(timeout)

    def __enter__(self) -> ManagedServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # What people see.

    def get_status(self) -> dict[str, object]:
        """Models (a list), statistics, resource use, health, and the addresses it listens on."""
        return {
            "models": self.model_manager.list_models(),
            "statistics": self.model_manager.get_statistics(),
            "health": self.health_checker.check_health(),
            "host": self.config.host,
            "port": self.port,
            "metrics_port": self.metrics_port,
            "watch_mode": self.watch_mode,
            "restart_required": list(self._settings.restart_required),
            "version": VERSION,
        }

    def about(self) -> NodeInfo:
        """What the node is and where it listens."""
        directory, state_dir = self._directory, self.state_dir
        host = self.config.host
        return NodeInfo(
            directory=os.path.abspath(directory) if directory is not None else "",
            state_dir=str(state_dir) if state_dir is not None else "",
            watch_mode=self.watch_mode,
            watch_reason=self._watcher.reason if self._watcher is not None else "",
            restart_required=self._settings.restart_required,
            version=VERSION,
            process_id=os.getpid(),
            started_at=self._started_at,
            grpc=join_address(host, self.port) if self._network is not None else "",
            http=join_address(host, self.metrics_port) if self._http is not None else "",
        )

    @property
    def watch_mode(self) -> str:
        """How changes in the directory are noticed: inotify, fsevents, polling, or none without one."""
        return self._watcher.mode if self._watcher is not None else "none"

    def loop_alive(self) -> bool:
        """Whether the reconcile loop runs and its latest turn is recent.

        True before `start`, and while the node drains: then the loop has ended as it should.
        """
        if self._loop is None or self._draining:
            return True
        if not self._loop.is_alive():
            return False
        last = self.reconciler.last_turn_s
        limit_s = _DEAD_AFTER_RESYNCS * max(1.0, self.reconciler.resync_s)
        return last is None or self._clock.now() - last <= limit_s

    def is_ready(self) -> bool:
        """Whether the first convergence is done, and the node is not shutting down."""
        return self.reconciler.converged and not self._draining

    @property
    def drain_s(self) -> float:
        """The longest that any loaded model wants its running requests to be waited for, in seconds."""
        views = self.model_manager.snapshot().instances
        return max((v.spec.config.drain_timeout_s for v in views), default=5.0)

    @property
    def desired_source(self) -> DesiredSource | None:
        """The directory, or None without one."""
        return self._source if isinstance(self._source, DesiredSource) else None

    # Inside.

    @property
    def _draining(self) -> bool:
        return self._backend is not None and self._backend.draining

    def _open_source(
        self, directory: str | Path | None, on_progress: Callable[[int, int], None] | None
    ) -> tuple[Source, Watcher | None]:
        if directory is None:
            return NothingDeclared(), None
        source = DesiredSource(
            directory,
            settle_s=self.config.settle_s,
            prune_guard_percent=self.config.prune_guard_percent,
            on_progress=on_progress,
        )
        return source, Watcher(source.root, wake=lambda: self.reconciler.wake())

    def _open(self) -> NetworkServer:
        """Takes the state directory and the ports; all of them or none."""
        try:
            self._presence = self._open_presence(listen=True)
            self._http = self._open_http()
            # Last, because gRPC does not let go of a port on which it never started.
            self._network = self._open_grpc()
            return self._network
        except ServerError:
            self._close_ports()
            raise

    def _open_presence(self, *, listen: bool) -> Presence | None:
        if self.state_dir is None or self._directory is None:
            return None
        answers = node_answers(self) if listen else None
        return Presence(self.state_dir, Path(self._directory), answers)

    def _close_ports(self) -> None:
        if self._network is not None:
            self._network.stop(0.0)
            self._network = None
        if self._http is not None:
            self._http.stop()
            self._http = None
        if self._presence is not None:
            self._presence.close()
            self._presence = None

    def _open_grpc(self) -> NetworkServer:
        self._backend = ManagedBackend(
            self.model_manager,
            self.router,
            self.reconciler,
            self.batcher,
            version=VERSION,
            max_waiters=max(1, self.config.max_workers // 2),
            observe=self._feed.after_request,
            observe_wait=self._feed.after_wait,
        )
        socket = self.config.resolved_unix_socket
        try:
            network = build_server(
                ComputeServicer(self._backend, SystemMonitor(), inferences=self._backend),
                join_address(self.config.host, self.config.port),
                max_workers=self.config.max_workers,
                work=self.batcher,
                unix_socket=socket,
            )
        except ServerStartError as error:
            key = "unix_socket" if socket is not None and str(socket) in str(error) else "port"
            raise ServerError(f"{key}: {error}") from None
        self._grpc_health.register(network.grpc_server)
        enable_reflection(network.grpc_server)
        return network

    def _open_http(self) -> MonitoringServer | None:
        if not self.config.enable_monitoring:
            return None
        http = MonitoringServer(
            self.config.host,
            self.config.metrics_port,
            metrics=self.metrics,
            healthz=lambda: (self.loop_alive(), self.health_checker.check_health()),
            readyz=lambda: (self.is_ready(), {"ready": self.is_ready()}),
            states=NodeStates(self.reconciler),
        )
        http.start()
        self.metrics_port = http.port
        return http

    def _cut_what_waits(self, event: ManagerEvent) -> None:
        """Requests of a model that should have gone by now do not wait for it any longer."""
        if event.kind is not EventKind.DRAIN_OVERDUE:
            return
        why = NotReady(
            f"model {event.model_id!r} was unloaded before this request's turn; try again"
        )
        if cut := self.batcher.cut(event.key, why):
            message = (
                f"{cut} requests still waited after drain_timeout_s: they were told to try again"
            )
            log_event(log, logging.WARNING, "RequestsCut", message, model=event.model_id)

    def _after_turn(self, turn: Turn) -> None:
        if self._live:
            self._settings.follow(turn.desired.server)
        if self._watcher is not None and turn.looked:
            if (source := self.desired_source) is not None:
                self._watcher.watch_paths(source.watch_paths())
            self._watcher.refresh()
        if self._presence is not None and turn.looked:
            self._presence.refresh()
        if turn.changed:
            self._grpc_health.publish(self.model_manager.table, self.reconciler.names)
        self._feed.after_turn(turn, self.watch_mode)
