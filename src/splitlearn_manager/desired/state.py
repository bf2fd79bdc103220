"""Desired state as data: what acceptance hands to the planner.

Everything here is frozen and compares by value. Times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem


@dataclass(frozen=True, order=True, slots=True)
class SourceRef:
    """Where a model is declared: the file, relative to the root, and the line its document starts in."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class DesiredModel:
    """One accepted model.

    Attributes:
        config: the validated spec.
        generation: counts the accepted specs of this id, from 1; goes on after a restart.
        spec_hash: equal for equal specs, whatever the file looks like.
        load_hash: the part of the spec that shapes the loaded instance.
        source: the declaration that was accepted last.
        held: why this is the last good spec and not what the files say now; None when it is.
        accepted_at: when this generation was accepted.
        weights: the settled fingerprint of the files behind `model_path`; None while there is none.
        weights_problem: why the files behind `model_path` cannot be looked at; None when they can.
        suspended: people asked that it stays as it is; `held` says so too.
        seen_at: when the change that became this generation was first seen.
        guarded: a prune guard held it, and since then neither did a file declare it again nor anybody
            confirm that it goes. Kept across restarts, or a crash would be a confirmation.
        uncounted: accepted while others may have been going, so that it does not make a prune guard
            milder; until nothing is missing or in doubt. Kept across restarts, like the next three.
        contested: in conflict, which does not end by a doubt about one of the sides.
        unclaimed: no file declares it any more, not even one that is in doubt.
        claimed_by: the declarations that claim the id, where that is not just `source`.
        mark: names the bytes that it was read from, so that a later process need not parse them again;
            empty if their file has problems. Says nothing of the model, so it counts in no comparison.
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
    suspended: bool = False
    seen_at: float = 0.0
    guarded: bool = False
    uncounted: bool = False
    contested: bool = False
    unclaimed: bool = False
    claimed_by: tuple[SourceRef, ...] = ()
    mark: str = field(default="", compare=False)


@dataclass(frozen=True)
class PruneGuard:
    """So many models would go at once that somebody must confirm it first.

    Attributes:
        digest: names exactly this set of models; the confirmation repeats it.
        model_ids: those that no file declares any more, sorted.
        managed: how many models the directory had before they went, those included.
    """

    digest: str
    model_ids: tuple[str, ...]
    managed: int


@dataclass(frozen=True)
class Instructions:
    """What is asked of a source beside what the files say; given anew with each look.

    Attributes:
        suspended: ids that stay as they are, whatever the files say.
        confirmed_prune: the digest of a `PruneGuard` that somebody confirmed; empty if nobody did.
        watched: ids whose weights are looked at in every look (what runs, or is to be tried again);
            in a large directory the others take turns.
    """

    suspended: frozenset[str] = frozenset()
    confirmed_prune: str = ""
    watched: frozenset[str] = frozenset()


NO_INSTRUCTIONS = Instructions()


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
        prune_guard: models that would go at once, and wait for a confirmation; None when none do.
        undecided: restored models that are in no other field, because no look has decided yet whether
            a file still declares them. They are neither to be loaded nor to be forgotten.
    """

    models: Mapping[str, DesiredModel] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    conflicts: Mapping[str, tuple[SourceRef, ...]] = field(default_factory=dict)
    source_available: bool = False
    source_message: str = ""
    complete: bool = False
    next_check_s: float | None = None
    server: ServerConfig | None = None
    prune_guard: PruneGuard | None = None
    undecided: Mapping[str, DesiredModel] = field(default_factory=dict)


class Source(Protocol):
    """What the reconciler asks for desired state."""

    def restore(self, models: Iterable[DesiredModel]) -> None:
        """Take over what an earlier process had accepted; called once, before the first look.

        Such a model keeps its generation if its file still says the same, and its last good spec if
        the file is broken now. It is part of what is desired once a look has decided about it.
        """
        ...

    def look(self, now: float, instructions: Instructions = NO_INSTRUCTIONS) -> DesiredState:
        """Look at the source at `now` (monotonic seconds) and say what is desired."""
        ...
