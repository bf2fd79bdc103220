"""The seam between deciding that a model runs and running it.

A runtime starts a model from its config and gives back something that answers requests, knows its memory, and
can be closed. It decides nothing: whether there is room, when to start and when to close is the manager's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from splitlearn_comm.core import ComputeFunction
    from splitlearn_comm.core.packed import Output, Packed, Rows
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.errors import LoadError


_MOST_TRIAL_MB = 256.0
_UNMEASURED_ROWS = 4


def nothing_to_release() -> None:
    """The `release` of a model that keeps nothing outside its module."""


@dataclass(frozen=True)
class LoadedModel:
    """What a loader gives.

    Attributes:
        module: takes one tensor and returns one; in eval mode, on its device. If its `forward` also takes
            `past_key_values` and `use_cache`, it returns `(tensor, presents)` when asked for a cache.
        weights_mb: size of its parameters and buffers, each storage counted once, in MB (2**20 bytes).
        loader: which loader read it.
        notes: facts for people, a sentence each.
        release: forgets what the loader keeps beside the module; call it once the module is gone.
    """

    module: nn.Module
    weights_mb: float
    loader: str
    notes: tuple[str, ...] = ()
    release: Callable[[], None] = nothing_to_release


@dataclass(frozen=True, slots=True)
class Activations:
    """What a forward pass takes on its device beside the weights, by how many inputs are in it.

    Attributes:
        lines: pairs of MB whatever the batch, and MB for each input of it. Each pair is what is taken at
            one moment of the forward; which moment takes most depends on the batch.
    """

    lines: tuple[tuple[float, float], ...]

    def mb(self, batch_size: int) -> float:
        """The most that a forward of `batch_size` inputs takes, in MB (2**20 bytes)."""
        return max((fixed + each * batch_size for fixed, each in self.lines), default=0.0)


def largest_trial(batch_size: int, activations: Activations | None) -> int:
    """The largest batch to try before what a forward takes is reserved."""
    rows = batch_size
    if activations is None:
        return min(rows, _UNMEASURED_ROWS)
    while rows > 1 and activations.mb(rows) > _MOST_TRIAL_MB:
        rows //= 2
    return rows


@dataclass(frozen=True, slots=True)
class Joining:
    """Whether requests of a model may be joined into batches, as it was found by running it.

    Attributes:
        joins: they may, if their shapes are equal but for the first dimension.
        note: what was found, for people.
        lasts: it is so for as long as the version is the same.
        lengths: short sequences may, whatever their lengths; see `splitlearn_manager.runtime.sequences`.
    """

    joins: bool
    note: str
    lasts: bool = True
    lengths: bool = False


class Loader(Protocol):
    """Reads a model from its files."""

    def load(self, config: ModelConfig, device: str) -> LoadedModel:
        """The model on `device`, which is concrete: cpu, cuda:0, mps.

        Raises:
            LoadError: or one of its subclasses.
        """
        ...


class Begun(ABC):
    """A forward that runs elsewhere. Its answer is taken, or `finish` called, once, by any thread."""

    @abstractmethod
    def fileno(self) -> int | None:
        """Readable when there may be an answer; None if only `finish` can say what became of it."""

    @abstractmethod
    def take(self) -> Output | Sequence[Rows] | None:
        """The answer, if it is there and nothing has to be waited for; else `finish` says what became of it.

        Raises:
            ComputeError: as `ComputeFunction.compute` does; then it is finished.
        """

    @abstractmethod
    def finish(self) -> Output | Sequence[Rows]:
        """Wait for the answer: one to all rows, or to each part where their shapes differ.

        Raises:
            ComputeError: as `ComputeFunction.compute` does.
        """


class BeginsForwards(ABC):
    """A compute function whose forwards run elsewhere: whoever begins one can do other things meanwhile."""

    @abstractmethod
    def begin(self, parts: Sequence[Packed]) -> Begun:
        """Begin a forward of the rows of several requests as they came, in order. Raises nothing.

        Args:
            parts: at least one, of one dtype, and of the same sizes but for dimension 0; or sequences, as
                `ComputesSequences` has them.
        """


class ComputesSequences(ABC):
    """A compute function that takes sequences of several requests, whatever their lengths."""

    @abstractmethod
    def compute_sequences(self, parts: Sequence[Packed]) -> Sequence[Rows]:
        """Run the model on all of them at a time; an answer to each part.

        Args:
            parts: [rows, seq] each, of one dtype but bool, with a token at least.

        Raises:
            ComputeError: as `ComputeFunction.compute` does.
        """


@runtime_checkable
class TakesSequences(Protocol):
    """A module that can answer sequences of different lengths in one row, if running it shows that it does.

    Attributes:
        answers_tokens: whether its answer has a row for each token, and not for each row of an input.
        longest: the longest sequence that it takes; None for any.
    """

    answers_tokens: bool
    longest: int | None

    def forward_sequences(self, ids: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """The answers to all inputs, in their order: [tokens, …] if `answers_tokens`, else [rows, …].

        Args:
            ids: [tokens]: those of all inputs, one behind the other.
            shapes: of the inputs, [rows, seq] each.
        """
        ...


class RunningModel(Protocol):
    """A model that answers requests until it is closed."""

    @property
    def compute_function(self) -> ComputeFunction:
        """What answers requests; safe to call from several threads."""
        ...

    @property
    def memory_mb(self) -> float:
        """What it occupies on its device while no request runs, in MB (2**20 bytes): its weights."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts for people, a sentence each."""
        ...

    @property
    def warmed(self) -> bool:
        """Whether it has answered an input before its first request."""
        ...

    @property
    def joins(self) -> bool:
        """Whether requests may be joined; False until `join` has said so."""
        ...

    @property
    def joins_lengths(self) -> bool:
        """Whether short sequences may be, whatever their lengths; False until `join` has said so."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether one batch is best brought to it while another runs; may change at any time."""
        ...

    def example(self) -> torch.Tensor | None:
        """An input like those that it has answered in warm-up, the same in each run; None without any."""
        ...

    def find_joining(self) -> Joining:
        """Run a few forwards to find out whether requests may be joined.

        Raises nothing that the model raises. It is worth a call once a version.
        """
        ...

    def join(self, joining: Joining) -> None:
        """Take over what was found, in this load or an earlier one of the version."""
        ...

    def measure_activations(self) -> Activations | None:
        """Run a few forwards to measure what one takes beside the weights; None if that cannot be told.

        Raises nothing that the model raises. It is worth a call once a version, and not each time that it
        is loaded.
        """
        ...

    def when_ended(self, tell: Callable[[LoadError], None]) -> None:
        """Have `tell` called with why, once, if the model ends by itself; at once if it has.

        Never called for a model that is closed, nor for one that runs in this process.
        """
        ...

    def close(self) -> None:
        """Give its memory back. Nothing may use it any more; a second call does nothing."""
        ...


class Runtime(Protocol):
    """Starts models."""

    def start(self, config: ModelConfig, device: str) -> RunningModel:
        """Load the model on `device` and warm it up.

        Raises:
            LoadError: or one of its subclasses; nothing of the model is left then.
        """
        ...
