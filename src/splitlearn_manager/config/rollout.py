"""`Rollout`: the `rollout:` map of a model's file, how a new version takes over its traffic."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from splitlearn_manager.config.fields import Integer, Percent, Share
from splitlearn_manager.config.mistakes import expectation

MOST_STEPS = 50
Natural = Annotated[Integer, Field(ge=0)]
Ratio = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)]


class Stage(BaseModel):
    """A share of the requests, for a time."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    percent: Percent
    """Share of the requests, in percent."""
    for_s: Share
    """How long, in seconds; longer until `min_requests` have been answered."""


def _check_steps(value: tuple[Stage, ...]) -> tuple[Stage, ...]:
    if not 1 <= len(value) <= MOST_STEPS:
        raise expectation(f"a list of 1 to {MOST_STEPS} steps")
    return value


class Rollout(BaseModel):
    """A new version that has been verified is tried beside the old one before it takes over."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    canary: Annotated[tuple[Stage, ...], AfterValidator(_check_steps)] | None = None
    """The new version answers a growing share of the requests, step by step."""
    shadow: Stage | None = None
    """The new version is asked a copy of a share of the requests once they have been answered; what it
    says is compared and reaches nobody."""
    max_error_rate: Rate = 0.01
    """The new version is taken back if its share of failed requests is larger than the old one's by more
    than this."""
    max_latency_ratio: Ratio | None = None
    """The new version is taken back if a request takes it, on average, more than this many times what it
    takes the old one. null: whatever it takes."""
    min_requests: Natural = 10
    """Requests of the new version before a step may end, and before it is judged."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.canary is None) == (self.shadow is None):
            raise expectation("either canary or shadow")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What comes one after the other."""
        if self.shadow is not None:
            return (self.shadow,)
        assert self.canary is not None
        return self.canary
