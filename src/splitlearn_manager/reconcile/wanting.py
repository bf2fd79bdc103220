"""From accepted models to what planning needs to know of them, such as sizes and devices.

What is known of a model is kept until something it depends on is another, so a turn in which one of
thousands changed looks at one. It asks the manager; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.core.model_reader import over_own_limit
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.errors import SplitlearnError
from splitlearn_manager.reconcile.actions import Wanted


class Wishes:
    """See the module's text. Used by the loop's thread."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._sources: Mapping[str, DesiredModel] = {}
        self._wanted: Mapping[str, Wanted] = {}
        self._unmeasured: set[str] = set()  # asked again each time, because asking failed
        self._fallbacks: dict[str, Wanted] = {}

    def of(
        self,
        models: Mapping[str, DesiredModel],
        changed: Collection[str] = (),
    ) -> Mapping[str, Wanted]:
        """All that is wanted; the very same mapping if nothing is another.

        Args:
            changed: ids whose size may be another although their spec is not.
        """
        devices: dict[str, tuple[str, ...]] = {}
        again = self._unmeasured.union(changed)
        wanted: dict[str, Wanted] = {}
        same = len(models) == len(self._wanted)
        for model_id, model in models.items():
            known = self._wanted.get(model_id)
            place = model.config.device
            if place not in devices:
                devices[place] = self._manager.devices_for(model.config)
            if known is not None and self._sources.get(model_id) is model and model_id not in again:
                now = known
                if known.devices != devices[place]:
                    now = replace(known, devices=devices[place])
            else:
                now = self._make(model, devices[place])
                if now == known:
                    now = known
            same = same and now is known
            wanted[model_id] = now
        self._sources = models
        self._unmeasured.intersection_update(models)
        if not same:
            self._wanted = wanted
        return self._wanted

    @property
    def asks_again(self) -> bool:
        """Whether something could not be found out, though the files were there a moment before."""
        return bool(self._unmeasured)

    def fallbacks(
        self, served: Mapping[str, ModelSpec], wanted: Mapping[str, Wanted]
    ) -> dict[str, Wanted]:
        """What each model can go back to: the version that served last, where that is another one.

        Other weights at the same place are no such version: what was there is not any more.
        """
        found: dict[str, Wanted] = {}
        for model_id, spec in served.items():
            now = wanted.get(model_id)
            if now is None or now.spec.load_hash == spec.load_hash or _is_away(spec, now):
                continue
            known = self._fallbacks.get(model_id)
            if known is None or known.spec is not spec:
                known = self._fallback(spec, now)
            if known is not None:
                found[model_id] = known
        self._fallbacks = found
        return found

    def _make(self, model: DesiredModel, devices: tuple[str, ...]) -> Wanted:
        config = model.config
        spec = ModelSpec(
            config, model.spec_hash, model.load_hash, model.weights or "", model.generation
        )
        problem = model.weights_problem or ""
        mb, ready = 0.0, model.weights is not None
        self._unmeasured.discard(config.model_id)
        if ready:
            try:
                mb = self._manager.size_mb(spec)
            except SplitlearnError as error:
                ready, problem = False, error.message
                self._unmeasured.add(config.model_id)
        measured = self._manager.measured(spec) if ready else None
        return Wanted(
            spec=spec,
            mb=mb,
            devices=devices,
            accepted_s=model.accepted_at,
            weights_ready=ready,
            weights_problem=problem,
            own_limit_problem=over_own_limit(config, mb, measured),
            source=model.source.file,
            suspended=model.suspended,
            measured=measured,
        )

    def _fallback(self, spec: ModelSpec, wanted: Wanted) -> Wanted | None:
        config: ModelConfig = spec.config
        try:
            mb = self._manager.size_mb(spec)
        except SplitlearnError:
            return None  # its files are not there at the moment
        return Wanted(
            spec=spec,
            mb=mb,
            devices=self._manager.devices_for(config),
            accepted_s=wanted.accepted_s,
            source=wanted.source,
            measured=self._manager.measured(spec),
        )


def _is_away(spec: ModelSpec, wanted: Wanted) -> bool:
    """Whether there is nothing, at the moment, where both versions are loaded from."""
    one, other = spec.config, wanted.spec.config
    same_place = (one.base_dir, one.model_path) == (other.base_dir, other.model_path)
    return same_place and bool(wanted.weights_problem)
