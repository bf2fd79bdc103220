"""GPUs made of plain data: memory that loads take and give back piece by piece, as NVML then shows it.

    lab = GpuLab(FakeGpu(total_mb=1000), FakeGpu(total_mb=1000))
    lab.declare("a", 400)
    lab.settle()
    assert lab.placed() == {"a": "cuda:0"}

Real: the resource manager over a fake NVML, the manager, planning, the loop. Fake: the GPUs, models, files,
time, work. A GPU's memory is a line of MB on which every allocation is one piece of it, the first that is
large enough, so free memory in small pieces is of no use to a large allocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.model_loader import OUT_OF_MEMORY
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.others_use import Reading
from splitlearn_manager.core.resource_manager import ResourceManager
from splitlearn_manager.errors import LoadError
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.reconcile.turns import Turn
from support.fake_nvml import FakeGpu, FakeNvml
from support.fakes import (
    FakeClock,
    FakeFiles,
    FakeRunning,
    FakeRuntime,
    FakeSource,
    ManualExecutor,
    model,
)


class FakeOutOfMemory(Exception):
    """What a driver says when no piece of its memory is large enough."""


@dataclass(frozen=True)
class Piece:
    """MB from `start` on that somebody holds."""

    start: float
    mb: float

    @property
    def end(self) -> float:
        return self.start + self.mb


class FakeVram:
    """The memory of one GPU; `gpu.used_mb` always says what is taken of it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self._pieces: list[Piece] = []
        if gpu.used_mb:
            self.take(gpu.used_mb)

    def take(self, mb: float) -> Piece:
        """The first hole's first `mb` MB. Raises FakeOutOfMemory if no hole is large enough."""
        for start, end in self.holes():
            if end - start >= mb:
                piece = Piece(start, mb)
                self._pieces.append(piece)
                self._tell()
                return piece
        raise FakeOutOfMemory(
            f"{mb:g} MB in one piece, of {self.gpu.total_mb - self.gpu.used_mb:g}"
        )

    def give(self, piece: Piece) -> None:
        self._pieces.remove(piece)
        self._tell()

    def holes(self) -> list[tuple[float, float]]:
        """Where what is free begins and ends, in order."""
        found, at = [], 0.0
        for piece in sorted(self._pieces, key=lambda p: p.start):
            if piece.start > at:
                found.append((at, piece.start))
            at = piece.end
        return [*found, (at, self.gpu.total_mb)] if at < self.gpu.total_mb else found

    def _tell(self) -> None:
        self.gpu.used_mb = sum(piece.mb for piece in self._pieces)


class RunningOnGpu(FakeRunning):
    """A model that holds pieces of a GPU's memory until it is closed."""

    def __init__(self, config: ModelConfig, vram: FakeVram, pieces: Sequence[Piece]) -> None:
        super().__init__(config, sum(piece.mb for piece in pieces))
        self._vram = vram
        self._pieces = pieces

    def close(self) -> None:
        super().close()
        for piece in self._pieces:
            self._vram.give(piece)


@dataclass
class GpuRuntime(FakeRuntime):
    """Loads models onto fake GPUs; one without room for all of a model's pieces keeps none of them.

    Attributes:
        vram: the memory behind each `cuda:N` of this process.
        context_mb: what the first load on a GPU takes of it for this process, for good.
        pieces_mb: the allocations of each model, by id; of others, one of the size in `sizes_mb`.
    """

    vram: Mapping[str, FakeVram]
    context_mb: float = 0.0
    pieces_mb: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._contexts: set[str] = set()

    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        if device == "cpu" or config.model_id in self.failures:
            return super().start(config, device)
        self.started.append((config.model_id, device))
        vram, pieces = self.vram[device], list[Piece]()
        sizes = self.pieces_mb.get(config.model_id, (self.sizes_mb[config.model_id],))
        try:
            if device not in self._contexts and self.context_mb:
                vram.take(self.context_mb)
            self._contexts.add(device)
            for mb in sizes:
                pieces.append(vram.take(mb))
        except FakeOutOfMemory as error:
            for piece in pieces:
                vram.give(piece)
            raise LoadError(
                f"there is not enough memory on {device} to load {config.model_path}",
                reason=OUT_OF_MEMORY,
            ) from error
        running = RunningOnGpu(config, vram, pieces)
        self.running.append(running)
        return running


class _GpusAlone(ResourceManager):
    """What this machine's own memory is used for is left out of account."""

    def readings(self) -> dict[str, Reading]:
        return {device: at for device, at in super().readings().items() if device != "cpu"}


class GpuLab:
    """A loop over GPUs that the test turns by hand; see the module's text.

    Args:
        gpus: the machine's GPUs, in the driver's order.
        cuda: those that are `cuda:0`, `cuda:1`, … for this process; by default `gpus`.
        visible: CUDA_VISIBLE_DEVICES, which must mean the same; None for not set.
        percent, quotas_mb: the limits of server.yaml; the CPU has 10,000 MB unless they say otherwise.
    """

    def __init__(
        self,
        *gpus: FakeGpu,
        cuda: Sequence[FakeGpu] | None = None,
        visible: str | None = None,
        percent: float = 80,
        quotas_mb: Mapping[str, float] | None = None,
        context_mb: float = 0.0,
        max_models: int = 20,
    ) -> None:
        self.nvml = FakeNvml(*gpus)
        shown = gpus if cuda is None else cuda
        self.vram = {f"cuda:{index}": FakeVram(gpu) for index, gpu in enumerate(shown)}
        self.runtime = GpuRuntime(self.vram, context_mb)
        self.files = FakeFiles()
        self.clock = FakeClock()
        self.executor = ManualExecutor()
        self.source = FakeSource()
        self.manager = ModelManager(
            max_models=max_models,
            resources=_GpusAlone(
                percent,
                {"cpu": 10_000.0, **(quotas_mb or {})},
                self.nvml,
                environ={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible},
                torch_has_cuda=lambda: True,
                memory_limits=lambda: (),
                clock=self.clock,
            ),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=self.files,  # type: ignore[arg-type]
            clock=self.clock,
            executor=self.executor,
        )
        self.loop = Reconciler(
            self.source, self.manager, self.clock, max_parallel_loads=100, draw=lambda: 0.0
        )

    def declare(
        self,
        model_id: str,
        mb: float,
        *,
        estimate_mb: float | None = None,
        pieces_mb: tuple[float, ...] | None = None,
        **keys: object,
    ) -> None:
        """Declares a model that takes `mb` once loaded, and is thought to take `estimate_mb` (`mb`)."""
        self.clock.advance(1.0)
        self.runtime.sizes_mb[model_id] = mb
        if pieces_mb is not None:
            assert math.isclose(sum(pieces_mb), mb)
            self.runtime.pieces_mb[model_id] = pieces_mb
        self.files.estimates_mb[model_id] = mb if estimate_mb is None else estimate_mb
        config = model(model_id, **{"device": "auto", **keys})
        self.source.declare(config, at=self.clock.now())

    def remove(self, model_id: str) -> None:
        self.source.remove(model_id)

    def settle(self) -> Turn:
        """Turns and lets work run until nothing is left to do."""
        for _ in range(50):
            turn = self.loop.turn()
            if turn.settled and not self.executor.waiting:
                return turn
            self.executor.run_all()
        raise AssertionError(f"did not settle: {turn.plan}")

    def load(self, model_id: str, mb: float, **keys: object) -> None:
        """Declares a model and settles."""
        self.declare(model_id, mb, **keys)  # type: ignore[arg-type]
        self.settle()

    def pass_time(self, seconds: float) -> Turn:
        self.clock.advance(seconds)
        return self.settle()

    def placed(self) -> dict[str, str]:
        """The device of each model that serves."""
        return {m: i.device for m, i in self.manager.table.by_model.items()}

    def phase(self, model_id: str) -> Phase | None:
        return self.loop.status.phases.get(model_id)

    def reason(self, model_id: str) -> object:
        return self.loop.status.published[model_id]["reason"]

    def reserved_mb(self) -> dict[str, float]:
        ledger = self.manager.snapshot().ledger
        return {device: ledger.used_mb(device) for device in self.vram}

    def used_mb(self) -> dict[str, float]:
        """What NVML would say is used, by this process's names of the GPUs."""
        return {device: vram.gpu.used_mb for device, vram in self.vram.items()}
