"""What a node must not forget when its process ends: pure data, and how it is written as text.

For each model that the directory has declared: the spec that was accepted last, with its generation
and where it came from; what was served, where that is another version; whether people suspended it; the
history of what was accepted; and what loads of it measured, so that the next one reserves that. Failures
and evictions are not in it: a new process finds out anew what can be loaded.

The text is JSON with one model a line, made for people who look into it as well. A spec is written as
the keys of its file with their validated values; its hashes are computed anew when it is read. Nothing
here touches a disk; that is `store`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.desired.state import DesiredModel, SourceRef
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.reconcile import measured_text
from splitlearn_manager.reconcile.backoff import Attempt

VERSION = 1
HISTORY_KEPT = 20

_MARKS = ("guarded", "uncounted", "contested", "unclaimed")
"""Of a `DesiredModel`: what the files said about it last, which a new process must go on from."""
ROLLOUTS_TAKEN_BACK = ("RolloutFailed", "RolloutAborted")
READY = "Ready"
"""Outcome of a version that has served."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A version that was accepted.

    Attributes:
        at: unix time in seconds.
        what: what it changed, for people.
        source: the declaration that it came from, as `FILE:LINE`.
        outcome: `Ready`, or the reason why its latest load failed; empty while neither has happened.
    """

    generation: int
    at: float
    what: str
    source: str
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What is kept of one model.

    Attributes:
        accepted: the spec that was accepted last. Its times and its doubts are of the process that
            accepted it, and not kept.
        served: the version that was READY last, where that is not the accepted one.
        suspended: people asked that it stays as it is.
        history: the last `HISTORY_KEPT` versions that were accepted, oldest first.
        measured: what loads of its versions measured, the latest load last.
    """

    accepted: DesiredModel
    served: ModelSpec | None = None
    suspended: bool = False
    history: tuple[HistoryEntry, ...] = ()
    measured: tuple[Measurement, ...] = ()

    @property
    def ended_rollout(self) -> Attempt | None:
        """The rollout of the accepted version, if it was taken back: a new process begins it no more."""
        outcome = self.history[-1].outcome if self.history else ""
        accepted = self.accepted
        if outcome not in ROLLOUTS_TAKEN_BACK or accepted.weights is None:
            return None
        return Attempt(
            ModelSpec(
                accepted.config,
                accepted.spec_hash,
                accepted.load_hash,
                accepted.weights,
                accepted.generation,
            ),
            failures=1,
            retry_at_s=None,
            reason=outcome,
            message=(
                f"generation {accepted.generation}{self._new_weights} was taken back while it was tried, "
                "before the node was started anew"
            ),
        )

    @property
    def _new_weights(self) -> str:
        """That the accepted version is other weights alone: then what served is there no more."""
        before = self.history[-2].generation if len(self.history) > 1 else None
        if self.served is not None or before != self.accepted.generation:
            return ""
        return " with new weights, which took the place of those that served,"

    @property
    def to_go_back_to(self) -> ModelSpec | None:
        """The version that served last, as far as is known: the accepted one unless its loads failed.

        A new process goes back to it if a version that was accepted meanwhile cannot be loaded.
        """
        accepted = self.accepted
        failed = bool(self.history) and self.history[-1].outcome not in ("", READY)
        if self.served is not None or failed or accepted.weights is None:
            return self.served
        return ModelSpec(
            accepted.config,
            accepted.spec_hash,
            accepted.load_hash,
            accepted.weights,
            accepted.generation,
        )


@dataclass(frozen=True)
class Record:
    """What is kept of a node.

    Attributes:
        models: by model id.
        confirmed_prune: the digest of the prune guard that somebody confirmed; empty if nobody did.
    """

    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    confirmed_prune: str = ""


class Unreadable(ValueError):
    """A text is no record; the message says why."""


class OtherVersion(Exception):
    """A text was written by a newer version of this program, which alone knows what it means."""


def same_accepted(one: DesiredModel, other: DesiredModel) -> bool:
    """Whether both would be written alike."""
    return one is other or (
        one.spec_hash == other.spec_hash
        and one.generation == other.generation
        and one.source == other.source
        and one.weights == other.weights
        and one.guarded == other.guarded
        and one.uncounted == other.uncounted
        and one.contested == other.contested
        and one.unclaimed == other.unclaimed
        and one.claimed_by == other.claimed_by
        and one.config.base_dir == other.config.base_dir
        and one.config.model_path == other.config.model_path
        and one.mark == other.mark
    )


def same_record(one: ModelRecord, other: ModelRecord) -> bool:
    """Whether both would be written alike."""
    return one is other or (
        same_accepted(one.accepted, other.accepted)
        and one.served == other.served
        and one.suspended is other.suspended
        and one.history == other.history
        and one.measured == other.measured
    )


# Models, as the text of one file of the store.


def models_to_text(models: Mapping[str, ModelRecord]) -> bytes:
    """Some models as JSON, one a line, sorted by id."""
    lines = ",\n".join(
        f"{json.dumps(model_id)}: {json.dumps(_model_to_data(models[model_id]), ensure_ascii=False)}"
        for model_id in sorted(models)
    )
    return _as_bytes(f'{{"version": {VERSION}, "models": {{\n{lines}\n}}}}\n')


def models_from_text(data: bytes) -> tuple[dict[str, ModelRecord], tuple[str, ...]]:
    """What `models_to_text` wrote, and for each model that cannot be read why not.

    Raises:
        Unreadable: nothing can be made of it.
        OtherVersion: it was written by a newer version.
    """
    found = _parse(data).get("models")
    if not isinstance(found, dict):
        raise Unreadable("it has no `models`")
    models: dict[str, ModelRecord] = {}
    complaints: list[str] = []
    for model_id, value in found.items():
        try:
            record = _model_from_data(value)
        except ConfigError as error:
            complaints.append(f"model {model_id!r}: {error.message}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            complaints.append(f"model {model_id!r}: {type(error).__name__}: {error}")
        else:
            if record.accepted.config.model_id == model_id:
                models[model_id] = record
            else:
                complaints.append(f"model {model_id!r}: its spec is that of another model")
    return models, tuple(complaints)


# The rest, as the text of a file of its own.


@dataclass(frozen=True)
class NodeRecord:
    """What is kept beside the models.

    Attributes:
        directory: whose models they are.
        leaving: ids that are about to be removed from the files of the models, all of them or none.
    """

    directory: str = ""
    confirmed_prune: str = ""
    leaving: tuple[str, ...] = ()


def node_to_text(node: NodeRecord) -> bytes:
    """It as JSON."""
    data = {
        "version": VERSION,
        "directory": node.directory,
        "confirmed_prune": node.confirmed_prune,
        "leaving": list(node.leaving),
    }
    return _as_bytes(json.dumps(data, ensure_ascii=False) + "\n")


def node_from_text(data: bytes) -> NodeRecord:
    """What `node_to_text` wrote. Raises as `models_from_text`."""
    found = _parse(data)
    directory = found.get("directory", "")
    confirmed, leaving = found.get("confirmed_prune", ""), found.get("leaving", [])
    if not (
        isinstance(directory, str) and isinstance(confirmed, str) and isinstance(leaving, list)
    ):
        raise Unreadable("its keys have values of another kind")
    return NodeRecord(directory, confirmed, tuple(str(model_id) for model_id in leaving))


def _as_bytes(text: str) -> bytes:
    """JSON as UTF-8. Of a path that is not, a byte stands for itself as a lone surrogate, which UTF-8 has
    no form for; what takes its place is the escape that JSON has, and is read as the same path."""
    return text.encode("utf-8", "backslashreplace")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(version := found.get("version"), int):
        raise Unreadable("it has no `version`")
    if version > VERSION:
        raise OtherVersion(f"{version}")
    return found


def _model_to_data(record: ModelRecord) -> dict[str, object]:
    accepted = record.accepted
    data: dict[str, object] = {
        "generation": accepted.generation,
        "source": _ref_to_data(accepted.source),
        **_spec_to_data(accepted.config, accepted.weights),
    }
    if accepted.mark:
        data["mark"] = accepted.mark
    for mark in _MARKS:
        if getattr(accepted, mark):
            data[mark] = True
    if accepted.claimed_by:
        data["claimed_by"] = [_ref_to_data(ref) for ref in accepted.claimed_by]
    if record.suspended:
        data["suspended"] = True
    if (served := record.served) is not None:
        data["served"] = {
            "generation": served.generation,
            **_spec_to_data(served.config, served.weights),
        }
    data["history"] = [
        {
            "generation": h.generation,
            "at": h.at,
            "what": h.what,
            "from": h.source,
            "outcome": h.outcome,
        }
        for h in record.history
    ]
    if record.measured:
        data["measured"] = measured_text.to_data(record.measured)
    return data


def _model_from_data(data: Mapping[str, Any]) -> ModelRecord:
    config, weights = _spec_from_data(data)
    accepted = DesiredModel(
        config=config,
        generation=int(data["generation"]),
        spec_hash=config.spec_hash(),
        load_hash=config.load_hash(),
        source=_ref_from_data(data["source"]),
        weights=weights,
        guarded=bool(data.get("guarded", False)),
        uncounted=bool(data.get("uncounted", False)),
        contested=bool(data.get("contested", False)),
        unclaimed=bool(data.get("unclaimed", False)),
        claimed_by=tuple(_ref_from_data(ref) for ref in data.get("claimed_by", ())),
        mark=str(data.get("mark", "")),
    )
    served = None
    if (old := data.get("served")) is not None:
        config, weights = _spec_from_data(old)
        served = ModelSpec.of(config, weights=weights or "", generation=int(old["generation"]))
    return ModelRecord(
        accepted=accepted,
        served=served,
        suspended=bool(data.get("suspended", False)),
        history=tuple(
            HistoryEntry(
                generation=int(h["generation"]),
                at=float(h["at"]),
                what=str(h["what"]),
                source=str(h["from"]),
                outcome=str(h["outcome"]),
            )
            for h in data.get("history", ())
        ),
        measured=measured_text.from_data(data.get("measured")),
    )


def _spec_to_data(config: ModelConfig, weights: str | None) -> dict[str, object]:
    return {
        "base_dir": str(config.base_dir) if config.base_dir is not None else None,
        "weights": weights,
        "config": config.model_dump(mode="json", exclude_defaults=True),
    }


def _spec_from_data(data: Mapping[str, Any]) -> tuple[ModelConfig, str | None]:
    base_dir, weights = data["base_dir"], data["weights"]
    config = ModelConfig.model_validate(data["config"])
    return (
        config.with_base_dir(Path(base_dir) if base_dir is not None else None),
        str(weights) if weights is not None else None,
    )


def _ref_to_data(ref: SourceRef) -> list[object]:
    return [ref.file, ref.line]


def _ref_from_data(data: Any) -> SourceRef:
    file, line = data
    return SourceRef(str(file), int(line))
