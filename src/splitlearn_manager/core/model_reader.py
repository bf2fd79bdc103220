"""Reads a model so that it can be trusted: of one version, of the size that was allowed.

The manager asks for a spec and a device; this makes sure that the files were the same before and after
they were read, keeps what was measured as the estimate of the next load, and never answers with a model
larger than its own `max_memory_mb`. It starts no work of its own and holds no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.model_files import ModelFiles
from splitlearn_manager.errors import LoadError, OverMemoryLimit, WeightsChanged

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel, Runtime


class ModelReader:
    """See the module's text. Used from several threads, one a model.

    Args:
        runtime: where models run; None for threads of this process, made with the first load.
        files: what is behind a model_path.
    """

    def __init__(self, runtime: Runtime | None, files: ModelFiles) -> None:
        self._runtime = runtime
        self._files = files
        self._measured_mb: dict[str, tuple[tuple[str, str], float]] = {}
        self._estimated_mb: dict[str, tuple[tuple[str, str], float]] = {}

    def size_mb(self, spec: ModelSpec) -> float:
        """What a load of the spec reserves, in MB: what it measured before, else the estimate, else 0.

        Raises WeightsNotFound if nothing is at its model_path.
        """
        measured_mb = self.measured_mb(spec)
        if measured_mb is not None:
            return measured_mb
        question = (spec.spec_hash, spec.weights)
        asked, estimated_mb = self._estimated_mb.get(spec.model_id, (None, 0.0))
        if asked != question or not spec.weights:
            estimated_mb = self._files.estimate_mb(spec.config) or 0.0
            self._estimated_mb[spec.model_id] = (question, estimated_mb)
        return estimated_mb

    def measured_mb(self, spec: ModelSpec) -> float | None:
        """What a load of that version measured, in MB; None if there was none."""
        version, mb = self._measured_mb.get(spec.model_id, (None, 0.0))
        return mb if version == spec.version else None

    def fingerprint(self, config: ModelConfig) -> str:
        """What its files are now. Raises WeightsNotFound if there are none."""
        return self._files.fingerprint(config)

    def forget(self, model_id: str) -> None:
        """Drops the sizes of a model that nobody wants any more."""
        self._measured_mb.pop(model_id, None)
        self._estimated_mb.pop(model_id, None)

    def read(self, spec: ModelSpec, device: str) -> tuple[ModelSpec, RunningModel]:
        """Loads and warms the model; gives it with the spec that names the files it was read from.

        A copy that is still being written, or replaced in the middle, would give a mixed model: then
        nothing is kept, and WeightsChanged is raised. Raises OverMemoryLimit, or any LoadError.
        """
        before = self._files.fingerprint(spec.config)
        if spec.weights and spec.weights != before:
            raise WeightsChanged(f"model {spec.model_id!r}: its files are still changing")
        runtime = self._runtime or _thread_runtime()
        running = runtime.start(spec.config, _torch_device(spec.config, device))
        try:
            read = ModelSpec(spec.config, spec.spec_hash, spec.load_hash, before, spec.generation)
            self._check(read, running)
        except BaseException:
            running.close()
            raise
        return read, running

    def _check(self, spec: ModelSpec, running: RunningModel) -> None:
        try:
            changed = self._files.fingerprint(spec.config) != spec.weights
        except LoadError:
            changed = True
        if changed:
            raise WeightsChanged(f"model {spec.model_id!r}: its files changed while they were read")
        self._measured_mb[spec.model_id] = (spec.version, running.memory_mb)
        if (problem := over_own_limit(spec.config, running.memory_mb)) is not None:
            raise OverMemoryLimit(problem)


def over_own_limit(config: ModelConfig, mb: float) -> str | None:
    """What is wrong if a model of `mb` is larger than its own `max_memory_mb`, else None."""
    limit = config.max_memory_mb
    if limit is None or mb <= limit:
        return None
    return f"model {config.model_id!r} takes {mb:,.0f} MB, its max_memory_mb is {limit:,}"


def _torch_device(config: ModelConfig, device: str) -> str:
    """Where torch puts it: Apple's GPU shares the CPU's memory, so it is reserved as `cpu`."""
    return "mps" if config.device == "mps" else device


def _thread_runtime() -> Runtime:
    # Imported with the first load, because it brings torch.
    from splitlearn_manager.core.model_loader import ModelLoader
    from splitlearn_manager.runtime.thread import ThreadRuntime

    return ThreadRuntime(ModelLoader())
