"""Runs models inside this process: requests run on the server's own threads.

`start` loads, makes the compute function, warms it up and optimizes it; if any of that fails, nothing is left
behind.
`close` drops every reference to the model and gives its memory back to the system.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_comm.core import ComputeFunction, ModelComputeFunction
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import LoadError, ModelUnavailable
from splitlearn_manager.runtime.activations import measure_activations
from splitlearn_manager.runtime.base import (
    Activations,
    Joining,
    LoadedModel,
    Loader,
    TakesSequences,
    largest_trial,
)
from splitlearn_manager.runtime.joining import random_input, try_joining
from splitlearn_manager.runtime.sequences import SequenceFunction, try_lengths
from splitlearn_manager.runtime.system_memory import (
    give_back,
    returning_what_is_freed,
    trim_heap,
    watch_module,
)
from splitlearn_manager.runtime.warmup import warm_up

if TYPE_CHECKING:
    import torch
    from torch import nn

TRAINED = "not optimized any more: a training step has changed the weights"


class ThreadRuntime:
    """Starts models in this process.

    Args:
        loader: reads the models' files.
        cache_dir: where code that is compiled for models is kept; None: where torch keeps it by default.
    """

    def __init__(self, loader: Loader, cache_dir: Path | None = None) -> None:
        self._loader = loader
        self._lock = threading.Lock()
        self._threads: int | None = None
        self._cache_dir = cache_dir

    def start(self, config: ModelConfig, device: str) -> RunningInThreads:
        """Load the model on `device` and warm it up.

        Raises:
            LoadError: or one of its subclasses; the model's memory has been given back.
        """
        self._use_all_processors()
        try:
            return self._start(config, device)
        except BaseException as error:
            # An error that is remembered, for a status page say, must not keep the weights with it.
            _forget_locals(error)
            give_back(device)
            raise

    def _start(self, config: ModelConfig, device: str) -> RunningInThreads:
        loaded = self._loader.load(config, device)
        try:
            function = _compute_function(loaded, config, device)
            warmup = warm_up(function, config)
            extra_mb, told = self._optimize(function, config, warmup.shape, loaded.weights_mb)
        except BaseException:
            loaded.release()
            raise
        # What was read and converted on the way is free by now, but not yet the system's.
        trim_heap()
        notes = (*loaded.notes, *warmup.notes, *told)
        loaded = replace(loaded, weights_mb=loaded.weights_mb + extra_mb)
        return RunningInThreads(loaded, function, config, device, notes, warmup.shape)

    def _use_all_processors(self) -> None:
        """What forwards are limited to, loads are not: weights are copied by all processors.

        PyTorch keeps the number for each thread, and gives a new one what was set last anywhere.
        """
        import torch

        with self._lock:
            if self._threads is None:
                self._threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def _optimize(
        self,
        function: ModelComputeFunction,
        config: ModelConfig,
        answered: tuple[int, ...] | None,
        weights_mb: float,
    ) -> tuple[float, tuple[str, ...]]:
        """What it takes beside the model, in MB, and the notes."""
        if config.optimize == "none":
            return 0.0, ()
        # Imported where it is needed, because it is large.
        from splitlearn_manager.runtime.optimize.choosing import optimize

        found = optimize(function, config, answered, weights_mb, cache_dir=self._cache_dir)
        return found.extra_mb, found.notes


def _forget_locals(error: BaseException | None) -> None:
    """Clear the variables of all frames that an error and its causes hold; their lines stay known."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _compute_function(
    loaded: LoadedModel, config: ModelConfig, device: str
) -> ModelComputeFunction:
    import torch

    name = config.config.input_dtype
    takes_sequences = isinstance(loaded.module, TakesSequences)
    return (SequenceFunction if takes_sequences else ModelComputeFunction)(
        loaded.module,
        device,
        config.model_id,
        input_dtype=getattr(torch, name) if name else None,
        input_shape=config.config.input_shape,
    )


class RunningInThreads:
    """A model of this process, until `close`.

    Args:
        answered: the shape of the input that it answered in warm-up; None if there was none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        function: ModelComputeFunction,
        config: ModelConfig,
        device: str,
        notes: tuple[str, ...],
        answered: tuple[int, ...] | None,
    ) -> None:
        self._release = loaded.release
        self._function: ModelComputeFunction | None = function
        self._config = config
        self._device = device
        self._answered = answered
        self._activations: Activations | None = None
        self._notes = notes
        self.memory_mb = loaded.weights_mb
        self.warmed = answered is not None
        self.joins = self.joins_lengths = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts for people, a sentence each: those of the load, and what has happened since."""
        trained = self._function is not None and self._function.trained_past_stand_in
        return (*self._notes, TRAINED) if trained else self._notes

    @property
    def module(self) -> nn.Module:
        """The model itself, as its loader has made it. Raises ModelUnavailable after `close`."""
        return self._open().model

    @property
    def compute_function(self) -> ComputeFunction:
        """What answers requests.

        Raises:
            ModelUnavailable: after `close`.
        """
        return self._open()

    @property
    def overlaps(self) -> bool:
        """As `ComputeFunction.overlaps`."""
        function = self._function
        return function is not None and function.overlaps

    def _open(self) -> ModelComputeFunction:
        if self._function is None:
            raise ModelUnavailable("the model has been unloaded")
        return self._function

    def measure_activations(self) -> Activations | None:
        """Run two forwards to measure what one takes beside the weights.

        None if the model was not warmed up, so that nothing is known of its inputs, or cannot be measured.
        """
        if self._function is None or self._answered is None:
            return None
        self._activations = measure_activations(self._function, self._config, self._answered)
        trim_heap()
        return self._activations

    def example(self) -> torch.Tensor | None:
        """An input of the shape that it answered in warm-up; None if there was none."""
        if self._function is None or self._answered is None:
            return None
        return random_input(self._function, tuple(self._answered))

    def find_joining(self) -> Joining:
        """Run a few forwards to find out whether requests may be joined."""
        function, batch_size = self._open(), self._config.batch_size
        largest = largest_trial(batch_size, self._activations)
        found = try_joining(function, self._answered, batch_size, largest)
        if found.joins and isinstance(function, SequenceFunction):
            found = try_lengths(function, found)
        trim_heap()
        return found

    def join(self, joining: Joining) -> None:
        """Take over what was found."""
        self.joins, self.joins_lengths = joining.joins, joining.lengths
        self._notes = (*self._notes, joining.note)

    def when_ended(self, tell: Callable[[LoadError], None]) -> None:
        """It ends with this process only."""

    def close(self) -> None:
        """Drop the model and give its memory back; a second call does nothing."""
        function, self._function = self._function, None
        if function is None:
            return
        with returning_what_is_freed():
            function.teardown()
            is_freed = watch_module(function.model)
            del function
            self._release()
            give_back(self._device, is_freed)
