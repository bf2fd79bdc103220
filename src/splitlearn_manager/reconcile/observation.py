"""What a running node tells the command line, so that a plan can be made beside it.

An `Observation` is all that planning needs to know of the node: what runs, what is remembered, what was
asked for when. It travels as JSON; the times are seconds of the machine's monotonic clock, which all
processes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredModel, DesiredState, SourceRef
from splitlearn_manager.reconcile.actions import Observed


@dataclass(frozen=True)
class Observation:
    """A node at one moment.

    Attributes:
        demands: for each declared model, its spec's hash and when it was last asked for.
        sizes_mb: for each declared model whose size was measured, its spec's hash and MB.
        base_dirs: for each instance, the directory that its relative paths start from.
        sources: for each declared model, the file that declares it.
    """

    observed: Observed
    demands: Mapping[str, tuple[str, float]]
    sizes_mb: Mapping[str, tuple[str, float]]
    base_dirs: Mapping[str, str | None]
    sources: Mapping[str, str]

    def demanded_s(self, model_id: str, spec_hash: str, otherwise: float) -> float:
        """When the node was asked for that very spec; `otherwise` if it does not know it."""
        known, demanded_s = self.demands.get(model_id, ("", 0.0))
        return demanded_s if known == spec_hash else otherwise

    def size_mb(self, model_id: str, spec_hash: str) -> float | None:
        """What the node reserves for that very spec; None if it does not know it."""
        known, mb = self.sizes_mb.get(model_id, ("", 0.0))
        return mb if known == spec_hash else None


def with_held(desired: DesiredState, node: Observation) -> DesiredState:
    """Desired state with what the node holds on to, because the file that declared it is broken now.

    Two looks see no more than that the file is broken; what it last said is known to the node, as the
    spec that it serves.
    """
    broken = {problem.file for problem in desired.problems}
    held: dict[str, DesiredModel] = {}
    for view in node.observed.snapshot.instances:
        model_id, spec = view.model_id, view.spec
        file = node.sources.get(model_id, "")
        doubt = model_id in desired.conflicts or file in broken or desired.source_message
        if view.owner is not Owner.DIRECTORY or model_id in desired.models or not doubt:
            continue
        if view.state is State.READY:
            held[model_id] = DesiredModel(
                config=spec.config,
                generation=spec.generation,
                spec_hash=spec.spec_hash,
                load_hash=spec.load_hash,
                source=SourceRef(file, 1),
                held="its file is broken",
                weights=spec.weights,
            )
    return replace(desired, models=dict(sorted({**desired.models, **held}.items())))


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
    config = view.spec.config.with_base_dir(base_dir)
    return replace(view, spec=replace(view.spec, config=config))
