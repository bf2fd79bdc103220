"""What `verification` finds, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answers:
    """What a version answered.

    Attributes:
        asked: a digest of the inputs.
        outputs: CPU tensors.
        finite: whether all their values are.
    """

    asked: str
    outputs: tuple[torch.Tensor, ...]
    finite: bool


@dataclass(frozen=True)
class Verified:
    """A version that may serve.

    Attributes:
        answers: None where nothing is known to ask it.
        notes: what was found, a sentence each.
    """

    answers: Answers | None = None
    notes: tuple[str, ...] = ()


NOTHING_KNOWN = Verified()
