"""Runs each model in a worker process of its own: what crashes there is one model, and nothing else.

The node's threads call the worker as they would call the model, through shared memory. A worker that ends by
itself fails the requests inside it, and its instance; a model that hangs is ended where a request's deadline
has long passed. Unloading ends the process, so its memory is back at once.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from splitlearn_comm.core.compute_function import ComputeFunction
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import LoadError, LoadTimeout, ModelUnavailable, WorkerDied
from splitlearn_manager.runtime.base import Activations, Joining
from splitlearn_manager.runtime.channel import Closed, DescriptorsLost, Message
from splitlearn_manager.runtime.in_worker import InWorker
from splitlearn_manager.runtime.lent_weights import LentWeights
from splitlearn_manager.runtime.thread import TRAINED
from splitlearn_manager.runtime.worker_errors import raised_in
from splitlearn_manager.runtime.workers import Worker, WorkerStarter

_GIVEN_UP_AFTER_S = 1.0
"""So long after load_timeout_s the worker of a load is ended: the manager has given it up by then."""


class ProcessRuntime:
    """Starts models in processes of their own.

    Args:
        cache_dir: where code that is compiled for models is kept.
    """

    def __init__(
        self, starter: WorkerStarter | None = None, *, cache_dir: Path | None = None
    ) -> None:
        self._starter = starter or WorkerStarter()
        self._cache_dir = cache_dir
        self._lent = LentWeights()
        self._serial = itertools.count(1)

    def start(self, config: ModelConfig, device: str) -> RunningInProcess:
        """Load the model on `device` in a new worker, and warm it up there.

        Raises:
            LoadError: or one of its subclasses, as in a thread; WorkerDied if the process ended meanwhile,
                LoadTimeout if it had to be ended. Nothing of the model is left.
        """
        number = next(self._serial)
        worker = self._starter.start(config.model_id, _imports(config))
        try:
            with self._lent.offer() as (lenders, descriptors):
                asked = (config, device, torch.get_num_threads(), self._cache_dir)
                answer, kept = _load(worker, asked, lenders, descriptors)
                self._lent.loaded(number, answer, kept)
        except BaseException:
            worker.close()
            self._lent.gone(number)
            raise
        notes = (*answer["notes"], self._note(worker))
        return RunningInProcess(worker, config, answer, notes, lambda: self._lent.gone(number))

    def _note(self, worker: Worker) -> str:
        how = "" if self._starter.forks else ", started anew because this system cannot fork it"
        return f"runs in a process of its own, pid {worker.pid}{how}"


def _imports(config: ModelConfig) -> tuple[str, ...]:
    """What the fork server imports once, for all workers that need it."""
    transformers = ("transformers",) if config.model_type == "huggingface" else ()
    compiles = config.optimize in ("compile", "auto")
    return (*transformers, "torch._inductor.compile_fx") if compiles else transformers


def _load(
    worker: Worker,
    asked: tuple[ModelConfig, str, int, Path | None],
    lenders: Sequence[object],
    descriptors: Sequence[int],
) -> tuple[Message, list[int]]:
    config = asked[0]
    model_id, pickled = config.model_id, pickle.dumps(asked)
    try:
        with worker.connection() as connection:
            connection.call(
                {"op": "load", "lenders": lenders},
                (torch.frombuffer(bytearray(pickled), dtype=torch.uint8),),
                descriptors=descriptors,
            )
            answer, _, kept = connection.answer(config.load_timeout_s + _GIVEN_UP_AFTER_S)
    except TimeoutError:
        raise LoadTimeout(
            f"model {model_id!r} was not loaded within load_timeout_s = {config.load_timeout_s:g} s; "
            "its worker process has been ended"
        ) from None
    except DescriptorsLost as lost:
        raise LoadError(
            f"model {model_id!r}: its weights cannot be kept for others: {lost}"
        ) from None
    except Closed:
        why = worker.why_ended() or "it has closed its connection"
        raise WorkerDied(
            f"model {model_id!r}: its worker process died while it loaded: {why}"
        ) from None
    if (error := answer.get("error")) is not None:
        raise raised_in(model_id, error, loading=True)
    return answer, kept


class RunningInProcess:
    """A model in a worker process, until `close`."""

    def __init__(
        self,
        worker: Worker,
        config: ModelConfig,
        answer: Message,
        notes: tuple[str, ...],
        release: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._function = InWorker(worker, config.model_id)
        self._model_id = config.model_id
        self._release = release
        self._lock = threading.Lock()
        self._closed = False
        self._notes = notes
        self.memory_mb = float(answer["weights_mb"])
        self.warmed = bool(answer["warmed"])
        self.overlaps = True
        self.joins = self.joins_lengths = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts for people, a sentence each: those of the load, and what has happened since."""
        return (*self._notes, TRAINED) if self._function.trained else self._notes

    @property
    def compute_function(self) -> ComputeFunction:
        """What answers requests.

        Raises:
            ModelUnavailable: after `close`.
        """
        if self._closed:
            raise ModelUnavailable("the model has been unloaded")
        return self._function

    def example(self) -> torch.Tensor | None:
        """An input of the shape that it answered in warm-up; None if there was none."""
        return next(iter(self._function.ask({"op": "example"})[1]), None)

    def find_joining(self) -> Joining:
        """Have the worker run a few forwards to find out whether requests may be joined."""
        found = self._function.ask({"op": "joining"})[0]
        return Joining(
            bool(found["joins"]), str(found["note"]), bool(found["lasts"]), bool(found["lengths"])
        )

    def join(self, joining: Joining) -> None:
        """Take over what was found."""
        self.joins = self._function.takes_turns = joining.joins
        self.joins_lengths = joining.lengths
        self._notes = (*self._notes, joining.note)

    def measure_activations(self) -> Activations | None:
        """Have the worker run two forwards to measure what one takes beside the weights."""
        lines = self._function.ask({"op": "activations"})[0]["lines"]
        return None if lines is None else Activations(tuple((a, b) for a, b in lines))

    def when_ended(self, tell: Callable[[LoadError], None]) -> None:
        """Have `tell` called once if the worker ends by itself; at once if it has."""
        model_id = self._model_id
        self._worker.when_ended(
            lambda why: tell(WorkerDied(f"model {model_id!r}: its worker process died: {why}"))
        )

    def close(self) -> None:
        """End the worker and wait until its memory is back; a second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._worker.close()
            self._release()
