"""Which desired state the scans of a directory prove: the decisions, without files, clock or threads.

`Acceptance.observe` takes one scan and returns the desired state so far. For each model id it asks who
claims it (`claims`), and for those that nobody claims whether they may go (`absence`):

    one settled, valid declaration    accepted; a new generation if the spec's hash is new
    in doubt, in conflict, suspended  held: same generation, same config, whatever the files say
    absent, proven by all files       pruned, together with all that went at the same time
    absent, and too many at once      held until somebody confirms it

For an id that was never accepted, held means that it is not accepted yet. Absence is proven when two
complete scans of the same directory, at least `settle_s` apart, saw the same files and the same ids
missing, and none of the files declares such an id or could mean to.

Only ids whose claims may have changed, and those that are not plainly accepted, are judged anew; when
a scan says the same as the last one and nothing is pending, the answer is the very same object.

What an earlier process had accepted (`restore`) is held like anything else, but only named as
`undecided` until the files have been looked at: a model that no file declares is not loaded first.

Never reads a file that has not settled for anything but a hint, never drops an id because of something
that could not be looked at, and never depends on the order in which files are listed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.absence import Absence
from splitlearn_manager.desired.claims import Verdict, judge
from splitlearn_manager.desired.reading import ModelParser
from splitlearn_manager.desired.scanner import Scan, printable
from splitlearn_manager.desired.server_file import ServerFile
from splitlearn_manager.desired.state import (
    NO_INSTRUCTIONS,
    DesiredModel,
    DesiredState,
    Instructions,
    PruneGuard,
    SourceRef,
)
from splitlearn_manager.desired.tracked_file import Declaration, Read, Stat
from splitlearn_manager.desired.tracking import Progress, Tracking

UNDECIDED_SETTLES = 20
UNDECIDED_SCANS = 4
"""A restored model that is still in doubt after so many settle times and scans is desired: whatever
keeps changing in the directory must not keep it from serving."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What one scan is judged by: two that are equal, with nothing pending, have one answer."""

    scan: Scan
    suspended: frozenset[str]
    confirmed_prune: str
    settle_s: float
    prune_guard_percent: float

    @property
    def outage(self) -> str | None:
        """Why nothing at all is known of the directory; None when something is."""
        return self.scan.error if self.scan.root is None else None


class Acceptance:
    """Remembers what was seen and accepted; give it every scan, in order.

    Args:
        settle_s: seconds that two agreeing looks must be apart; may be changed between two scans.
        root: the desired directory, which relative paths inside the files are resolved against;
            None for the current working directory.
        prune_guard_percent: see `Absence`; may be changed between two scans.
        on_progress: see `Tracking`.
    """

    def __init__(
        self,
        settle_s: float,
        root: Path | None = None,
        prune_guard_percent: float = 50.0,
        on_progress: Progress | None = None,
    ) -> None:
        self.settle_s = settle_s
        self._root = root
        self._parser = ModelParser(root)
        self._tracking = Tracking(self._parser, on_progress)
        self._server = ServerFile()
        self._absence = Absence(prune_guard_percent)
        self._accepted: Mapping[str, DesiredModel] = {}  # sorted, and never changed in place
        self._generations: dict[str, int] = {}
        self._open: dict[str, Verdict] = {}  # on the ids that are not plainly accepted
        self._undecided: frozenset[str] = frozenset()
        self._scans = 0
        self._began_at = 0.0
        self._complete = False
        self._last: tuple[_Look, DesiredState] | None = None

    @property
    def prune_guard_percent(self) -> float:
        """More than this part of what is managed does not go at once, unless it is confirmed."""
        return self._absence.prune_guard_percent

    @prune_guard_percent.setter
    def prune_guard_percent(self, value: float) -> None:
        self._absence.prune_guard_percent = value

    @property
    def upcoming(self) -> tuple[ModelConfig, ...]:
        """Configs that may be accepted soon: a hint at weights to look at, nothing more."""
        undecided = (self._accepted[model_id].config for model_id in sorted(self._undecided))
        return (*undecided, *self._tracking.upcoming)

    def restore(self, models: Iterable[DesiredModel]) -> None:
        """Take over what an earlier process had accepted; to be called once, before the first scan."""
        restored = {
            model.config.model_id: dataclasses.replace(
                model, held=None, suspended=False, weights=None, weights_problem=None
            )
            for model in models
        }
        self._accepted = dict(sorted(restored.items()))
        for model_id, model in self._accepted.items():
            self._generations[model_id] = model.generation
            claims = () if model.unclaimed else model.claimed_by or (model.source,)
            self._tracking.restore(model_id, claims)
            if model.contested:
                self._open[model_id] = Verdict(conflict=claims)
        self._parser.remember(self._accepted.values())
        self._undecided = frozenset(self._accepted)
        self._absence.restore(i for i, model in self._accepted.items() if model.uncounted)

    def distrust(self) -> None:
        """Work on everything with the next scan. For tests: it must make no difference."""
        self._tracking.distrust()
        self._last = None

    def observe(
        self,
        scan: Scan,
        now: float,
        read: Read,
        stat: Stat,
        instructions: Instructions = NO_INSTRUCTIONS,
    ) -> DesiredState:
        """Take one scan into account.

        Args:
            scan: what was seen; the stats in it must not be older than `now`.
            now: monotonic seconds, never less than before.
            read: the bytes of a file by its relative path; called only where something is new.
            stat: the fingerprint of a file, asked after reading it.
            instructions: what people asked for beside what the files say.
        """
        look = _Look(
            scan,
            instructions.suspended,
            instructions.confirmed_prune,
            self.settle_s,
            self.prune_guard_percent,
        )
        if self._last is not None and self._is_at_rest and look == self._last[0]:
            return self._last[1]
        touched = self._tracking.observe(scan, now, self.settle_s, read, stat)
        self._server.observe(scan, now, self.settle_s, read, stat)
        next_check_s = self._next_check_s(scan, now)
        self._complete = self._complete or (scan.complete and next_check_s is None)
        verdicts = {i: self._judge(i, look) for i in sorted(self._to_judge(touched, look))}
        certain = self._tracking.is_certain(scan, now, self.settle_s)
        guard = self._apply(verdicts, look, now, certain=certain)
        self._decide_restored(guard if certain else None, now, next_check_s)
        state = self._state(scan, guard, next_check_s)
        if self._last is not None and state == self._last[1]:
            state = self._last[1]
        self._last = look, state
        return state

    @property
    def _is_at_rest(self) -> bool:
        """The last scan left nothing to settle, so that another one like it says nothing new."""
        is_settled = self._last is not None and self._last[1].next_check_s is None
        return is_settled and self._tracking.is_at_rest and self._server.is_at_rest

    def _next_check_s(self, scan: Scan, now: float) -> float | None:
        waits = (
            self._tracking.pending_s(scan, now, self.settle_s),
            self._server.pending_s(now, self.settle_s),
        )
        return min((wait for wait in waits if wait is not None), default=None)

    # -- judging

    def _to_judge(self, touched: frozenset[str], look: _Look) -> set[str]:
        everything = self._accepted.keys() | self._open.keys() | self._tracking.claimed
        if self._last is None or self._last[0].outage != look.outage:
            return everything
        return {*touched, *self._open, *(look.suspended & everything)}

    def _judge(self, model_id: str, look: _Look) -> Verdict:
        current, before = self._accepted.get(model_id), self._open.get(model_id)
        claims = self._tracking.claims(model_id)
        verdict = judge(claims, current, was_contested=bool(before and before.conflict))
        if model_id in look.suspended:
            generation = current.generation if current is not None else 0
            why = f"suspended: stays at generation {generation} until it is resumed"
            return _held(verdict, why)
        if look.outage is not None:
            return _held(verdict, look.outage)
        if not verdict.is_missing or current is None:
            return verdict
        doubt = self._tracking.doubt_of_absence(model_id)
        if doubt is None:
            return verdict
        why = f"no file declares it, but {doubt.why}"
        if doubt.lasting:
            return _held(verdict, why)
        return dataclasses.replace(verdict, doubt=verdict.doubt or why)

    # -- what follows

    def _apply(
        self, verdicts: Mapping[str, Verdict], look: _Look, now: float, *, certain: bool
    ) -> PruneGuard | None:
        """Make the verdicts true; what a prune guard holds, if any."""
        known = self._accepted
        missing = {
            i: known[i] for i, verdict in verdicts.items() if verdict.is_missing and i in known
        }
        departure = self._absence.decide(missing, known, look.confirmed_prune, certain=certain)
        changed: dict[str, DesiredModel] = {}
        for model_id, verdict in verdicts.items():
            current = known.get(model_id)
            if verdict.accept is not None:
                changed[model_id] = self._accept(verdict, verdict.accept, current, now)
            elif current is not None:
                changed[model_id] = self._hold(verdict, current, look, departure.guard)
        gone = missing.keys() if departure.go else frozenset[str]()
        uncounted = self._absence.uncounted
        self._absence.add(changed.keys() - known.keys())
        if departure.go or (look.scan.complete and not missing):
            self._absence.count_all(certain=certain)
        for model_id in uncounted ^ self._absence.uncounted:
            model = changed.get(model_id) or known[model_id]
            is_uncounted = model_id in self._absence.uncounted
            changed[model_id] = dataclasses.replace(model, uncounted=is_uncounted)
        self._accepted = _updated(known, changed, gone)
        for model_id, verdict in verdicts.items():
            if verdict.accept is not None or (
                verdict.is_missing and model_id not in self._accepted
            ):
                self._open.pop(model_id, None)
            else:
                self._open[model_id] = verdict
        return departure.guard

    def _accept(
        self, verdict: Verdict, found: Declaration, current: DesiredModel | None, now: float
    ) -> DesiredModel:
        model_id = found.config.model_id
        if current is None or current.spec_hash != found.spec_hash:
            before = self._open.get(model_id)
            self._generations[model_id] = self._generations.get(model_id, 0) + 1
            return DesiredModel(
                config=found.config,
                generation=self._generations[model_id],
                spec_hash=found.spec_hash,
                load_hash=found.load_hash,
                source=found.ref,
                accepted_at=now,
                # What people ended a moment ago (a conflict, a suspension) was not seen before.
                seen_at=now if before is not None and before.lasting else verdict.seen_at,
                uncounted=current is not None and current.uncounted,
                mark=found.mark,
            )
        is_alone = len(verdict.refs) == 1 and current.source == found.ref
        if current.config is found.config and is_alone and _is_plain(current):
            return current
        # The config is taken over all the same: it knows the directory that the file is in now.
        return dataclasses.replace(
            current,
            config=found.config,
            source=found.ref,
            held=None,
            suspended=False,
            guarded=False,
            contested=False,
            unclaimed=False,
            claimed_by=verdict.refs if len(verdict.refs) > 1 else (),
            mark=found.mark,
        )

    def _hold(
        self, verdict: Verdict, current: DesiredModel, look: _Look, guard: PruneGuard | None
    ) -> DesiredModel:
        held = dataclasses.replace(
            current,
            held=verdict.hold or self._why_missing(verdict, look.scan, guard),
            suspended=current.config.model_id in look.suspended,
            guarded=current.guarded or (verdict.is_missing and guard is not None),
            contested=bool(verdict.conflict),
            unclaimed=not verdict.refs,
            claimed_by=verdict.refs if verdict.refs != (current.source,) else (),
        )
        return current if held == current else held

    def _why_missing(self, verdict: Verdict, scan: Scan, guard: PruneGuard | None) -> str:
        if guard is not None:
            root = shlex.quote(printable(str(self._root))) if self._root else "DIRECTORY"
            return (
                f"no file declares it, but {len(guard.model_ids)} of {guard.managed} models would be "
                "unloaded at once: to let them go, run "
                f"`splitlearn-manager reconcile apply {root} --confirm-prune {guard.digest}`"
            )
        if verdict.doubt is not None:
            return verdict.doubt
        return scan.error or "no file declares it, for too short a time to be sure"

    def _decide_restored(
        self, guard: PruneGuard | None, now: float, next_check_s: float | None
    ) -> None:
        """Find out which restored models are still in a doubt that the next looks will end."""
        if not self._undecided:
            return
        self._scans += 1
        if self._scans == 1:
            self._began_at = now
        took_s = now - self._began_at
        waited = self._scans >= UNDECIDED_SCANS and took_s >= UNDECIDED_SETTLES * self.settle_s
        if next_check_s is None or waited:
            self._undecided = frozenset()
            return
        in_doubt = {i for i, verdict in self._open.items() if not verdict.lasting}
        self._undecided &= in_doubt.difference(guard.model_ids if guard is not None else ())

    # -- what to tell

    def _state(
        self, scan: Scan, guard: PruneGuard | None, next_check_s: float | None
    ) -> DesiredState:
        models, undecided = self._accepted, self._undecided
        conflicts = {i: v.conflict for i, v in sorted(self._open.items()) if v.conflict}
        if undecided:
            models = {i: m for i, m in models.items() if i not in undecided}
        return DesiredState(
            models=models,
            problems=self._problems(scan, conflicts),
            conflicts=conflicts,
            source_available=scan.root is not None,
            source_message=scan.error or "",
            complete=self._complete,
            next_check_s=next_check_s,
            server=self._server.config,
            prune_guard=guard,
            undecided={i: self._accepted[i] for i in sorted(undecided)},
        )

    def _problems(
        self, scan: Scan, conflicts: Mapping[str, tuple[SourceRef, ...]]
    ) -> tuple[Problem, ...]:
        problems = [*self._tracking.problems, *self._server.problems]
        for path, why in scan.unreadable.items():
            message = f"cannot be read: {why}; nothing is unloaded until it can"
            problems.append(Problem(printable(path), None, None, None, message))
        for model_id, refs in conflicts.items():
            problems.extend(_conflict_problems(model_id, refs))
        return tuple(sorted(problems, key=_problem_order))


def _held(verdict: Verdict, why: str) -> Verdict:
    """The id stays as it is, whatever the verdict was, until a person acts."""
    return Verdict(hold=why, lasting=True, conflict=verdict.conflict, refs=verdict.refs)


def _is_plain(model: DesiredModel) -> bool:
    """Nothing but its one declaration has made it what it is."""
    marks = (model.suspended, model.guarded, model.contested, model.unclaimed)
    return not (model.held or any(marks) or model.claimed_by)


def _updated(
    models: Mapping[str, DesiredModel], changed: Mapping[str, DesiredModel], gone: Iterable[str]
) -> Mapping[str, DesiredModel]:
    """The models with changes, sorted; the very same mapping where there are none."""
    going = frozenset(gone)
    if not going and all(models.get(i) is model for i, model in changed.items()):
        return models
    updated = {i: m for i, m in {**models, **changed}.items() if i not in going}
    return updated if changed.keys() <= models.keys() else dict(sorted(updated.items()))


def _conflict_problems(model_id: str, refs: tuple[SourceRef, ...]) -> list[Problem]:
    if len({ref.file for ref in refs}) == 1:
        return []  # the file's own parsing has named both lines
    problems = []
    for ref in refs:
        others = " and ".join(str(other) for other in refs if other != ref)
        message = f"{model_id} is declared by {others} too; keep one of them"
        problems.append(Problem(ref.file, ref.line, None, "model_id", message))
    return problems


def _problem_order(problem: Problem) -> tuple[str, int, int, str, str]:
    return (
        problem.file,
        problem.line or 0,
        problem.column or 0,
        problem.key or "",
        problem.message,
    )
