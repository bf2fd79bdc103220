"""A whole loop over a directory in memory, that dies wherever a test wants and starts again.

Real: the source, acceptance, planning, the loop, the manager, the store. Fake: files, time, work, models.
A model whose `kwargs` say `broken` cannot be loaded. Side effects are counted: each write of the state
directory, each piece of work that begins; `die_at` ends the process before the n-th of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import fingerprint, resolve_source
from splitlearn_manager.core.measurement import Measurement, of_version
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.errors import SplitlearnError
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.record import ModelRecord
from splitlearn_manager.reconcile.store import Store
from splitlearn_manager.reconcile.turns import Turn
from support.fake_fs import FakeFileSystem
from support.fakes import (
    FakeClock,
    FakeRunning,
    FakeRuntime,
    FixedBudgets,
    ManualExecutor,
    MemoryFiles,
    broken,
)

ROOT = "/desired"
SETTLE_S = 0.25
STEP_S = 0.3


class Died(BaseException):
    """The process ends here."""


class _Runtime(FakeRuntime):
    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        kwargs = config.config.kwargs or {}
        if kwargs.get("broken"):
            self.started.append((config.model_id, device))
            raise broken()
        return super().start(config, device)


class _Files:
    def __init__(self, fs: FakeFileSystem) -> None:
        self._fs = fs

    def fingerprint(self, config: ModelConfig) -> str:
        return fingerprint(resolve_source(config, self._fs), self._fs)

    def estimate_mb(self, config: ModelConfig) -> float | None:
        return 10.0


class LoopLab:
    """See the module's text. Everything but `fs`, `state`, `clock` and the counts is of one process.

    Attributes:
        effects: side effects so far, over all processes.
        die_at: the number of the effect before which the process dies; None lets it live.
        deaths: how often it has died.
        loads: loads that were begun, over all processes, by model id.
    """

    def __init__(self, max_models: int = 20, die_at: int | None = None) -> None:
        self.fs = FakeFileSystem()
        self.fs.mkdir(ROOT)
        self.fs.mkdir("/weights")
        self.clock = FakeClock()
        self.state = MemoryFiles()
        self.state.before = lambda name: self._effect()
        self.max_models = max_models
        self.effects = 0
        self.die_at = die_at
        self.deaths = 0
        self.start()

    # The directory.

    def write(self, model_id: str, **keys: object) -> None:
        """Declares the model in a file of its own, in place of what the file said."""
        if not self.fs.exists(f"/weights/{model_id}.pt"):
            self.fs.write(f"/weights/{model_id}.pt", b"weights")
        values = {"model_id": model_id, "model_path": f"/weights/{model_id}.pt", **keys}
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
        self.write_bytes(model_id, text.encode())

    def write_bytes(self, model_id: str, data: bytes) -> None:
        self.fs.replace(f"{ROOT}/{model_id}.yaml", data) if self.is_there(
            model_id
        ) else self.fs.write(f"{ROOT}/{model_id}.yaml", data)

    def delete(self, model_id: str) -> None:
        if self.is_there(model_id):
            self.fs.delete(f"{ROOT}/{model_id}.yaml")

    def is_there(self, model_id: str) -> bool:
        return self.fs.exists(f"{ROOT}/{model_id}.yaml")

    # The process.

    def start(self) -> None:
        """A new process, which knows what the state directory says."""
        self.executor = ManualExecutor()
        self.runtime = _Runtime()
        self.manager = ModelManager(
            max_models=self.max_models,
            resources=FixedBudgets({"cpu": 10_000.0}),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=_Files(self.fs),  # type: ignore[arg-type]
            clock=self.clock,
            executor=self.executor,
        )
        self.source = DesiredSource(ROOT, self.fs, SETTLE_S)
        self.loop = Reconciler(
            self.source, self.manager, self.clock, store=Store(self.state), draw=lambda: 0.0
        )
        self.loop.restore()

    def settle(self, limit: int = 300) -> Turn:
        """Turns and lets time pass and work run, until nothing is left to do; starts again after a death."""
        quiet = 0
        for _ in range(limit):
            try:
                turn = self.loop.turn()
                busy = bool(self.executor.waiting)
                while self.executor.waiting:
                    self._effect()
                    self.executor.run_one()
            except Died:
                self.deaths += 1
                self.die_at = None
                self.start()
                quiet = 0
                continue
            quiet = quiet + 1 if turn.settled and not busy else 0
            if quiet == 3:
                return turn
            self.pass_time(STEP_S)
        raise AssertionError(f"did not settle: {turn.plan}")

    def order(self, command: Callable[[], object]) -> None:
        """What a person asks of the node; asked again if the node died before it was in force, because
        it is answered only then."""
        deaths = self.deaths
        command()
        self.settle()
        if self.deaths != deaths:
            with contextlib.suppress(SplitlearnError):
                command()
            self.settle()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.fs.advance(seconds)

    def _effect(self) -> None:
        self.effects += 1
        if self.effects - 1 == self.die_at:
            raise Died

    # What is seen.

    def served(self) -> dict[str, str]:
        """The hash of the spec that serves each model."""
        return {m: i.spec.spec_hash for m, i in self.manager.table.by_model.items()}

    @staticmethod
    def _measured(kept: ModelRecord) -> Measurement | None:
        """What is kept of the load of the version that is declared, its files' times aside."""
        accepted = kept.accepted
        found = of_version(kept.measured, (accepted.load_hash, accepted.weights or ""))
        return replace(found, weights="") if found is not None else None

    def end_state(self) -> dict[str, object]:
        """All that a restart must not change, by model id."""
        turn = self.loop.turn()
        served = self.served()
        records = self.loop._keeper.models
        assert len(self.runtime.open_models) == len(served), "something is left open"
        return {
            "models": {
                model_id: {
                    "generation": model.generation,
                    "spec": model.spec_hash,
                    "serves": served.get(model_id),
                    "held": bool(model.held),
                    "suspended": model.suspended,
                    "guarded": model.guarded,
                    "phase": str(self.loop.status.phases[model_id]),
                    "measured": self._measured(records[model_id]),
                    "history": [
                        (h.generation, h.what, h.source, h.outcome)
                        for h in records[model_id].history
                    ],
                }
                for model_id, model in turn.desired.models.items()
            },
            "served": sorted(served),
            "guard": turn.desired.prune_guard.digest if turn.desired.prune_guard else None,
            "confirmed": self.loop._orders.confirmed_prune,
        }
