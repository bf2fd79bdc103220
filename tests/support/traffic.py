"""A loop under requests, in one thread: requests come, wait and are answered, and loads take time.

The clock jumps from one thing that happens to the next. What a request does is what `ManagedBackend` does,
cut into steps; one that waited takes its lease some time after its model is READY, and one that gives up
says so some time after its deadline, as a thread wakes up late.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.waiters import Waiter
from support.fakes import FakeClock, FakeFiles, FakeRuntime, FakeSource, FixedBudgets, model

MB = 10.0
"""What each model takes, if a test does not say otherwise."""


@dataclass(eq=False)
class Asked:
    """A request. Times are on the clock; None has not come yet.

    Attributes:
        waited: its model did not serve when it came.
        woken: it was told that its model serves, and goes on in a moment.
    """

    model_id: str
    came_s: float
    hold_s: float
    deadline_s: float
    waited: bool = False
    woken: bool = False
    began_s: float | None = None
    gave_up_s: float | None = None
    lease: Lease | None = None
    waiter: Waiter | None = None


@dataclass(frozen=True)
class Happened:
    """An event of the manager, and the requests that waited at that moment."""

    at_s: float
    kind: EventKind
    model_id: str
    reason: str
    waiting: tuple[Asked, ...]


@dataclass
class Traffic:
    """See the module's text.

    Attributes:
        loads_s, closes_s: how long loads and closes take; loads by model where that says so.
        wakes_s: how long after its model is READY, or after its deadline, a request that waited goes on.
        asked: all requests, in the order in which they came.
        events: what the manager did.
    """

    budget_mb: float = 2 * MB
    max_models: int = 50
    max_parallel_loads: int = 2
    loads_s: float = 0.5
    closes_s: float = 0.01
    wakes_s: float = 0.0
    loads_of_s: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.runtime = FakeRuntime()
        self.files = FakeFiles()
        self.manager = ModelManager(
            max_models=self.max_models,
            resources=FixedBudgets({"cpu": self.budget_mb}),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=self.files,  # type: ignore[arg-type]
            clock=self.clock,
            executor=self,
        )
        self.source = FakeSource()
        self.loop = Reconciler(
            self.source,
            self.manager,
            self.clock,
            max_parallel_loads=self.max_parallel_loads,
            draw=lambda: 0.0,
        )
        self.asked: list[Asked] = []
        self.events: list[Happened] = []
        self._waiting: list[Asked] = []
        self.manager.on_event(self._note)
        self._number = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._due_s = 0.0

    @property
    def now_s(self) -> float:
        return self.clock.now()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """The executor: work is done when its time is over."""
        kind, _, key = name.partition("-")
        model_id = key.partition("#")[0]
        is_load = kind == "load"
        takes_s = self.loads_of_s.get(model_id, self.loads_s) if is_load else self.closes_s
        self.later(takes_s, work)

    def later(self, after_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now_s + after_s, next(self._number), do))

    def declare(self, *model_ids: str, mb: float = MB, **keys: object) -> None:
        for model_id in model_ids:
            self.runtime.sizes_mb[model_id] = self.files.estimates_mb[model_id] = mb
            self.source.declare(model(model_id, **keys), at=self.now_s)
        self.loop.wake()

    def ask(
        self, model_id: str, after_s: float = 0.0, *, hold_s: float = 0.05, timeout_s: float = 1e4
    ) -> None:
        """A request for the model comes then."""

        def come() -> None:
            now = self.now_s
            asked = Asked(model_id, now, hold_s, now + timeout_s)
            self.asked.append(asked)
            if not self._begins(asked):
                asked.waited = True
                asked.waiter = self.loop.join(model_id, timeout_s)
                self._waiting.append(asked)
                self.later(timeout_s, lambda: None)

        self.later(after_s, come)

    def pass_time(self, seconds: float) -> None:
        """Everything that falls into that time happens."""
        until_s = self.now_s + seconds
        while True:
            self._settle()
            next_s = min(self._due_s, self._agenda[0][0] if self._agenda else until_s)
            if next_s > until_s:
                break
            self.clock.seconds = max(self.now_s, next_s)
            if self._agenda and self._agenda[0][0] <= self.now_s:
                heapq.heappop(self._agenda)[2]()
            if self.now_s >= until_s and not (self._agenda and self._agenda[0][0] <= until_s):
                self._settle()
                break
        self.clock.seconds = until_s

    def serving(self) -> set[str]:
        return set(self.manager.table.by_model)

    def evictions(self) -> list[Happened]:
        """Those that made room."""
        return [e for e in self.events if e.kind is EventKind.EVICTED and e.reason == "MadeRoom"]

    def of_kind(self, kind: EventKind) -> list[Happened]:
        return [e for e in self.events if e.kind is kind]

    # Inside.

    def _note(self, event: ManagerEvent) -> None:
        waiting = tuple(self._waiting)
        happened = Happened(self.now_s, event.kind, event.model_id, event.reason, waiting)
        self.events.append(happened)

    def _settle(self) -> None:
        """Turns until nothing wakes the loop, and lets requests give up or go on."""
        turns = 0
        while True:
            for asked in list(self._waiting):
                if self.now_s >= asked.deadline_s:
                    asked.gave_up_s = self.now_s
                    self._waiting.remove(asked)
                    self._after_waking(lambda asked=asked: self._leave(asked))  # type: ignore[misc]
                elif asked.model_id in self.manager.table.by_model and not asked.woken:
                    asked.woken = True
                    self._after_waking(lambda asked=asked: self._goes_on(asked))  # type: ignore[misc]
            if not self.loop._woken and self.now_s < self._due_s:
                return
            turns += 1
            assert turns < 200, "the loop spins"
            self.loop._woken = False
            turn = self.loop.next_turn()
            pause_s = min(1.0, 1.0 if turn.next_s is None else turn.next_s)
            self._due_s = self.now_s + max(pause_s, 1e-6)

    def _begins(self, asked: Asked) -> bool:
        instance = self.manager.table.by_model.get(asked.model_id)
        lease = self.manager.try_lease(instance) if instance is not None else None
        if lease is None:
            return False
        asked.lease, asked.began_s = lease, self.now_s
        self.later(asked.hold_s, lease.release)
        return True

    def _after_waking(self, do: Callable[[], None]) -> None:
        if self.wakes_s:
            self.later(self.wakes_s, do)
        else:
            do()

    def _goes_on(self, asked: Asked) -> None:
        """What waited takes its lease, if its model (still) serves."""
        asked.woken = False
        if asked in self._waiting and self._begins(asked):
            self._waiting.remove(asked)
            self._leave(asked)

    def _leave(self, asked: Asked) -> None:
        assert asked.waiter is not None
        self.loop.leave(asked.waiter)
        asked.waiter = None
