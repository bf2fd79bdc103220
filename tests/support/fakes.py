"""Time, work, models and files that a test controls, for running the manager and the loop by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from splitlearn_comm.core.compute_function import CallForm
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.others_use import Reading
from splitlearn_manager.core.resource_manager import ResourceManager
from splitlearn_manager.desired.state import (
    NO_INSTRUCTIONS,
    DesiredModel,
    DesiredState,
    Instructions,
    SourceRef,
)
from splitlearn_manager.errors import LoadError
from splitlearn_manager.runtime.base import Activations, Joining


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return 1_700_000_000.0 + self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class ManualExecutor:
    """Keeps work until a test runs it, in the order that the test chooses."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Callable[[], None]]] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        self.waiting.append((name, work))

    def run_one(self, index: int = 0) -> str:
        name, work = self.waiting.pop(index)
        work()
        return name

    def run_all(self) -> None:
        while self.waiting:
            self.run_one()


class FakeRunning:
    """A loaded model without torch that answers its input; refuses to be closed twice or used after."""

    _call_form = CallForm()
    overlaps = False

    def __init__(self, config: ModelConfig, memory_mb: float) -> None:
        self.config = config
        self.memory_mb = memory_mb
        self.activations: Activations | None = None
        self.notes: tuple[str, ...] = ()
        self.warmed = True
        self.joins = self.joins_lengths = False
        self.closed = False
        self.leases_at_close: int | None = None

    @property
    def compute_function(self) -> object:
        assert not self.closed, "used after it was closed"
        return self

    def compute(self, x: object) -> object:
        return x

    def when_ended(self, tell: object) -> None:
        pass

    def example(self) -> None:
        return None

    def find_joining(self) -> Joining:
        return Joining(False, "not tried")

    def join(self, joining: Joining) -> None:
        self.joins = joining.joins

    def measure_activations(self) -> Activations | None:
        return self.activations

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeRuntime:
    """Loads a model of the size that the test says, or raises what the test says."""

    def __init__(self) -> None:
        self.sizes_mb: dict[str, float] = {}
        self.failures: dict[str, BaseException] = {}
        self.started: list[tuple[str, str]] = []
        self.running: list[FakeRunning] = []

    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        self.started.append((config.model_id, device))
        if (failure := self.failures.get(config.model_id)) is not None:
            raise failure
        running = FakeRunning(config, self.sizes_mb.get(config.model_id, 10.0))
        self.running.append(running)
        return running

    @property
    def open_models(self) -> list[FakeRunning]:
        return [r for r in self.running if not r.closed]


class FakeFiles:
    """Weights as a test describes them: a fingerprint and an estimated size for each model."""

    def __init__(self) -> None:
        self.fingerprints: dict[str, str] = {}
        self.estimates_mb: dict[str, float] = {}

    def fingerprint(self, config: ModelConfig) -> str:
        return self.fingerprints.get(config.model_id, "w0")

    def estimate_mb(self, config: ModelConfig) -> float | None:
        return self.estimates_mb.get(config.model_id, 10.0)


class FixedBudgets(ResourceManager):
    """A machine with the devices and the memory that a test wants.

    Attributes:
        read: what a reading gives; nothing is read unless a test says otherwise.
    """

    def __init__(self, budgets_mb: Mapping[str, float]) -> None:
        super().__init__(max_memory_percent=80)
        self._fixed = dict(budgets_mb)
        self.read: dict[str, Reading] = {}

    def budgets_mb(self) -> dict[str, float]:
        return dict(self._fixed)

    def readings(self) -> dict[str, Reading]:
        return dict(self.read)


@dataclass
class Bench:
    """A manager whose time and work the test controls."""

    budgets_mb: Mapping[str, float] = field(default_factory=lambda: {"cpu": 1000.0})
    max_models: int = 5

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.executor = ManualExecutor()
        self.runtime = FakeRuntime()
        self.files = FakeFiles()
        self.manager = ModelManager(
            max_models=self.max_models,
            resources=FixedBudgets(self.budgets_mb),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=self.files,  # type: ignore[arg-type]
            clock=self.clock,
            executor=self.executor,
        )


class FakeSource:
    """A directory without files: the desired models are what the test declares.

    A model that is suspended keeps the spec that it had, until it is resumed.

    Attributes:
        looks: the instructions of each look.
    """

    def __init__(self) -> None:
        self.state = DesiredState(source_available=True, complete=True)
        self.looks: list[Instructions] = []
        self._generations: dict[str, int] = {}
        self._accepted: dict[str, DesiredModel] = {}

    def restore(self, models: Iterable[DesiredModel]) -> None:
        """What is declared already keeps the generation that it had; the rest is only counted on."""
        for model in models:
            model_id = model.config.model_id
            declared = self.state.models.get(model_id)
            new = declared is not None and declared.spec_hash != model.spec_hash
            self._accepted[model_id] = model
            self._generations[model_id] = model.generation + new
            if declared is not None:
                models_now = {
                    **self.state.models,
                    model_id: replace(declared, generation=self._generations[model_id]),
                }
                self.state = replace(self.state, models=models_now)

    def look(self, now: float, instructions: Instructions = NO_INSTRUCTIONS) -> DesiredState:
        self.looks.append(instructions)
        models: dict[str, DesiredModel] = {}
        for model_id, model in self.state.models.items():
            if model_id in instructions.suspended:
                kept = self._accepted.get(model_id, model)
                if not kept.suspended:
                    kept = replace(kept, suspended=True, held="suspended", weights=model.weights)
                models[model_id] = kept
            else:
                models[model_id] = model
        for model_id in instructions.suspended - models.keys():
            if (kept := self._accepted.get(model_id)) is not None:
                models[model_id] = replace(kept, suspended=True, held="suspended")
        self._accepted = models
        return replace(self.state, models=models)

    def declare(self, config: ModelConfig, *, at: float, weights: str | None = "w0") -> None:
        """Accepts a config (a new generation if its spec is new) with these weights."""
        old = self.state.models.get(config.model_id)
        changed = old is None or old.spec_hash != config.spec_hash()
        if changed:
            self._generations[config.model_id] = self._generations.get(config.model_id, 0) + 1
        model = DesiredModel(
            config=config,
            generation=self._generations[config.model_id],
            spec_hash=config.spec_hash(),
            load_hash=config.load_hash(),
            source=SourceRef(f"{config.model_id}.yaml", 1),
            accepted_at=at if changed or old is None else old.accepted_at,
            weights=weights,
        )
        self.state = replace(self.state, models={**self.state.models, config.model_id: model})

    def remove(self, model_id: str) -> None:
        models = {m: d for m, d in self.state.models.items() if m != model_id}
        self.state = replace(self.state, models=models)


def model(model_id: str, **keys: object) -> ModelConfig:
    """A config of a model on the CPU whose files are fakes."""
    values = {"model_id": model_id, "model_path": f"/models/{model_id}.pt", "device": "cpu", **keys}
    return ModelConfig(**values)  # type: ignore[arg-type]


def broken(message: str = "it is broken") -> LoadError:
    return LoadError(message)


class MemoryFiles:
    """The files of a state directory, in memory.

    Attributes:
        held: what is on the disk.
        log: each write and removal, in order.
        error: the errno that each write and removal fails with; None lets them pass.
        unreadable: names whose reading fails.
        before: called before each write and removal, with its name: the place to die in.
    """

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.log: list[str] = []
        self.error: int | None = None
        self.unreadable: set[str] = set()
        self.before: Callable[[str], None] = lambda name: None

    def names(self) -> list[str]:
        return sorted(self.held)

    def read(self, name: str) -> bytes:
        if name in self.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return self.held[name]

    def write(self, name: str, data: bytes) -> None:
        self._change(name)
        self.held[name] = data

    def remove(self, name: str) -> None:
        self._change(name)
        self.held.pop(name, None)

    def _change(self, name: str) -> None:
        self.before(name)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), name)
        self.log.append(name)
