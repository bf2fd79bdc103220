"""A directory as a source of desired state: scan, acceptance and weights behind one call.

`look(now)` is what the loop calls each turn; it is level-triggered, so calling it more or less often
changes when something is accepted, never what. Where nothing is otherwise than before, it returns the
very same object as before. `watch_paths` says what is worth a wake-up: the things that lie outside the
directory and would change what the next look sees.

It has no threads and no clock, and never raises for what files are or do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.files import FileSystem, RealFileSystem
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import fingerprint, resolve_source
from splitlearn_manager.desired.acceptance import Acceptance
from splitlearn_manager.desired.scanner import Fingerprint, Scanner
from splitlearn_manager.desired.state import (
    NO_INSTRUCTIONS,
    DesiredModel,
    DesiredState,
    Instructions,
)
from splitlearn_manager.desired.watch_paths import WatchPaths
from splitlearn_manager.desired.weights import WeightsState, WeightsWatch
from splitlearn_manager.errors import SplitlearnError

READ_LIMIT_BYTES = (1 << 20) + 1
"""One more than a model file may have, so that a longer one is seen to be too long."""


class DesiredSource:
    """Desired state from a directory.

    Args:
        root: the directory; it need not exist yet.
        fs: the file system's calls; None for the real ones.
        settle_s: seconds that two agreeing looks must be apart.
        prune_guard_percent: if more than this part of the models would go at once, they stay until
            somebody confirms it.
        on_progress: called with (done, total) while many files are parsed in one look.
    """

    def __init__(
        self,
        root: str | Path,
        fs: FileSystem | None = None,
        settle_s: float = 0.25,
        prune_guard_percent: float = 50.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # Absolute, but not resolved: a root that is a symbolic link is followed anew at each look.
        self.root = Path(os.path.abspath(root))
        self._fs = fs if fs is not None else RealFileSystem()
        self._scanner = Scanner(self.root, self._fs)
        self._acceptance = Acceptance(settle_s, self.root, prune_guard_percent, on_progress)
        self._weights = WeightsWatch(settle_s)
        self._configs: Mapping[str, ModelConfig] = {}
        self._told = _Told(DesiredState(), WeightsState({}, None, {}), DesiredState())
        self._paths = WatchPaths()

    @property
    def settle_s(self) -> float:
        """Seconds that two agreeing looks must be apart; takes effect with the next look."""
        return self._acceptance.settle_s

    @settle_s.setter
    def settle_s(self, value: float) -> None:
        self._acceptance.settle_s = value
        self._weights.settle_s = value

    @property
    def prune_guard_percent(self) -> float:
        """More than this part of the models does not go at once; takes effect with the next look."""
        return self._acceptance.prune_guard_percent

    @prune_guard_percent.setter
    def prune_guard_percent(self, value: float) -> None:
        self._acceptance.prune_guard_percent = value

    def restore(self, models: Iterable[DesiredModel]) -> None:
        """Take over what an earlier process had accepted; call it once, before the first look."""
        self._acceptance.restore(models)

    def look(self, now: float, instructions: Instructions = NO_INSTRUCTIONS) -> DesiredState:
        """Look at the directory and the weights.

        Args:
            now: monotonic seconds, taken before the call and never less than in the last one.
            instructions: what people asked for beside what the files say.
        """
        scan = self._scanner.scan()
        before = self._told
        state = self._acceptance.observe(scan, now, self._read, self._stat, instructions)
        if state.models is not before.accepted.models:
            self._configs = {model_id: model.config for model_id, model in state.models.items()}
        upcoming = self._acceptance.upcoming
        weights = self._weights.observe(
            self._configs, now, self._fingerprint, upcoming, instructions.watched
        )
        self._paths.follow(scan.links, self._configs, instructions.watched, self._weights.keys)
        if state is not before.accepted or weights is not before.weights:
            self._told = _Told(state, weights, _joined(state, weights, before))
        return self._told.state

    def watch_paths(self) -> tuple[str, ...]:
        """Absolute paths beside the root that the last looks depended on: links and weights, sorted.

        At most `MOST_PATHS`; where there are more, those of watched ids and links come first.
        """
        return self._paths.absolute(self.root)

    def _read(self, path: str) -> bytes:
        return self._fs.read(os.path.join(self.root, path), READ_LIMIT_BYTES)

    def _stat(self, path: str) -> Fingerprint:
        return self._fs.stat(os.path.join(self.root, path)).fingerprint

    def _fingerprint(self, config: ModelConfig) -> str:
        try:
            source = resolve_source(config, self._fs)
        except SplitlearnError:
            self._paths.found(config, ())  # nothing to watch; it is the weights' problem
            raise
        self._paths.found(config, (source.path, source.module_file, source.golden))
        return fingerprint(source, self._fs)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the last look said, and what it was made of."""

    accepted: DesiredState
    weights: WeightsState
    state: DesiredState


def _joined(accepted: DesiredState, weights: WeightsState, before: _Told) -> DesiredState:
    """Desired state with what is known of the weights: as much of the last one as still holds."""
    waits = [w for w in (accepted.next_check_s, weights.next_check_s) if w is not None]
    state = dataclasses.replace(
        accepted,
        models=_models_with(accepted, weights, before),
        next_check_s=min(waits, default=None),
    )
    return before.state if state == before.state else state


def _models_with(
    accepted: DesiredState, weights: WeightsState, before: _Told
) -> Mapping[str, DesiredModel]:
    if accepted.models is before.accepted.models and (
        weights.by_id is before.weights.by_id and weights.problems is before.weights.problems
    ):
        return before.state.models
    models: dict[str, DesiredModel] = {}
    for model_id, model in accepted.models.items():
        known, problem = weights.by_id.get(model_id), weights.problems.get(model_id)
        old = before.state.models.get(model_id)
        is_same = old is not None and model is before.accepted.models.get(model_id)
        if old is not None and is_same and (old.weights, old.weights_problem) == (known, problem):
            models[model_id] = old
        else:
            models[model_id] = dataclasses.replace(model, weights=known, weights_problem=problem)
    return models
