"""I10: what the node must know of sizes: a version that has been loaded reserves what its loads measured.

The simulation measures on its own: each load that reads the same files from its beginning to its end gives
a figure. Once the node has said that such a load is done, and taken its turn, the next load of the version
reserves one of those figures, in the next process too if the state files could be written.
"""

from __future__ import annotations

from typing import Any

from splitlearn_manager.core.measurement import KEPT
from splitlearn_manager.runtime.base import Activations

Version = tuple[str, str]


class Sizes:
    """See the module's text. One for an episode."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[Version, list[tuple[float, Activations | None]]]] = {}
        self._known: set[tuple[str, Version]] = set()
        self._told: set[tuple[str, Version]] = set()
        self._kept: set[tuple[str, Version]] = set()

    def measured(
        self, model_id: str, version: Version, weights_mb: float, activations: Activations | None
    ) -> None:
        """A load has read that version, whatever becomes of it."""
        versions = self._seen.setdefault(model_id, {})
        versions.setdefault(version, []).append((weights_mb, activations))
        versions[version] = versions.pop(version)  # the newest is the last

    def loaded(self, instance: Any) -> None:
        """The node says that it has loaded a model of the directory."""
        self._known.add((instance.model_id, instance.spec.version))

    def turned(self, *, keeps_state: bool) -> None:
        """A turn has ended, in which the node learned of what was loaded before it."""
        if keeps_state:
            self._kept |= self._told
        self._told = set(self._known)

    def forget(self, model_id: str) -> None:
        """The model is desired no more."""
        for book in (self._known, self._told, self._kept):
            book.difference_update({found for found in book if found[0] == model_id})

    def new_process(self, *, state_is_known: bool) -> None:
        self._kept = self._kept if state_is_known else set()
        self._known = set(self._kept)
        self._told = set(self._kept)

    def why_not(self, instance: Any, reserved_mb: float) -> str | None:
        """Why a load may not reserve that much; None if it may."""
        model_id, version = instance.model_id, instance.spec.version
        versions = self._seen.get(model_id, {})
        newest = list(versions)[-KEPT:]
        if (model_id, version) not in self._known or version not in newest:
            return None
        batch_size = instance.config.batch_size
        fit = {
            weights_mb + (activations.mb(batch_size) if activations is not None else 0.0)
            for weights_mb, activations in versions[version]
        }
        if reserved_mb in fit:
            return None
        return f"{instance.key} reserves {reserved_mb:g} MB, and its loads measured {sorted(fit)}"
