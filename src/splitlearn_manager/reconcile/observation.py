"""What a running node tells the command line, so that a plan can be made beside it.

An `Observation` is all that planning needs to know of the node: what runs, what is remembered, what was
accepted when, what requests wait for. It travels as JSON; the times are seconds of the machine's monotonic
clock, which all processes share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from splitlearn_manager.core.measurement import Measurement, of_version
from splitlearn_manager.core.model_reader import over_own_limit
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.reconcile.actions import Observed, Wanted
from splitlearn_manager.reconcile.record import ModelRecord, models_from_text, models_to_text


@dataclass(frozen=True)
class Observation:
    """A node at one moment.

    Attributes:
        accepted_s: for each declared model, its spec's hash and when its file was accepted.
        sizes_mb: for each declared model whose files are there, its spec's hash and MB.
        measured: for each declared model that was loaded, what its loads measured.
        base_dirs: for each instance, the directory that its relative paths start from, as text in JSON:
            a path need not be Unicode.
        kept: what the node has accepted, as the text of its record.
    """

    observed: Observed
    accepted_s: Mapping[str, tuple[str, float]]
    sizes_mb: Mapping[str, tuple[str, float]]
    measured: Mapping[str, tuple[Measurement, ...]]
    base_dirs: Mapping[str, str]
    kept: str

    @classmethod
    def of(
        cls,
        observed: Observed,
        wanted: Mapping[str, Wanted],
        measured: Mapping[str, tuple[Measurement, ...]],
        kept: Mapping[str, ModelRecord],
    ) -> Observation:
        """What the node knows.

        Args:
            measured: what loads of a model's versions measured, by id.
        """
        return cls(
            observed=observed,
            accepted_s={m: (w.spec.spec_hash, w.accepted_s) for m, w in wanted.items()},
            sizes_mb={m: (w.spec.spec_hash, w.mb) for m, w in wanted.items() if w.weights_ready},
            measured={model_id: found for model_id, found in measured.items() if found},
            base_dirs={
                v.key: json.dumps(str(base))
                for v in observed.snapshot.instances
                if (base := v.spec.config.base_dir) is not None
            },
            kept=models_to_text(
                {m: replace(r, history=(), measured=()) for m, r in kept.items()}
            ).decode(),
        )

    def accepted(self) -> list[DesiredModel]:
        """What the node has accepted, to be taken over by a source of one's own."""
        return [kept.accepted for kept in self._records().values()]

    def suspended(self) -> list[str]:
        """The ids that people asked the node to leave as they are."""
        return [model_id for model_id, kept in self._records().items() if kept.suspended]

    def as_known(self, wanted: Wanted) -> Wanted:
        """A wanted model with what the node knows of that very spec, or of its size."""
        model_id, spec_hash = wanted.spec.model_id, wanted.spec.spec_hash
        accepted, accepted_s = self.accepted_s.get(model_id, ("", 0.0))
        known, mb = self.sizes_mb.get(model_id, ("", 0.0))
        config = wanted.spec.config
        measured = of_version(self.measured.get(model_id, ()), wanted.spec.version)
        if known != spec_hash:
            # Keys that are applied in place make another spec, and no other model.
            mb = measured.total_mb(config.batch_size) if measured is not None else wanted.mb
        return replace(
            wanted,
            mb=mb,
            measured=measured,
            accepted_s=accepted_s if accepted == spec_hash else wanted.accepted_s,
            own_limit_problem=over_own_limit(config, mb, measured),
        )

    def _records(self) -> Mapping[str, ModelRecord]:
        return models_from_text(self.kept.encode())[0]


_JSON = TypeAdapter(Observation)


def to_json(observation: Observation) -> bytes:
    """The observation as one line of JSON."""
    return _JSON.dump_json(observation)


def from_json(data: bytes) -> Observation:
    """The observation that `to_json` wrote. Raises ValueError if it is none."""
    observation = _JSON.validate_json(data)
    snapshot = observation.observed.snapshot
    views = tuple(_rooted(v, observation.base_dirs.get(v.key)) for v in snapshot.instances)
    return replace(
        observation,
        observed=replace(
            observation.observed,
            snapshot=Snapshot(views, snapshot.ledger, snapshot.outcomes),
        ),
    )


def _rooted(view: InstanceView, base_dir: str | None) -> InstanceView:
    config = view.spec.config.with_base_dir(None if base_dir is None else str(json.loads(base_dir)))
    return replace(view, spec=replace(view.spec, config=config))
