"""What may become desired: the rules of acceptance, stated over the true history of the files.

Each look of the node is judged by what changed in it. An id may get a new spec only if one file has
declared just that for `settle_s`, and no other file that stands (I7). It may go only if for `settle_s` a
complete directory held no file that could mean it (I8), together with all that went with it, and below
the guard or confirmed (I9). Nothing else may change (I12). After a restart the same holds, with what was
on the disk in the place of what was known before (I5).

The rules forbid; that the right thing happens in the end is asked once the world is quiet (`at_rest`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from simulation.machine import Broken
from simulation.texts import Meaning
from simulation.truth import EPSILON_S, History, Seen, Truth
from splitlearn_manager.desired.state import DesiredModel, DesiredState


@dataclass(frozen=True)
class Accepted:
    """What is known of an accepted model."""

    generation: int
    spec_hash: str
    file: str
    suspended: bool = False


def accepted_of(model: DesiredModel) -> Accepted:
    return Accepted(model.generation, model.spec_hash, model.source.file, model.suspended)


def _same(one: Accepted, other: Accepted) -> bool:
    return (one.generation, one.spec_hash) == (other.generation, other.spec_hash)


class Oracle:
    """See the module's text.

    Attributes:
        managed: what was accepted as of the last look, or of the disk after a restart.
        managed_since: when that began, for what was not there when the process started.
        either: for some ids after a restart, all that may have been on the disk.
        ever: all that was accepted once.
        claims: for each file, the ids that it surely was known to declare.
        claimed_before: those that earlier processes knew, which may have been kept.
        guards: ids by the digest that the node gave for them.
        confirmed: ids whose going somebody confirmed.
        suspended: ids that people had suspended by the last look, and have not resumed.
        ever_suspended: ids that people suspended once.
    """

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.managed: dict[str, Accepted] = {}
        self.managed_since: dict[str, float] = {}
        self.either: dict[str, tuple[Accepted, ...]] = {}
        self.ever: dict[str, dict[Accepted, None]] = {}
        self.claims: dict[str, set[str]] = {}
        self.claimed_before: dict[str, set[str]] = {}
        self.guards: dict[str, frozenset[str]] = {}
        self.confirmed: frozenset[str] = frozenset()
        self.suspended: set[str] = set()
        self.ever_suspended: set[str] = set()
        self.may_mean: dict[str, History[bool]] = {}
        self._settle_s = math.inf
        self._unseen_since: dict[str, float] = {}
        self._first_seen: dict[str, tuple[object, float]] = {}
        self._first_clean: dict[str, tuple[object, float]] = {}
        self._absent_at_look: set[str] = set()
        self._first_look: float | None = None

    # History.

    def changed(self, t: float) -> None:
        """The files may have changed."""
        self.truth.see(t)
        for model_id in {*self.managed, *self.may_mean}:
            self._see_meaning(model_id, t)

    def _see_meaning(self, model_id: str, t: float) -> None:
        now = any(self._could_mean(n, h.value, model_id) for n, h in self.truth.files.items())
        history = self.may_mean.get(model_id)
        if history is None:
            self.may_mean[model_id] = History(now, t)
        else:
            history.set(now, t, in_look=self.truth.in_look)

    def _could_mean(self, name: str, value: bytes | str | None, model_id: str) -> bool:
        if value is None:
            return False
        claimed = model_id in self.claims.get(name, ())
        if isinstance(value, str):
            return claimed
        return _says(name.rpartition("/")[0], value, model_id, claimed)

    @property
    def is_plain(self) -> bool:
        """The directory was there at each look of this process, and all that its files say is valid."""
        whole = self.truth.whole
        if self._first_look is None or not whole.value[1]:
            return False
        if whole.since > self._first_look + EPSILON_S or self.truth.unreadable:
            return False
        for name, history in self.truth.files.items():
            value = history.value
            if value is not None and (isinstance(value, str) or meaning_of(name, value).faulty):
                return False
        return True

    # A process.

    def begin_process(
        self, kept: Mapping[str, tuple[Accepted | None, ...]], *, is_known: bool = True
    ) -> None:
        """A new process starts with what was on the disk: for each id, what may be there (or None).

        Where nothing is known of the disk, whatever was accepted once may come back, or be forgotten.
        """
        if is_known:
            surely = {i: found[0] for i, found in kept.items() if None not in found}
            self.managed = {i: found for i, found in surely.items() if found is not None}
            self.either = {
                i: tuple(option for option in found if option is not None)
                for i, found in kept.items()
                if len(found) > 1
            }
        else:
            self.managed = {}
            self.either = {model_id: tuple(found) for model_id, found in self.ever.items()}
        for name, ids in self.claims.items():
            self.claimed_before.setdefault(name, set()).update(ids)
        # What a model was last accepted from may have been gone for long when others were in conflict.
        before, self.claims = self.claims, {}
        for model_id, known in self.managed.items():
            if model_id not in self.either and model_id in before.get(known.file, ()):
                self.claims.setdefault(known.file, set()).add(model_id)
        self.managed_since = dict.fromkeys(self.managed, -1e9)
        self.may_mean.clear()
        self._unseen_since.clear()
        for model_id in self.managed:
            self._see_meaning(model_id, self.truth.t)
        self._first_seen.clear()
        self._first_clean.clear()
        self._first_look = None

    def begin_look(self, t: float) -> None:
        self.truth.begin_look(t)
        for model_id in {*self.managed, *self.may_mean}:
            self._see_meaning(model_id, t)
        self._absent_at_look = {m for m, meant in self.may_mean.items() if not meant.value}
        for history in self.may_mean.values():
            history.before = None
            history.meet()  # absence is proven by looks: two that agree

    def end_look(
        self, after: DesiredState, t: float, settle_s: float, guard_percent: float, *, faults: bool
    ) -> None:
        """Judges what a look made of the files. Raises Broken."""
        self.truth.end_look()
        if self._first_look is None:
            self._first_look = t
        # What the last look proved by the settle_s of its time stays proven when server.yaml raises it.
        known_s = settle_s if math.isinf(self._settle_s) else max(settle_s, self._settle_s)
        settle_s, self._settle_s = min(settle_s, self._settle_s), settle_s
        self._note_unseen(t)
        present = {**dict(after.undecided), **after.models}
        for model_id, model in present.items():
            if model_id not in self.may_mean:
                self._see_meaning(model_id, t)
            self._judge(model_id, model, t, settle_s, undecided=model_id in after.undecided)
        gone = [model_id for model_id in self.managed if model_id not in present]
        if gone:
            self._judge_gone(gone, after, t, settle_s, guard_percent)
        self._note_claims(t, settle_s, known_s, clean=not faults)
        self.managed = {model_id: accepted_of(model) for model_id, model in present.items()}
        self.managed_since = {i: self.managed_since.get(i, t) for i in self.managed}
        for model_id, accepted in self.managed.items():
            self.ever.setdefault(model_id, {})[accepted] = None
        if after.prune_guard is not None:
            guard = after.prune_guard
            self.guards[guard.digest] = frozenset(guard.model_ids)

    def _note_unseen(self, t: float) -> None:
        """Since when every look may have found nothing of a model: a file that moves in the middle of one
        may be seen at neither place."""
        for model_id, history in self.may_mean.items():
            if history.value and not self._moved_in_look(model_id):
                self._unseen_since.pop(model_id, None)
            else:
                self._unseen_since.setdefault(model_id, t)

    def _moved_in_look(self, model_id: str) -> bool:
        return any(
            history.before is not None
            and self._could_mean(name, history.before[0], model_id)
            and not self._could_mean(name, history.value, model_id)
            for name, history in self.truth.files.items()
        )

    # Rules.

    def _judge(
        self, model_id: str, model: DesiredModel, t: float, settle_s: float, *, undecided: bool
    ) -> None:
        before = self.managed.get(model_id)
        now = accepted_of(model)
        options = self.either.pop(model_id, None)
        if options is not None:
            if now in options or any(_same(now, option) for option in options):
                return
            before = options[-1] if model_id in self.managed else None
        if before is not None and before.spec_hash == now.spec_hash:
            if before.generation != now.generation:
                raise Broken(
                    "I12",
                    f"{model_id}: generation {before.generation} became {now.generation}, and its "
                    "spec is the same",
                )
            return
        if before is not None and now.generation != before.generation + 1:
            message = f"{model_id}: generation {now.generation} follows {before.generation}"
            raise Broken("I12", message)
        if undecided or model.held is not None:
            raise Broken("I7", f"{model_id} is held ({model.held}), and its spec changed")
        if before is not None and model_id in self.suspended:
            raise Broken("I7", f"{model_id} was suspended, and its spec changed")
        why_not = self._why_not_accept(model_id, now, before, t, settle_s)
        if why_not is not None:
            raise Broken("I7", f"{model_id} became generation {now.generation}: {why_not}")

    def _why_not_accept(
        self, model_id: str, now: Accepted, before: Accepted | None, t: float, settle_s: float
    ) -> str | None:
        """Why the spec must not be accepted at this look; None when it may."""
        declares = False
        for name, history in self.truth.files.items():
            values = history.throughout(t, settle_s)
            for value in values:
                if isinstance(value, bytes):
                    specs = meaning_of(name, value).specs.get(model_id, ())
                    declares = declares or specs == (now.spec_hash,)
            if history.before is not None or not values:
                continue
            if name != now.file and self._stands(name, values[0], model_id):
                return f"{now.file} declares it, and so does {name}"
        if not declares:
            return f"no file has declared that for settle_s = {settle_s:g} s"
        return None

    def _stands(self, name: str, value: bytes | str | None, model_id: str) -> bool:
        """The file is surely known to declare the id, and has said nothing else since."""
        if value is None or model_id not in self.claims.get(name, ()):
            return False
        if isinstance(value, str) or name in self.truth.unreadable:
            return True
        said = meaning_of(name, value)
        return model_id in said.specs or said.faulty

    def _judge_gone(
        self,
        gone: list[str],
        after: DesiredState,
        t: float,
        settle_s: float,
        guard_percent: float,
    ) -> None:
        assert self._first_look is not None
        if t - self._first_look < settle_s - EPSILON_S:
            raise Broken("I8", f"{gone} went in the first looks of a process")
        if self.truth.unreadable:
            raise Broken("I8", f"{gone} went, and {sorted(self.truth.unreadable)} cannot be read")
        wholes = self.truth.whole.throughout(t, settle_s)
        if not any(root is not None and complete for root, complete in wholes):
            raise Broken("I8", f"{gone} went, and the directory was not whole for settle_s")
        for model_id in gone:
            if model_id in self.suspended:
                raise Broken("I8", f"{model_id} was suspended, and went")
            unseen_s = self._unseen_since.get(model_id, t)
            if not self.may_mean[model_id].value and unseen_s <= t - settle_s + EPSILON_S:
                continue
            if False not in self.may_mean[model_id].throughout(t, settle_s):
                message = f"{model_id} went, and its absence was not proven: {self._who(model_id)}"
                raise Broken("I8", message)
        self._judge_guard(gone, t, settle_s, guard_percent)

    def _who(self, model_id: str) -> str:
        names = [n for n, h in self.truth.files.items() if self._could_mean(n, h.value, model_id)]
        history = self.may_mean[model_id]
        return f"meant by {', '.join(names) or 'nobody'}, since {history.since:.3f}"

    def _judge_guard(self, gone: list[str], t: float, settle_s: float, percent: float) -> None:
        missing = [
            model_id
            for model_id, known in self.managed.items()
            if not self.may_mean[model_id].value
            # What leaves in the middle of a look may be later than what the look saw of it.
            and model_id in self._absent_at_look
            and not known.suspended
            and not self._may_be_kept_by_a_broken_file(model_id)
        ]
        for model_id in missing:
            absent = self.truth.files.get(self.managed[model_id].file)
            if absent is None or absent.value is not None:
                continue
            left_s = min(self.may_mean[model_id].since, self._unseen_since.get(model_id, t))
            if left_s > t - settle_s + EPSILON_S:
                raise Broken("I9", f"{gone} went, while {model_id} had left for less than settle_s")
        left_at = min((self.may_mean[i].since for i in missing), default=t)
        # What was accepted while the others were going may have taken their place, or not.
        settled = sum(
            i in missing or self.managed_since.get(i, left_at) <= left_at - settle_s
            for i in self.managed
        )
        many = max(len(missing), len(gone))
        if all(n >= 3 and many * 100 > percent * n for n in (settled, len(self.managed))):
            unconfirmed = [model_id for model_id in gone if model_id not in self.confirmed]
            if unconfirmed:
                raise Broken(
                    "I9",
                    f"{gone} went: {many} of {settled} with a guard of {percent:g} %, and nobody "
                    f"confirmed {unconfirmed}",
                )

    def _may_be_kept_by_a_broken_file(self, model_id: str) -> bool:
        """A file that nobody can understand, and that declared the id to an earlier process."""
        names = {name for name, ids in self.claimed_before.items() if model_id in ids}
        for name in (*names, self.managed[model_id].file):
            history = self.truth.files.get(name)
            if history is None or history.value is None:
                continue
            if isinstance(history.value, str) or meaning_of(name, history.value).faulty:
                return True
        return False

    # What files are known to say.

    def _note_claims(self, t: float, settle_s: float, known_s: float, *, clean: bool) -> None:
        """Ids are dropped where a look may have read the file, and added only where it surely did: by
        the longer settle_s, when server.yaml has just changed it."""
        if not clean:
            self._first_clean.clear()
        root, complete = self.truth.whole.value
        if root is None:
            return
        for name, history in self.truth.files.items():
            if name not in self.truth.marks and not complete:
                continue
            mark = (self.truth.marks.get(name), history.value)
            since = _first(self._first_seen, name, mark, t)
            surely_since = _first(self._first_clean, name, mark, t) if clean else t
            if t - since < settle_s - EPSILON_S or history.before is not None:
                continue
            known = self.claims.setdefault(name, set())
            value = history.value
            if value is None:
                known.clear()
            elif isinstance(value, bytes):
                said = meaning_of(name, value)
                if not said.faulty:
                    known.intersection_update(said.specs)
                if t - surely_since >= known_s - EPSILON_S:
                    known.update(said.specs)


def _first(seen: dict[str, tuple[object, float]], name: str, mark: object, t: float) -> float:
    """When the file was first seen as it is."""
    before = seen.get(name)
    if before is None or before[0] != mark:
        seen[name] = (mark, t)
        return t
    return before[1]


@functools.lru_cache(maxsize=200_000)
def _says(directory: str, value: bytes, model_id: str, claimed: bool) -> bool:
    """A file in `directory` could mean the id; `claimed` if it is known to have declared it."""
    said = meaning_of(f"{directory}/f", value)
    if model_id in said.specs:
        return True
    return said.faulty and (claimed or model_id in said.invalid_ids or model_id.encode() in value)


def meaning_of(name: str, value: bytes) -> Meaning:
    said = Seen(value, None).meaning(name)
    assert said is not None
    return said
