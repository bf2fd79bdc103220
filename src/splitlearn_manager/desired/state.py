"""Desired state as data: what acceptance hands to the planner.

Everything here is frozen and compares by value. Times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem


@dataclass(frozen=True, order=True)
class SourceRef:
    """Where a model is declared: the file, relative to the root, and the line its document starts in."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class DesiredModel:
    """One accepted model.

    Attributes:
        config: the validated spec.
        generation: counts the accepted specs of this id in this process, from 1.
        spec_hash: equal for equal specs, whatever the file looks like.
        load_hash: the part of the spec that shapes the loaded instance.
        source: the declaration that was accepted last.
        held: why this is the last good spec and not what the files say now; None when it is.
        accepted_at: when this generation was accepted.
        weights: the settled fingerprint of the files behind `model_path`; None while there is none.
        weights_problem: why the files behind `model_path` cannot be looked at; None when they can.
    """

    config: ModelConfig
    generation: int
    spec_hash: str
    load_hash: str
    source: SourceRef
    held: str | None = None
    accepted_at: float = 0.0
    weights: str | None = None
    weights_problem: str | None = None


@dataclass(frozen=True)
class DesiredState:
    """All that the directory asks for, as far as it can be trusted.

    Attributes:
        models: accepted models by id, sorted.
        problems: what people should correct, sorted by file and line.
        conflicts: ids that several declarations claim, with those declarations.
        source_available: the directory could be listed.
        source_message: what is wrong with the directory or a part of it; empty when nothing is.
        complete: all that the directory held was once seen, settled and decided. Once true it stays
            true; whether something is pending now is `next_check_s`.
        next_check_s: seconds until a look that may settle something; None when nothing is pending.
        server: the last good `server.yaml`; None when there is none.
    """

    models: Mapping[str, DesiredModel] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    conflicts: Mapping[str, tuple[SourceRef, ...]] = field(default_factory=dict)
    source_available: bool = False
    source_message: str = ""
    complete: bool = False
    next_check_s: float | None = None
    server: ServerConfig | None = None


class Source(Protocol):
    """What the reconciler asks for desired state."""

    def look(self, now: float) -> DesiredState:
        """Look at the source at `now` (monotonic seconds) and say what is desired."""
        ...
