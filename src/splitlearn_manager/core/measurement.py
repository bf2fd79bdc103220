"""What a version of a model was thought to take, and what loading it measured: pure data.

A measurement is of one version, and is what the next load of that version reserves. A few are kept for
each model, so that going back to an earlier version reserves what that one took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitlearn_manager.runtime.base import Activations, Joining

KEPT = 4
"""Versions of one model whose measurements are kept, the newest ones."""
_WORTH_A_WORD_MB = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one load measured, in MB (2**20 bytes).

    Attributes:
        load_hash, weights: the version that was loaded, as in `ModelSpec.version`.
        device: where it was loaded, such as `cpu` or `cuda:0`.
        estimated_mb: what the weights were thought to take before; None if nothing told.
        weights_mb: its parameters and buffers, each storage once.
        activations: what a forward takes beside them; None if none was measured.
        joining: whether its requests may be joined; None if that is to be found out anew.
    """

    load_hash: str
    weights: str
    device: str
    estimated_mb: float | None
    weights_mb: float
    activations: Activations | None = None
    joining: Joining | None = None

    @property
    def version(self) -> tuple[str, str]:
        return (self.load_hash, self.weights)

    def activations_mb(self, batch_size: int) -> float | None:
        """What a forward of `batch_size` inputs takes beside the weights; None if that is not known."""
        return self.activations.mb(batch_size) if self.activations is not None else None

    def total_mb(self, batch_size: int) -> float:
        """What a model with batches of up to `batch_size` inputs reserves."""
        return self.weights_mb + (self.activations_mb(batch_size) or 0.0)

    def in_words(self, batch_size: int) -> str:
        """The total and its parts, for people."""
        total = f"{self.total_mb(batch_size):,.0f} MB"
        activations_mb = self.activations_mb(batch_size) or 0.0
        if activations_mb < _WORTH_A_WORD_MB:
            return total
        return (
            f"{total} ({self.weights_mb:,.0f} MB of weights, {activations_mb:,.0f} MB of activations "
            f"for batches of {batch_size})"
        )


def of_version(kept: Sequence[Measurement], version: tuple[str, str]) -> Measurement | None:
    """The measurement of that version, if it is among them."""
    return next((found for found in kept if found.version == version), None)


def with_newest(kept: Sequence[Measurement], newest: Measurement) -> tuple[Measurement, ...]:
    """The measurements to keep, oldest first: one for a version, and no more than `KEPT`."""
    others = [found for found in kept if found.version != newest.version]
    return (*others, newest)[-KEPT:]
