"""A machine that models share with others: what is used of it is what both really hold.

lab = PressureLab(total_mb=2000, budget_mb=1000)
lab.load("a", 300)
lab.others_mb = 1500
lab.settle()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.others_use import Reading
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.reconcile.turns import Turn
from support.fakes import (
    FakeClock,
    FakeFiles,
    FakeRunning,
    FakeRuntime,
    FakeSource,
    FixedBudgets,
    ManualExecutor,
    model,
)


class SharedMachine(FixedBudgets):
    """Its readings are what the runtime's models hold, and what others do.

    Attributes:
        others_mb: MB that others use of each device.
        stalled_percent: of the time, how long processes wait for memory.
        readings_made: how often it was read.
    """

    def __init__(
        self,
        budgets_mb: Mapping[str, float],
        totals_mb: Mapping[str, float],
        held_mb: Callable[[str], float],
    ) -> None:
        super().__init__(budgets_mb)
        self.totals_mb = dict(totals_mb)
        self.others_mb = dict.fromkeys(totals_mb, 0.0)
        self.stalled_percent: float | None = None
        self.readings_made = 0
        self._held_mb = held_mb

    def readings(self) -> dict[str, Reading]:
        self.readings_made += 1
        return {
            device: Reading(
                total, self.others_mb[device] + self._held_mb(device), self.stalled_percent
            )
            for device, total in self.totals_mb.items()
        }


class HoldingRuntime(FakeRuntime):
    """A runtime that knows where its models are; `loading_mb` of a load under way are held already."""

    def __init__(self) -> None:
        super().__init__()
        self.loading_mb: dict[str, float] = {}
        self._devices: dict[int, str] = {}

    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        running = super().start(config, device)
        self._devices[id(running)] = device
        return running

    def held_mb(self, device: str) -> float:
        held = sum(r.memory_mb for r in self.open_models if self._devices[id(r)] == device)
        return held + self.loading_mb.get(device, 0.0)


class PressureLab:
    """A loop that the test turns by hand on a machine of `total_mb` that has a floor of 5 %."""

    def __init__(
        self, total_mb: float = 2000.0, budget_mb: float = 1600.0, max_models: int = 20
    ) -> None:
        self.clock = FakeClock()
        self.executor = ManualExecutor()
        self.runtime = HoldingRuntime()
        self.files = FakeFiles()
        self.machine = SharedMachine(
            {"cpu": budget_mb}, {"cpu": total_mb}, lambda d: self.runtime.held_mb(d)
        )
        self.manager = ModelManager(
            max_models=max_models,
            resources=self.machine,
            runtime=self.runtime,  # type: ignore[arg-type]
            files=self.files,  # type: ignore[arg-type]
            clock=self.clock,
            executor=self.executor,
        )
        self.source = FakeSource()
        self.loop = Reconciler(self.source, self.manager, self.clock, draw=lambda: 0.0)

    @property
    def others_mb(self) -> float:
        return self.machine.others_mb["cpu"]

    @others_mb.setter
    def others_mb(self, mb: float) -> None:
        self.machine.others_mb["cpu"] = mb

    def declare(self, model_id: str, mb: float, **keys: object) -> None:
        self.clock.advance(1.0)
        self.runtime.sizes_mb[model_id] = self.files.estimates_mb[model_id] = mb
        self.source.declare(model(model_id, **keys), at=self.clock.now())

    def load(self, model_id: str, mb: float, **keys: object) -> None:
        self.declare(model_id, mb, **keys)
        self.settle()
        assert self.phase(model_id) is Phase.READY

    def turn(self, after_s: float = 0.6) -> Turn:
        """One turn, late enough that the devices are read again."""
        self.clock.advance(after_s)
        return self.loop.turn()

    def settle(self) -> Turn:
        """Turns and lets work run until nothing is left to do."""
        for _ in range(100):
            turn = self.turn()
            if turn.settled and not self.executor.waiting:
                return turn
            self.executor.run_all()
        raise AssertionError(f"did not settle: {turn.plan}")

    def served(self) -> set[str]:
        return set(self.manager.table.by_model)

    def phase(self, model_id: str) -> Phase | None:
        return self.loop.status.phases.get(model_id)

    def reason(self, model_id: str) -> object:
        return self.status(model_id)["reason"]

    def status(self, model_id: str) -> Mapping[str, object]:
        return self.loop.status.published[model_id]

    def node_condition(self, kind: str) -> tuple[object, object, str]:
        """Status, reason and message."""
        conditions = self.loop.status.node()["conditions"]
        assert isinstance(conditions, list)
        found = next(c for c in conditions if c["type"] == kind)
        return found["status"], found["reason"], str(found["message"])

    def events(self, model_id: str) -> list[str]:
        found, _ = self.loop.status.events(model_id=model_id)
        return [str(event["reason"]) for event in found]
