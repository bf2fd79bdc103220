"""When the files behind `model_path` have changed for good: the same settle rule as for desired files.

A model directory may be copied for minutes, a checkpoint rewritten in place. A new fingerprint counts
when two looks at least `settle_s` apart agree on it; until then, and while the files are missing, the
last settled one stays, because the model that was loaded from it goes on serving.

Looks at the weights of models that are about to be accepted too (`upcoming`), so that spec and weights
settle side by side rather than one after the other. Never reads a weights file: its cost is that of the
injected fingerprint, a stat for each file, once for each distinct source however many models share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.errors import SplitlearnError

WeightsFingerprint = Callable[[ModelConfig], str]
"""What the files behind a config look like. Raises SplitlearnError (WeightsNotFound) if there are none."""

WeightsKey = tuple[str, str, str | None, Path | None]


@dataclass(frozen=True)
class WeightsState:
    """What is known about the weights of the accepted models.

    Attributes:
        by_id: the settled fingerprint; ids without one, as yet, are absent.
        next_check_s: seconds until a look may settle another; None when nothing is pending.
        problems: by id, why the files cannot be looked at.
    """

    by_id: Mapping[str, str]
    next_check_s: float | None
    problems: Mapping[str, str]


def weights_key(config: ModelConfig) -> WeightsKey:
    """What decides where the weights are looked for; models for which it is equal share a look."""
    return (config.model_path, config.model_type, config.config.factory, config.base_dir)


class _Source:
    """The files of one key."""

    def __init__(self) -> None:
        self.settling: Settling[str] = Settling()
        self.settled: str | None = None
        self.problem: str | None = None

    def look(
        self, config: ModelConfig, now: float, settle_s: float, ask: WeightsFingerprint
    ) -> None:
        try:
            self.settling.look(ask(config), now)
        except SplitlearnError as error:
            self.problem = error.message
            self.settling.forget()
            return
        self.problem = None
        if self.settling.settled(now, settle_s):
            self.settled = self.settling.value

    def pending_s(self, now: float, settle_s: float) -> float | None:
        if not self.settling.known or self.settling.value == self.settled:
            return None
        return self.settling.remaining_s(now, settle_s)


class WeightsWatch:
    """Follows the weights of all accepted and upcoming models.

    Args:
        settle_s: seconds that two agreeing looks must be apart; may be changed between two looks.
    """

    def __init__(self, settle_s: float) -> None:
        self.settle_s = settle_s
        self._sources: dict[WeightsKey, _Source] = {}

    def observe(
        self,
        models: Mapping[str, ModelConfig],
        now: float,
        fingerprint: WeightsFingerprint,
        upcoming: Iterable[ModelConfig] = (),
    ) -> WeightsState:
        """Look at all weights once.

        Args:
            models: the accepted configs by id.
            now: monotonic seconds.
            fingerprint: called once for each distinct source.
            upcoming: configs that may be accepted soon.
        """
        wanted = {weights_key(config): config for config in (*models.values(), *upcoming)}
        self._sources = {key: self._sources.get(key) or _Source() for key in wanted}
        for key, config in wanted.items():
            self._sources[key].look(config, now, self.settle_s, fingerprint)
        of_model = {i: self._sources[weights_key(config)] for i, config in models.items()}
        waits = [
            wait
            for source in self._sources.values()
            if (wait := source.pending_s(now, self.settle_s)) is not None
        ]
        return WeightsState(
            by_id={i: s.settled for i, s in of_model.items() if s.settled is not None},
            next_check_s=min(waits, default=None),
            problems={i: s.problem for i, s in of_model.items() if s.problem is not None},
        )
