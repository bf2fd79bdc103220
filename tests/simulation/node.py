"""One process of the node: the product's own parts, put together on the simulated machine.

`turn_if_due` turns the loop as `Reconciler.run` does: at once when it was woken, else when the last turn
said so or `resync_s` has passed. Nothing else here decides anything. What a request does while it waits
for a model, and what a caller of the Python API does, are the blocking calls of the product cut into
steps, because there is one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

from simulation.machine import Machine, NodeClock
from simulation.models import Executor, Files, ModelLab, Resources
from simulation.script import Settings
from simulation.texts import ROOT
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import parse_server
from splitlearn_manager.core.events import ManagerEvent
from splitlearn_manager.core.eviction import Admitted, MakeRoom
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.errors import SplitlearnError
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.reconcile.store import Store
from splitlearn_manager.reconcile.turns import Turn
from splitlearn_manager.reconcile.waiters import Waiter
from splitlearn_manager.routing.router import ModelRouter
from splitlearn_manager.server.live_settings import LiveSettings
from splitlearn_manager.server.threads import ThreadPlan

QUIET_TURNS = 3
LATEST_S = 30.0
"""After some turns in which nothing was found the next ones come late, up to so many seconds: the same
nothing again and again is most of an episode's time, and a loop that is late must end the same."""

SHORTEST_PAUSE_S = 1e-5
"""Time passes during a turn, if ever so little: a pause may end a rounding error too early."""


@dataclass
class Request:
    """A request that runs (`lease`), or waits for its model.

    Attributes:
        ended: how it ended; empty while it has not.
        waiter: how the loop knows it while it waits.
    """

    model_id: str
    begun_at: float
    hold_s: float
    deadline: float
    lease: Lease | None = None
    ended: str = ""
    waiter: Waiter | None = None


class Node:
    """See the module's text.

    Args:
        booted_at: when the machine's monotonic clock last began.
        on_event: called with every event of the manager.
        on_change: called after every transition of an instance.

    Attributes:
        due_at: when the next turn is due, unless it is woken.
        last: the latest turn.
        scan_faults_before: calls of the file system that had failed when it started.
    """

    def __init__(
        self,
        machine: Machine,
        lab: ModelLab,
        settings: Settings,
        *,
        booted_at: float,
        life: int,
        reads_devices: bool,
        on_event: Callable[[ManagerEvent], None],
        on_change: Callable[[], None],
    ) -> None:
        self.machine = machine
        self.lab = lab
        self.life = life
        self.clock = NodeClock(machine, booted_at)
        self.executor = Executor(machine, lab)
        config = started_with(machine, settings)
        reads = settings.totals_mb if reads_devices else None
        self.resources = Resources(settings.budgets_mb, reads, lab if reads else None)
        self.manager = ModelManager(
            max_models=config.max_models,
            resources=self.resources,
            runtime=lab,  # type: ignore[arg-type]
            files=Files(machine),
            clock=self.clock,
            executor=self.executor,
        )
        self.source = DesiredSource(
            ROOT, machine.fs, config.settle_s, prune_guard_percent=config.prune_guard_percent
        )
        draws = Random(f"{settings.seed}/{life}")
        self.loop = Reconciler(
            self.source,
            self.manager,
            self.clock,
            store=Store(machine.state),
            resync_s=config.resync_s,
            max_parallel_loads=config.max_parallel_loads,
            draw=draws.random,
        )
        self.manager.on_event(on_event)
        self.manager.on_change(on_change)
        stand_in: Any = SimpleNamespace(
            resource_manager=self.resources,
            model_manager=self.manager,
            reconciler=self.loop,
            desired_source=self.source,
            router=ModelRouter(config.routing),
            threads=ThreadPlan(2, lambda: 1),
        )
        self._settings = LiveSettings(config, stand_in)
        self.started_at = machine.t
        self.scan_faults_before = machine.scan_faults
        self.due_at = machine.t
        self.last: Turn | None = None
        self._quiet_turns = 0
        self.requests: list[Request] = []
        self._to_tried = False
        self.apart: dict[str, float] = {}

    def start(self) -> None:
        self.loop.restore()

    # The loop.

    @property
    def woken(self) -> bool:
        return self.loop._woken

    @property
    def keeps_state(self) -> bool:
        """Whether the node says that all it has accepted is on the disk."""
        return not self.loop._keeper.problem

    @property
    def instances(self) -> list[Any]:
        """All instances, without the cost of a snapshot."""
        return list(self.manager._instances._instances.values())

    def turn(self) -> Turn:
        """One turn, as `run` makes it."""
        self.loop._woken = False
        turn = self.loop.next_turn()
        if turn.desired.server is not None:
            self._settings.apply(turn.desired.server)
        self._quiet_turns = self._quiet_turns + 1 if turn.settled and not turn.changed else 0
        late = 2.0 ** max(0, self._quiet_turns - QUIET_TURNS)
        pause_s = min(LATEST_S, self.loop.resync_s * late)
        if turn.next_s is not None:
            pause_s = min(turn.next_s, pause_s)
        self.due_at = self.machine.t + max(pause_s, SHORTEST_PAUSE_S)
        self.last = turn
        return turn

    # Requests.

    def request(self, model_id: str, hold_s: float, wait_s: float) -> Request:
        """A request begins: it runs, waits, or is refused, as `ManagedBackend` has it."""
        now = self.machine.t
        request = Request(model_id, now, hold_s, now + wait_s)
        if not self._try(request):
            if model_id in self.loop.names and not self._failed(model_id):
                request.waiter = self.loop.join(model_id, wait_s)
            else:
                request.ended = "refused"
        if not request.ended:
            self.requests.append(request)
        return request

    def step_requests(self) -> list[Request]:
        """Requests that wait get what they wait for or give up; those that are done end."""
        ended = []
        now = self.machine.t
        for request in list(self.requests):
            if request.lease is not None:
                if now >= request.deadline:
                    self._release(request)
            elif not self._try(request):
                if now >= request.deadline:
                    request.ended = "waited in vain"
                elif self._failed(request.model_id):
                    request.ended = "its model failed"
            if request.waiter is not None and (request.ended or request.lease is not None):
                self.loop.leave(request.waiter)
                request.waiter = None
            if request.ended:
                self.requests.remove(request)
                ended.append(request)
        return ended

    def _failed(self, model_id: str) -> bool:
        return self.loop.status.phases.get(model_id) in (None, Phase.FAILED)

    def _try(self, request: Request) -> bool:
        if request.model_id not in self.manager.table.by_model:
            return False
        try:
            request.lease = self._tried(request.model_id) or self.manager.lease(request.model_id)
        except SplitlearnError as error:
            self.machine.violated("I20", f"routed to {request.model_id}, and refused: {error}")
            return False
        running: Any = request.lease.instance.running
        if running is None or running.closed:
            self.machine.violated("I20", f"a lease on {request.lease.instance!r}, which is closed")
            return False
        running.leases += 1
        request.deadline = self.machine.t + request.hold_s
        self.machine.later(request.hold_s, lambda: None)
        return True

    def _tried(self, model_id: str) -> Lease | None:
        """A lease on the version that is tried, for every other request while there is one."""
        tried = self.manager.table.trials.get(model_id)
        if tried is None or tried.shadow:
            return None
        self._to_tried = not self._to_tried
        if not self._to_tried:
            return None
        lease = self.manager.try_lease(tried.version)
        if lease is None and self.manager.table.trials.get(model_id) is tried:
            self.machine.violated("I20", f"{tried.version!r} is tried, and takes no request")
        return lease

    def _release(self, request: Request) -> None:
        lease = request.lease
        assert lease is not None
        running: Any = lease.instance.running
        if running is None or running.closed:
            self.machine.violated("I20", f"{lease.instance!r} was closed under a request")
        else:
            running.leases -= 1
        request.ended = "answered"
        lease.release()
        self._ask_shadow(lease.instance)

    def _ask_shadow(self, old: ManagedModel) -> None:
        """Have the version that is tried in a shadow, if any, asked what the old one has answered."""
        tried = self.manager.table.trials.get(old.model_id)
        trial = tried.version.trial if tried is not None else None
        if tried is None or trial is None or not tried.shadow or tried.version is old:
            return
        lease = self.manager.try_lease(tried.version)
        if lease is None:
            self.machine.violated("I20", f"{tried.version!r} is tried, and takes no request")
            return
        trial.compared += 1
        trial.worst = max(trial.worst, abs(_answer_of(tried.version) - _answer_of(old)))
        self.apart[tried.version.key] = trial.worst
        lease.release()

    # The Python API.

    def api_load(self, config: ModelConfig) -> str:
        """One step of `ModelManager.load_model`; says what came of it."""
        manager = self.manager
        current = manager.get_model(config.model_id)
        if current is not None and current.state is not State.FAILED:
            return "is there already"
        try:
            spec = ModelSpec.of(config)
            mb = manager.size_mb(spec)
            decision = manager._instances.decide(
                manager._request(spec, mb, may_evict=True), Owner.API
            )
            if isinstance(decision, MakeRoom):
                for victim in decision.victims:
                    manager.begin_evict(victim.model_id, victim.key, "MadeRoom")
                return "makes room"
            if isinstance(decision, Admitted):
                started = manager.begin_load(spec, Owner.API, decision.device, mb)
                return "begins" if started is not None else "does not fit any more"
        except SplitlearnError as error:
            return f"is refused: {error.reason}"
        return f"has no room: {type(decision).__name__}"

    def api_unload(self, model_id: str) -> str:
        instance = self.manager.get_model(model_id)
        if instance is None or instance.owner is not Owner.API:
            return "is not Python's"
        try:
            return "begins" if self.manager.begin_unload(model_id, "Requested") else "is not served"
        except SplitlearnError as error:
            return f"is refused: {error.reason}"


def started_with(machine: Machine, settings: Settings) -> ServerConfig:
    """What server.yaml says as the process starts, as far as it can be read; else the episode's."""
    try:
        data = machine.fs.read(f"{ROOT}/server.yaml", 1 << 16)
    except OSError:
        data = b""
    config = server_config(data) if data else None
    return config or ServerConfig(
        max_models=settings.max_models,
        max_parallel_loads=settings.max_parallel_loads,
        settle_s=settings.settle_s,
        resync_s=settings.resync_s,
        prune_guard_percent=settings.guard_percent,
    )


@functools.lru_cache(maxsize=1000)
def server_config(data: bytes) -> ServerConfig | None:
    return parse_server(data, file="server.yaml")[0]


def _answer_of(instance: ManagedModel) -> float:
    """What a version answers to everything."""
    return float(instance.config.config.kwargs.get("v", 0))
