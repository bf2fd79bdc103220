"""When the files behind `model_path` have changed for good: the same settle rule as for desired files.

A model directory may be copied for minutes, a checkpoint rewritten in place. A new fingerprint counts
when two looks at least `settle_s` apart agree on it; until then, and while the files are missing, the
last settled one stays, because the model that was loaded from it goes on serving.

Looks at the weights of models that are about to be accepted too (`upcoming`), so that spec and weights
settle side by side rather than one after the other. Never reads a weights file: its cost is that of the
injected fingerprint, a stat for each file, once for each distinct source however many models share it.

    up to 256 sources    all of them in each look
    more                 in each look those of watched ids, of upcoming configs, and whatever has not
                         settled; the others take turns, so that a look costs no more the more there are
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.errors import SplitlearnError

SOURCES_A_LOOK = 256
LEAST_IN_TURN = 16
"""So many take their turn in any case, however many have to be looked at."""

WeightsFingerprint = Callable[[ModelConfig], str]
"""What the files behind a config look like. Raises SplitlearnError (WeightsNotFound) if there are none."""

WeightsKey = tuple[str, str, str | None, Path | None, Path | None]


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
    return (
        config.model_path,
        config.model_type,
        config.config.factory,
        config.golden_path,
        config.base_dir,
    )


class _Source:
    """The files of one key."""

    __slots__ = ("config", "key", "problem", "settled", "settling", "was_seen")

    def __init__(self, key: WeightsKey, config: ModelConfig) -> None:
        self.key = key
        self.config = config
        self.settling: Settling[str] = Settling()
        self.settled: str | None = None
        self.problem: str | None = None
        self.was_seen = False

    def look(self, now: float, settle_s: float, ask: WeightsFingerprint) -> bool:
        """Whether something is known that was not before."""
        before = self.settled, self.problem
        self.was_seen = True
        try:
            self.settling.look(ask(self.config), now)
        except SplitlearnError as error:
            self.problem = error.message
            self.settling.forget()
        else:
            self.problem = None
            if self.settling.settled(now, settle_s):
                self.settled = self.settling.value
        return before != (self.settled, self.problem)

    @property
    def is_pending(self) -> bool:
        """Another look may settle it."""
        return self.settling.known and self.settling.value != self.settled


class WeightsWatch:
    """Follows the weights of all accepted and upcoming models.

    Args:
        settle_s: seconds that two agreeing looks must be apart; may be changed between two looks.
    """

    def __init__(self, settle_s: float) -> None:
        self.settle_s = settle_s
        self._models: Mapping[str, ModelConfig] = {}
        self._upcoming: tuple[ModelConfig, ...] = ()
        self._by_key: dict[WeightsKey, _Source] = {}
        self._of_model: dict[str, _Source] = {}
        self._of_upcoming: list[_Source] = []
        self._sources: list[_Source] = []  # in the order in which they take turns
        self._turn = 0
        self._unsettled: dict[_Source, None] = {}  # new ones, and those that are pending
        self._state = WeightsState({}, None, {})

    @property
    def keys(self) -> KeysView[WeightsKey]:
        """All that the last look followed; each was looked at once at least."""
        return self._by_key.keys()

    def observe(
        self,
        models: Mapping[str, ModelConfig],
        now: float,
        fingerprint: WeightsFingerprint,
        upcoming: tuple[ModelConfig, ...] = (),
        watched: Iterable[str] = (),
    ) -> WeightsState:
        """Look at the weights once.

        Args:
            models: the accepted configs by id; the same object as last time if they are the same.
            now: monotonic seconds.
            fingerprint: called once for each distinct source that is looked at.
            upcoming: configs that may be accepted soon.
            watched: ids whose weights are looked at in any case.

        Returns:
            What is known; the same object as last time if that is the same.
        """
        changed = models is not self._models or upcoming != self._upcoming
        if changed:
            self._follow(models, upcoming)
        for source in self._due(watched):
            changed = source.look(now, self.settle_s, fingerprint) or changed
            if source.is_pending:
                self._unsettled[source] = None
            else:
                self._unsettled.pop(source, None)
        waits = [s.settling.remaining_s(now, self.settle_s) for s in self._unsettled]
        wait_s = min(waits, default=None)
        if changed:
            self._state = self._tell(wait_s)
        elif wait_s != self._state.next_check_s:
            self._state = replace(self._state, next_check_s=wait_s)
        return self._state

    def _follow(self, models: Mapping[str, ModelConfig], upcoming: tuple[ModelConfig, ...]) -> None:
        """Keep the sources of these configs and no others."""
        configs, sources = self._models, self._of_model
        self._of_model = {
            i: sources[i] if configs.get(i) is config else self._source(config)
            for i, config in models.items()
        }
        self._of_upcoming = [self._source(config) for config in upcoming]
        self._models, self._upcoming = models, upcoming
        self._sources = list(dict.fromkeys((*self._of_model.values(), *self._of_upcoming)))
        if len(self._sources) != len(self._by_key):
            self._by_key = {source.key: source for source in self._sources}
        self._unsettled = {s: None for s in self._sources if s.is_pending or not s.was_seen}

    def _source(self, config: ModelConfig) -> _Source:
        key = weights_key(config)
        source = self._by_key.get(key)
        if source is None:
            source = self._by_key[key] = _Source(key, config)
        return source

    def _due(self, watched: Iterable[str]) -> Iterable[_Source]:
        """The sources to look at in this look."""
        sources = self._sources
        if len(sources) <= SOURCES_A_LOOK:
            return sources
        due = dict.fromkeys((*self._unsettled, *self._of_upcoming))
        due.update((self._of_model[i], None) for i in sorted(watched) if i in self._of_model)
        left = max(SOURCES_A_LOOK - len(due), LEAST_IN_TURN)
        for _ in range(len(sources)):
            if left == 0:
                break
            source = sources[self._turn % len(sources)]
            self._turn = (self._turn + 1) % len(sources)
            if source not in due:
                due[source] = None
                left -= 1
        return due

    def _tell(self, wait_s: float | None) -> WeightsState:
        of_model = self._of_model.items()
        return WeightsState(
            by_id={i: s.settled for i, s in of_model if s.settled is not None},
            next_check_s=wait_s,
            problems={i: s.problem for i, s in of_model if s.problem is not None},
        )
