"""Keeps the record of a node: what was accepted, served, suspended, how it went, and what it took.

The loop tells it what it found, before it acts on it; so whatever a crash interrupts, the next start
knows at least as much as the loop knew when it began. What cannot be written stays to be written, is said
once, and stops nothing. It decides nothing about models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from splitlearn_manager.core.clock import Clock
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.snapshot import Snapshot
from splitlearn_manager.desired.state import DesiredModel, DesiredState
from splitlearn_manager.logs import log_event
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.record import (
    HISTORY_KEPT,
    READY,
    HistoryEntry,
    ModelRecord,
    Record,
)
from splitlearn_manager.reconcile.store import Store
from splitlearn_manager.reconcile.updating import describe_changes

log = logging.getLogger(__name__)

_RETRY_S = 1.0
FIRST = "declared"


class Keeper:
    """See the module's text. Used by the loop's thread; `history` and `models` by any.

    Args:
        store: None keeps the history in memory and nothing over a restart.

    Attributes:
        models: the records, by model id; replaced whole.
        problem: why something cannot be kept; empty if all is.
    """

    def __init__(self, store: Store | None, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._confirmed = ""
        self._dirty = False
        self._retry_at_s: float | None = None
        self._failure = ""
        self.models: Mapping[str, ModelRecord] = {}

    def load(self) -> Record:
        """What an earlier process kept; what of it cannot be read is logged, and done without."""
        if self._store is None:
            return Record()
        record, complaints = self._store.load()
        for complaint in complaints:
            log_event(log, logging.WARNING, "StateNotRead", complaint)
        now = self._clock.now()
        self.models = {
            model_id: replace(kept, accepted=replace(kept.accepted, accepted_at=now, seen_at=now))
            for model_id, kept in record.models.items()
        }
        self._confirmed = record.confirmed_prune
        self._dirty = bool(complaints)
        return Record(self.models, record.confirmed_prune)

    @property
    def problem(self) -> str:
        if self._failure:
            return self._failure
        if self._store is not None and self._store.left_alone:
            names = ", ".join(sorted(self._store.left_alone))
            return (
                f"{names}: written by a newer version of this program, and left alone; serving goes on; the "
                "models in it are not kept over a restart; start that version, or delete the file"
            )
        return ""

    @property
    def due_s(self) -> float | None:
        """When `save` is to be called again because something could not be written."""
        return self._retry_at_s

    def history(self, model_id: str) -> tuple[HistoryEntry, ...]:
        """The versions of the model that were accepted, oldest first."""
        kept = self.models.get(model_id)
        return kept.history if kept is not None else ()

    def take(
        self,
        desired: DesiredState,
        suspended: frozenset[str],
        served: Mapping[str, ModelSpec],
    ) -> None:
        """Takes note of what is accepted, suspended and served."""
        before = self.models
        models = {
            model_id: self._renewed(
                before.get(model_id), model, served.get(model_id), model_id in suspended
            )
            for part in (desired.models, desired.undecided)
            for model_id, model in part.items()
        }
        changed = len(models) != len(before) or any(
            before.get(model_id) is not kept for model_id, kept in models.items()
        )
        if changed:
            self.models = models
            self._dirty = True

    def confirm(self, digest: str) -> None:
        """Takes note of the prune that somebody confirmed; empty if it is done or nobody did."""
        if digest != self._confirmed:
            self._confirmed = digest
            self._dirty = True

    def take_outcomes(self, snapshot: Snapshot, attempts: Mapping[str, Attempt]) -> None:
        """Takes note of which accepted versions serve, and which failed."""
        outcomes = {
            view.model_id: (READY, view.spec)
            for view in snapshot.instances
            if view.state is State.READY and view.owner is Owner.DIRECTORY
        }
        for model_id, attempt in attempts.items():
            kept = self.models.get(model_id)
            is_of = kept is not None and attempt.spec.spec_hash == kept.accepted.spec_hash
            if is_of and not attempt.superseded:
                serving = outcomes.get(model_id)
                if serving is None or serving[1].version != attempt.spec.version:
                    outcomes[model_id] = (attempt.reason, attempt.spec)
        changed: dict[str, ModelRecord] = {}
        for model_id, (outcome, spec) in outcomes.items():
            kept = self.models.get(model_id)
            if kept is None or not kept.history or kept.history[-1].outcome == outcome:
                continue
            accepted = kept.accepted
            if (spec.spec_hash, spec.weights) == (accepted.spec_hash, accepted.weights):
                last = replace(kept.history[-1], outcome=outcome)
                changed[model_id] = replace(kept, history=(*kept.history[:-1], last))
        if changed:
            self.models = {**self.models, **changed}
            self._dirty = True

    def take_measurements(self, measured: Mapping[str, Sequence[Measurement]]) -> None:
        """Takes note of what loads of models measured, of those of the directory."""
        changed = {
            model_id: replace(kept, measured=tuple(found))
            for model_id, found in measured.items()
            if (kept := self.models.get(model_id)) is not None and kept.measured != tuple(found)
        }
        if changed:
            self.models = {**self.models, **changed}
            self._dirty = True

    def save(self, *, recheck: bool) -> None:
        """Writes what is not on the disk yet; after a failure at most once a second.

        Args:
            recheck: whether to look if the files are still there.
        """
        store, now = self._store, self._clock.now()
        if store is None or (self._retry_at_s is not None and now < self._retry_at_s):
            return
        try:
            if recheck:
                store.recheck()
            if self._dirty or store.pending:
                store.save(Record(self.models, self._confirmed))
        except OSError as error:
            self._dirty = True
            self._retry_at_s = now + _RETRY_S
            self._say(
                f"{error.filename or 'the state directory'}: {error.strerror or error}; what is "
                "accepted from now on is not kept over a restart until it can be written, which is "
                "tried every second; serving goes on; free its disk, make it writable, or let state_dir "
                "name another directory"
            )
        else:
            self._dirty = False
            self._retry_at_s = None
            self._say("")

    def _say(self, failure: str) -> None:
        if failure == self._failure:
            return
        self._failure = failure
        if failure:
            log_event(log, logging.WARNING, "StateNotKept", failure)
        else:
            log_event(log, logging.INFO, "StateKept", "what is accepted is kept again")

    def _renewed(
        self,
        old: ModelRecord | None,
        model: DesiredModel,
        served: ModelSpec | None,
        suspended: bool,
    ) -> ModelRecord:
        """The record with what is known now: the very same one if it says all that."""
        other = served if served is not None and served.load_hash != model.load_hash else None
        if old is None:
            return ModelRecord(model, other, suspended, (self._entry(model, FIRST),))
        if old.accepted is model and old.served is other and old.suspended is suspended:
            return old
        accepted = model
        if model.weights is None and old.accepted.weights is not None:
            # Not known at the moment: what they were still says whether the next ones are others.
            accepted = replace(model, weights=old.accepted.weights)
        history = old.history
        if what := _difference(old.accepted, accepted):
            history = (*history, self._entry(accepted, what))[-HISTORY_KEPT:]
        return ModelRecord(accepted, other, suspended, history, old.measured)

    def _entry(self, model: DesiredModel, what: str) -> HistoryEntry:
        return HistoryEntry(model.generation, self._clock.wall(), what, str(model.source))


def _difference(old: DesiredModel, new: DesiredModel) -> str:
    """What a new version changes; empty if it is the same one."""
    if old.generation == new.generation and (old.weights is None or old.weights == new.weights):
        return ""
    weights = new.weights or ""
    return describe_changes(_spec(old, old.weights or weights), _spec(new, weights))


def _spec(model: DesiredModel, weights: str) -> ModelSpec:
    return ModelSpec(model.config, model.spec_hash, model.load_hash, weights, model.generation)
