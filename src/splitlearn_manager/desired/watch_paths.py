"""Which paths beside the desired directory a wake-up is wanted for. Decides, watches nothing.

Links inside the directory lead outside it, and so do the weights. Where they are was found out when they
were looked at, so that asking for the paths costs no look of its own. Not all can be watched when there are
thousands: what the loop watches (running models) comes first, then links, then the others. A change of
the rest is found by the looks, a little later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from itertools import chain
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.desired.weights import WeightsKey, weights_key

MOST_PATHS = 256


class WatchPaths:
    """Told of each look what it met; asked between looks."""

    def __init__(self) -> None:
        self._links: tuple[str, ...] = ()
        self._configs: Mapping[str, ModelConfig] = {}
        self._watched: frozenset[str] = frozenset()
        self._found: dict[WeightsKey, tuple[str, ...]] = {}
        self._paths: tuple[str, ...] | None = None

    def follow(
        self,
        links: tuple[str, ...],
        configs: Mapping[str, ModelConfig],
        watched: frozenset[str],
        keys: Set[WeightsKey],
    ) -> None:
        """What a look met: links relative to the root, accepted configs, watched ids, all weights.

        Args:
            keys: of the weights; each of them was told of by `found`, in this look or before.
        """
        if len(self._found) > len(keys):
            self._found = {key: paths for key, paths in self._found.items() if key in keys}
            self._paths = None
        if (links, watched) != (self._links, self._watched) or configs is not self._configs:
            self._paths = None
        self._links, self._watched, self._configs = links, watched, configs

    def found(self, config: ModelConfig, places: Iterable[Path | None]) -> None:
        """Where the weights of a config are, or would be."""
        key = weights_key(config)
        paths = tuple(os.path.abspath(place) for place in places if place is not None)
        if self._found.get(key) != paths:
            self._found[key] = paths
            self._paths = None

    def absolute(self, root: Path) -> tuple[str, ...]:
        """The paths, sorted."""
        if self._paths is None:
            links = (os.path.join(root, link) for link in self._links)
            some = chain(
                _first(chain.from_iterable(self._of_watched()), MOST_PATHS // 2),
                _first(links, MOST_PATHS // 2),
                chain.from_iterable(self._found.values()),
            )
            self._paths = tuple(sorted(_first(some, MOST_PATHS)))
        return self._paths

    def _of_watched(self) -> Iterable[tuple[str, ...]]:
        for model_id in sorted(self._watched):
            if (config := self._configs.get(model_id)) is not None:
                yield self._found.get(weights_key(config), ())


def _first(paths: Iterable[str], most: int) -> Iterable[str]:
    """The first that are different from one another."""
    different: dict[str, None] = {}
    for path in paths:
        if len(different) == most:
            break
        different[path] = None
    return different
