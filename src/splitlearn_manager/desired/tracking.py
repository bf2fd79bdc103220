"""All files of the directory from scan to scan, and which ids it is that they say something new about.

A scan is compared with the last one. Only files that it sees otherwise, and those that have not come to
rest (unsettled, unreadable, out of sight), are looked into; for all others a scan costs a comparison.
What `observe` returns are the ids whose claims may have changed, so that only these are judged anew.

It knows who claims an id, never what follows from that: this is the business of `claims` and `acceptance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Mapping
from itertools import chain

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.claims import Claims, claims_on
from splitlearn_manager.desired.scanner import FileEntry, Scan
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.desired.tracked_file import Doubt, Parse, Read, Stat, TrackedFile

MANY_FILES = 100
"""From so many on, parsing them in one look is worth a progress bar."""

Progress = Callable[[int, int], None]
"""(done, total) of the files to parse."""


class Tracking:
    """The model files; give it every scan, in order.

    Args:
        parse: what the bytes of a file mean.
        on_progress: called while many files are parsed, a hundred times at most.
    """

    def __init__(self, parse: Parse, on_progress: Progress | None = None) -> None:
        self._parse = parse
        self._on_progress = on_progress
        self._files: dict[str, TrackedFile] = {}
        self._seen: Mapping[str, FileEntry] = {}  # by the last scan
        self._unrested: set[str] = set()
        self._faulty: set[str] = set()
        self._claimants: dict[str, tuple[TrackedFile, ...]] = {}
        self._run: Settling[tuple[int, int] | None] = Settling()  # complete scans of one directory
        self._doubts: tuple[Doubt, ...] | None = None  # about just any id; None: to be found out

    def restore(self, model_id: str, refs: Iterable[SourceRef]) -> None:
        """An earlier process knew the id to be declared there."""
        for ref in refs:
            old = self._files.get(ref.file)
            file = TrackedFile(ref.file, {**(old.kept if old is not None else {}), model_id: ref})
            for known in file.kept:
                others = (f for f in self._claimants.get(known, ()) if f is not old)
                self._set_claimants(known, (*others, file))
            self._files[ref.file] = file
            self._unrested.add(ref.file)

    def distrust(self) -> None:
        """Look into all files with the next scan. For tests: it must make no difference."""
        self._unrested = set(self._files)

    # -- the scans

    def observe(
        self, scan: Scan, now: float, settle_s: float, read: Read, stat: Stat
    ) -> frozenset[str]:
        """Take a scan into account, and say which ids may have other claims than before."""
        self._doubts = None
        self._follow_run(scan, now)
        files = [self._files[path] for path in sorted(self._to_look_into(scan))]
        before = [tuple(file.kept) for file in files]
        for file in files:
            self._see(file, scan, now)
        for file in self._with_progress(files):
            file.settle(now, settle_s, read, stat, self._parse)
        touched = set(chain.from_iterable(before))
        for file, ids in zip(files, before, strict=True):
            self._index(file, ids, is_gone=file.is_proven_gone(now, settle_s))
            touched.update(file.kept)
        self._seen = scan.files
        return frozenset(touched)

    def is_certain(self, scan: Scan, now: float, settle_s: float) -> bool:
        """Whether what no file declares at this scan is proven to be declared by none.

        Files are settled one by one, so when none is in doubt, the scan at which the last of them was
        first seen as it is, `settle_s` ago or more, agrees with this one; the run makes sure that it was
        complete, and of this very directory. A file that has gone a moment ago is in doubt too: so a
        deletion under way is decided about as a whole.
        """
        if not scan.complete or not self._run.settled(now, settle_s):
            return False
        return not any(self._files[path].is_unsettled for path in self._unrested)

    def pending_s(self, scan: Scan, now: float, settle_s: float) -> float | None:
        """Seconds until a look may settle something; None when nothing is open."""
        files = (self._files[path] for path in self._unrested)
        waits = [wait for f in files if (wait := f.pending_s(now, settle_s)) is not None]
        if scan.torn:
            waits.append(settle_s)
        elif scan.complete and not self._run.settled(now, settle_s):
            waits.append(self._run.remaining_s(now, settle_s))
        return min(waits, default=None)

    # -- what the files say

    @property
    def is_at_rest(self) -> bool:
        """A scan that sees the same files as the last one would change nothing."""
        return all(not self._files[path].in_sight for path in self._unrested)

    @property
    def claimed(self) -> KeysView[str]:
        """All ids that some file claims."""
        return self._claimants.keys()

    def claims(self, model_id: str) -> Claims:
        """Who claims the id."""
        files = self._claimants.get(model_id, ())
        return claims_on(model_id, sorted(files, key=lambda file: file.path))

    def doubt_of_absence(self, model_id: str) -> Doubt | None:
        """Why some file may mean the id though none is known to; a lasting reason if there is one."""
        if self._doubts is None:
            suspects = sorted(self._unrested | self._faulty)
            doubts = (self._files[path].doubt_of_all for path in suspects)
            self._doubts = tuple(doubt for doubt in doubts if doubt is not None)
        faulty = (self._files[path].doubt_of(model_id) for path in sorted(self._faulty))
        doubts_now = (*self._doubts, *(doubt for doubt in faulty if doubt is not None))
        return min(doubts_now, key=lambda doubt: not doubt.lasting, default=None)

    @property
    def problems(self) -> list[Problem]:
        """Of the last readings, in no particular order."""
        return [problem for path in self._faulty for problem in self._files[path].problems]

    @property
    def upcoming(self) -> tuple[ModelConfig, ...]:
        """Configs that unsettled files seem to declare: a hint, nothing more."""
        files = (self._files[path] for path in sorted(self._unrested))
        return tuple(found.config for file in files for found in file.upcoming)

    # -- inside

    def _follow_run(self, scan: Scan, now: float) -> None:
        if not scan.complete:
            self._run.forget()
            return
        if self._run.known and self._run.value != scan.root:
            for path in self._unrested:
                self._files[path].forget_absence()
        self._run.look(scan.root, now)

    def _to_look_into(self, scan: Scan) -> set[str]:
        """The paths of files that are not, or may not stay, as they were at the last scan."""
        seen = self._seen
        if scan.files != seen:
            changed = {p for p, entry in scan.files.items() if entry != seen.get(p)}
            for path in changed - self._files.keys():
                self._files[path] = TrackedFile(path)
                self._take_over_restored(self._files[path])
        else:
            changed = set()
        return changed | self._unrested | (self._files.keys() - scan.files.keys())

    def _take_over_restored(self, file: TrackedFile) -> None:
        """What was restored for a file under its printable name, which is all that a record has."""
        restored = self._files.get(file.name)
        if restored is None or restored is file or restored.was_seen:
            return
        file.remember(restored.kept)
        for model_id in file.kept:
            others = (f for f in self._claimants[model_id] if f is not restored)
            self._set_claimants(model_id, (*others, file))
        del self._files[file.name]
        self._unrested.discard(file.name)

    def _see(self, file: TrackedFile, scan: Scan, now: float) -> None:
        entry = scan.files.get(file.path)
        if entry is not None:
            file.see(entry, now)
            return
        behind_a_dead_link = any(file.path.startswith(f"{link}/") for link in scan.dangling)
        file.miss(now, proves_absence=scan.complete and not behind_a_dead_link)

    def _with_progress(self, files: list[TrackedFile]) -> Iterable[TrackedFile]:
        total = sum(file.needs_parsing for file in files) if len(files) >= MANY_FILES else 0
        if self._on_progress is None or total < MANY_FILES:
            yield from files
            return
        done = 0
        self._on_progress(done, total)
        for file in files:
            is_parsed = file.needs_parsing
            yield file
            if is_parsed:
                done += 1
                if done * 100 // total != (done - 1) * 100 // total:
                    self._on_progress(done, total)

    def _index(self, file: TrackedFile, before: tuple[str, ...], *, is_gone: bool) -> None:
        """Keep the indices true after a file was looked into, which claimed the ids `before`."""
        after = () if is_gone else file.kept.keys()
        for model_id in before:
            if model_id not in after:
                others = (f for f in self._claimants[model_id] if f is not file)
                self._set_claimants(model_id, others)
        for model_id in after:
            if model_id not in before:
                self._set_claimants(model_id, (*self._claimants.get(model_id, ()), file))
        if is_gone:
            del self._files[file.path]
        for paths, belongs in (
            (self._unrested, not file.is_at_rest),
            (self._faulty, file.is_faulty),
        ):
            if belongs and not is_gone:
                paths.add(file.path)
            else:
                paths.discard(file.path)

    def _set_claimants(self, model_id: str, files: Iterable[TrackedFile]) -> None:
        claimants = tuple(files)
        if claimants:
            self._claimants[model_id] = claimants
        else:
            self._claimants.pop(model_id, None)
