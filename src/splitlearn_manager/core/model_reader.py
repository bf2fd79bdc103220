"""Reads a model so that it can be trusted: of one version, of the size that was allowed.

The manager asks for a spec and a device; this makes sure that the files were the same before and after
they were read, keeps what was measured as the estimate of the next load, and never answers with a model
larger than its own `max_memory_mb`. It starts no work of its own and holds no model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import DeadlinePassed
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.measurement import Measurement, of_version, with_newest
from splitlearn_manager.core.model_files import ModelFiles
from splitlearn_manager.errors import LoadError, LoadTimeout, OverMemoryLimit, WeightsChanged
from splitlearn_manager.runtime.base import largest_trial
from splitlearn_manager.runtime.verified import NOTHING_KNOWN, Verified

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel, Runtime
    from splitlearn_manager.runtime.verified import Answers


@dataclass(frozen=True)
class Read:
    """A model that may serve.

    Attributes:
        spec: names the files that it was read from.
        notes: what was found of its answers, a sentence each.
        answers: for the next version to be compared with.
    """

    spec: ModelSpec
    running: RunningModel
    notes: tuple[str, ...] = ()
    answers: Answers | None = None


class ModelReader:
    """See the module's text. Used from several threads, one a model.

    Args:
        runtime: where models run; None for what each config says, made with the first load.
        files: what is behind a model_path.

    Attributes:
        cache_dir: where the default runtime keeps code that it compiles; to be set before the first load.
    """

    def __init__(self, runtime: Runtime | None, files: ModelFiles) -> None:
        self.cache_dir: Path | None = None
        self._runtime = runtime
        self._lock = threading.Lock()
        self._files = files
        self._measured: dict[str, tuple[Measurement, ...]] = {}
        self._answers: dict[str, tuple[tuple[str, str], Answers | None]] = {}
        self._estimated_mb: dict[str, tuple[tuple[str, str], float | None]] = {}

    def size_mb(self, spec: ModelSpec) -> float:
        """What a load of the spec reserves, in MB: what it measured before, else the estimate, else 0.

        What was measured covers a forward of the largest batch; an estimate is of the weights alone.
        Raises WeightsNotFound if nothing is at its model_path.
        """
        if (measured := self.measured(spec)) is not None:
            return measured.total_mb(spec.config.batch_size)
        question = (spec.spec_hash, spec.weights)
        asked, estimated_mb = self._estimated_mb.get(spec.model_id, (None, None))
        if asked != question or not spec.weights:
            estimated_mb = self._files.estimate_mb(spec.config)
            self._estimated_mb[spec.model_id] = (question, estimated_mb)
        return estimated_mb or 0.0

    def measured(self, spec: ModelSpec) -> Measurement | None:
        """What a load of that version measured, in this process or an earlier one; None if there was none."""
        return of_version(self._measured.get(spec.model_id, ()), spec.version)

    def measurements(self, model_id: str) -> tuple[Measurement, ...]:
        """What loads of the model's versions measured, the latest load last."""
        return self._measured.get(model_id, ())

    def restore(self, model_id: str, measurements: Sequence[Measurement]) -> None:
        """Takes over what an earlier process measured."""
        self._measured[model_id] = tuple(measurements)

    def fingerprint(self, config: ModelConfig) -> str:
        """What its files are now. Raises WeightsNotFound if there are none."""
        return self._files.fingerprint(config)

    def forget(self, model_id: str) -> None:
        """Drops the sizes of a model that nobody wants any more."""
        self._measured.pop(model_id, None)
        self._answers.pop(model_id, None)
        self._estimated_mb.pop(model_id, None)

    def served(self, read: Read) -> None:
        """It serves from now on: the next version is compared with it."""
        model_id, version = read.spec.model_id, read.spec.version
        if self._answers.get(model_id, (None, None))[0] != version:
            # None where nothing was asked, or the answers are too large to keep: not those of an older one.
            self._answers[model_id] = (version, read.answers)

    def read(self, spec: ModelSpec, device: str) -> Read:
        """Loads, warms and verifies the model, for as long as its load may take.

        A copy that is still being written, or replaced in the middle, would give a mixed model: then
        nothing is kept, and WeightsChanged is raised. Raises OverMemoryLimit, or any LoadError.
        """
        # What runs in a process of its own can be ended, whichever forward of the load it hangs in.
        with working_for(spec.config.load_timeout_s):
            return self._read(spec, device)

    def _read(self, spec: ModelSpec, device: str) -> Read:
        before = self._files.fingerprint(spec.config)
        if spec.weights and spec.weights != before:
            raise WeightsChanged(f"model {spec.model_id!r}: its files are still changing")
        runtime = self._runtime or self._default_runtime()
        running = runtime.start(spec.config, _torch_device(spec.config, device))
        try:
            read = ModelSpec(spec.config, spec.spec_hash, spec.load_hash, before, spec.generation)
            self._check_unchanged(read)
            measured = self._measure(read, running, device, self._estimate_of(spec, read))
            if problem := over_own_limit(read.config, measured.weights_mb):
                raise OverMemoryLimit(problem)
            verified = self._verify(read, running)
        except DeadlinePassed as passed:
            running.close()
            raise LoadTimeout(passed.message) from passed
        except BaseException:
            running.close()
            raise
        return Read(read, running, verified.notes, verified.answers)

    def _verify(self, spec: ModelSpec, running: RunningModel) -> Verified:
        """Judges a version that has not served in this process."""
        version, before = self._answers.get(spec.model_id, (None, None))
        example = running.example() if version != spec.version else None
        if version == spec.version or (example is None and spec.config.golden_path is None):
            return NOTHING_KNOWN
        # Imported where it is needed, because it brings torch.
        from splitlearn_manager.runtime.verification import verify

        measured = self.measured(spec)
        activations = measured.activations if measured is not None else None
        return verify(
            spec.config,
            running.compute_function,
            example,
            joins=running.joins,
            before=before,
            largest_rows=largest_trial(spec.config.batch_size, activations),
        )

    def _default_runtime(self) -> Runtime:
        # Imported with the first load, because it brings torch.
        from splitlearn_manager.core.model_loader import ModelLoader
        from splitlearn_manager.runtime.choice import ChosenRuntime

        with self._lock:
            if self._runtime is None:
                self._runtime = ChosenRuntime(ModelLoader(), self.cache_dir)
            return self._runtime

    def _estimate_of(self, asked: ModelSpec, read: ModelSpec) -> float | None:
        """What was estimated for what has been read, in this load or an earlier one of the version."""
        question, estimated_mb = self._estimated_mb.get(asked.model_id, (None, None))
        if question == (asked.spec_hash, asked.weights):
            return estimated_mb
        before = self.measured(read)
        return before.estimated_mb if before is not None else None

    def _check_unchanged(self, spec: ModelSpec) -> None:
        try:
            changed = self._files.fingerprint(spec.config) != spec.weights
        except LoadError:
            changed = True
        if changed:
            raise WeightsChanged(f"model {spec.model_id!r}: its files changed while they were read")

    def _measure(
        self, spec: ModelSpec, running: RunningModel, device: str, estimated_mb: float | None
    ) -> Measurement:
        """What the model takes, and whether its requests may be joined.

        Forwards are run for that once for a version on a device: they cost some.
        """
        before = self.measured(spec)
        if before is not None and before.device != device:
            before = None
        activations = before.activations if before is not None else None
        if activations is None:
            activations = running.measure_activations()
        joining = before.joining if before is not None else None
        if joining is None or spec.config.batch_size == 1:
            joining = running.find_joining()
        running.join(joining)
        measured = Measurement(
            *spec.version,
            device,
            estimated_mb,
            running.memory_mb,
            activations,
            joining if joining.lasts else None,
        )
        known = self.measurements(spec.model_id)
        self._measured[spec.model_id] = with_newest(known, measured)
        return measured


def over_own_limit(
    config: ModelConfig, mb: float, measured: Measurement | None = None
) -> str | None:
    """What is wrong if the weights are larger than the model's own `max_memory_mb`, else None.

    What requests take beside the weights is no part of that limit: it is the operator's word about the
    model, and batches as large as those that are reserved for may never come.

    Args:
        mb: what the weights are thought to take, unless they have been `measured`.
    """
    limit = config.max_memory_mb
    weights_mb = measured.weights_mb if measured is not None else mb
    if limit is None or weights_mb <= limit:
        return None
    return f"model {config.model_id!r} takes {weights_mb:,.0f} MB, its max_memory_mb is {limit:,}"


def _torch_device(config: ModelConfig, device: str) -> str:
    """Where torch puts it: Apple's GPU shares the CPU's memory, so it is reserved as `cpu`."""
    return "mps" if config.device == "mps" else device
