"""Which desired state the scans of a directory prove: the decisions, without files, clock or threads.

`Acceptance.observe` takes one scan and returns the desired state so far. For each model id it asks who
claims it: *firm* claims are valid documents of settled files; *kept* claims come from files that declared
the id last and are in doubt now (changing, invalid, unreadable, out of sight, gone for too short a time).

    one firm claim, no other                    accepted; a new generation if the spec's hash is new
    the same, and a doubtful file's old claim   held, until the doubt is over
    several firm or lastingly kept claims       conflict: held, a problem for each of them
    kept claims only                            held: an id's only source may be about to come back
    no claim                                    pruned, if its absence is proven; else held

Held means: same generation, same config, whatever the files say; for an id that was never accepted it
means that it is not accepted yet. Absence is proven when two complete scans of the same directory, at
least `settle_s` apart, saw the same files, and none of them declares the id or could mean to.

Never reads a file that has not settled for anything but a hint, never drops an id because of something
that could not be looked at, and never depends on the order in which files are listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem, parse_models, parse_server
from splitlearn_manager.desired.scanner import SERVER_FILE, Scan, printable
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.desired.state import DesiredModel, DesiredState, SourceRef
from splitlearn_manager.desired.tracked_file import (
    Declaration,
    Doubt,
    Read,
    Reading,
    Stat,
    TrackedFile,
)


@dataclass(frozen=True)
class KeptClaim:
    """A file that is in doubt declared the id there when it was last known to be right."""

    ref: SourceRef
    doubt: Doubt


@dataclass(frozen=True)
class Claims:
    """All that the files say about one id."""

    firm: tuple[Declaration, ...] = ()
    kept: tuple[KeptClaim, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the claims on one id mean: exactly one of `accept` and `hold`, or none when nobody claims it.

    Attributes:
        accept: the declaration that stands.
        hold: why the id stays as it was.
        conflict: the declarations that contradict each other.
    """

    accept: Declaration | None = None
    hold: str | None = None
    conflict: tuple[SourceRef, ...] = ()


def claims_of(files: Iterable[TrackedFile]) -> dict[str, Claims]:
    """Who claims which id. `files` in a fixed order, so that equal states read equal."""
    claims: dict[str, Claims] = {}
    for file in files:
        firm = {found.config.model_id for found in file.declarations}
        for found in file.declarations:
            model_id = found.config.model_id
            before = claims.get(model_id, Claims())
            claims[model_id] = Claims((*before.firm, found), before.kept)
        doubt = file.doubt
        for model_id, ref in file.kept.items() if doubt else ():
            if doubt and model_id not in firm:
                before = claims.get(model_id, Claims())
                claims[model_id] = Claims(before.firm, (*before.kept, KeptClaim(ref, doubt)))
    return claims


def judge(claims: Claims, current: DesiredModel | None, *, was_contested: bool) -> Verdict:
    """Decide about one id.

    A passing doubt (a file that is being edited, or was renamed a moment ago) is no conflict; but a
    conflict that was there before does not end by it either.
    """
    rivals = [kept.ref for kept in claims.kept if kept.doubt.lasting or was_contested]
    refs = tuple(sorted([*(found.ref for found in claims.firm), *rivals]))
    if len(refs) > 1:
        places = " and ".join(str(ref) for ref in refs)
        return Verdict(hold=f"declared more than once: {places}", conflict=refs)
    if claims.firm:
        found = claims.firm[0]
        if not claims.kept or (current and current.spec_hash == found.spec_hash):
            return Verdict(accept=found)
    if claims.kept:
        return Verdict(hold=claims.kept[0].doubt.why)
    return Verdict()


class Acceptance:
    """Remembers what was seen and accepted; give it every scan, in order.

    Args:
        settle_s: seconds that two agreeing looks must be apart; may be changed between two scans.
        root: the desired directory, which relative paths inside the files are resolved against;
            None for the current working directory.
    """

    def __init__(self, settle_s: float, root: Path | None = None) -> None:
        self.settle_s = settle_s
        self._root = root
        self._files: dict[str, TrackedFile] = {}
        self._server_file = TrackedFile(SERVER_FILE)
        self._server: ServerConfig | None = None
        self._run: Settling[tuple[int, int] | None] = Settling()  # complete scans of one directory
        self._accepted: dict[str, DesiredModel] = {}
        self._generations: dict[str, int] = {}
        self._contested: frozenset[str] = frozenset()
        self._complete = False

    def observe(self, scan: Scan, now: float, read: Read, stat: Stat) -> DesiredState:
        """Take one scan into account.

        Args:
            scan: what was seen; the stats in it must not be older than `now`.
            now: monotonic seconds, never less than before.
            read: the bytes of a file by its relative path; called only where something is new.
            stat: the fingerprint of a file, asked after reading it.
        """
        self._track(scan, now)
        for path in sorted(self._files):
            self._files[path].settle(now, self.settle_s, read, stat, self._parse_models)
        self._server_file.settle(now, self.settle_s, read, stat, _parse_server)
        for path in [p for p, f in self._files.items() if f.is_proven_gone(now, self.settle_s)]:
            del self._files[path]
        self._take_server(now)
        verdicts = self._judge_all()
        self._apply(verdicts, scan, now)
        return self._state(verdicts, scan, now)

    @property
    def upcoming(self) -> tuple[ModelConfig, ...]:
        """Configs that unsettled files seem to declare: a hint at weights to look at, nothing more."""
        return tuple(found.config for _, f in sorted(self._files.items()) for found in f.upcoming)

    # -- what the scan saw

    def _track(self, scan: Scan, now: float) -> None:
        if scan.complete:
            if self._run.known and self._run.value != scan.root:
                for file in (*self._files.values(), self._server_file):
                    file.forget_absence()
            self._run.look(scan.root, now)
        else:
            self._run.forget()
        for path in scan.files:
            if path not in self._files:
                self._files[path] = TrackedFile(path)
        for path, file in self._files.items():
            entry = scan.files.get(path)
            if entry is not None:
                file.see(entry, now)
            else:
                behind_a_dead_link = any(path.startswith(f"{link}/") for link in scan.dangling)
                file.miss(now, proves_absence=scan.complete and not behind_a_dead_link)
        if scan.server is not None:
            self._server_file.see(scan.server, now)
        else:
            self._server_file.miss(now, proves_absence=scan.complete)

    def _take_server(self, now: float) -> None:
        reading = self._server_file.reading
        if reading is not None and reading.server is not None and not reading.problems:
            self._server = reading.server
        elif self._server_file.is_proven_gone(now, self.settle_s):
            self._server = None
            self._server_file = TrackedFile(SERVER_FILE)

    def _parse_models(self, path: str, data: bytes) -> Reading:
        name = printable(path)
        base_dir = self._root / Path(path).parent if self._root else None
        parsed = parse_models(data, file=name, base_dir=base_dir)
        declarations = tuple(
            Declaration(
                config=model.config,
                spec_hash=model.config.spec_hash(),
                load_hash=model.config.load_hash(),
                ref=SourceRef(name, model.line),
            )
            for model in parsed.models
        )
        if not parsed.problems:
            return Reading(declarations)
        return Reading(
            declarations,
            problems=parsed.problems,
            fault="is invalid",
            invalid_ids=parsed.invalid_ids,
            data=data.replace(b"\0", b""),
        )

    # -- what it means

    def _judge_all(self) -> dict[str, Verdict]:
        claims = claims_of(file for _, file in sorted(self._files.items()))
        return {
            model_id: judge(
                claims.get(model_id, Claims()),
                self._accepted.get(model_id),
                was_contested=model_id in self._contested,
            )
            for model_id in sorted({*claims, *self._accepted})
        }

    def _apply(self, verdicts: Mapping[str, Verdict], scan: Scan, now: float) -> None:
        accepted: dict[str, DesiredModel] = {}
        for model_id, verdict in verdicts.items():
            current = self._accepted.get(model_id)
            if verdict.accept is not None:
                accepted[model_id] = self._accept(verdict.accept, current, now)
            elif current is not None:
                outage = scan.error if scan.root is None else None
                why = outage or verdict.hold or self._doubt_of_absence(model_id, scan, now)
                if why is not None:
                    accepted[model_id] = dataclasses.replace(current, held=why)
        self._accepted = accepted
        self._contested = frozenset(i for i, verdict in verdicts.items() if verdict.conflict)

    def _accept(self, found: Declaration, current: DesiredModel | None, now: float) -> DesiredModel:
        if current is not None and current.spec_hash == found.spec_hash:
            # The config is taken over all the same: it knows the directory that the file is in now.
            return dataclasses.replace(current, config=found.config, source=found.ref, held=None)
        model_id = found.config.model_id
        self._generations[model_id] = self._generations.get(model_id, 0) + 1
        return DesiredModel(
            config=found.config,
            generation=self._generations[model_id],
            spec_hash=found.spec_hash,
            load_hash=found.load_hash,
            source=found.ref,
            accepted_at=now,
        )

    def _doubt_of_absence(self, model_id: str, scan: Scan, now: float) -> str | None:
        """Why it is not proven that no file declares the id; None when it is.

        Files are settled one by one, so when none is in doubt, the scan at which the last of them was
        first seen as it is, `settle_s` ago or more, agrees with this one; the run makes sure that it was
        complete, and of this very directory.
        """
        if not scan.complete:
            return scan.error or "the directory could not be read completely"
        if not self._run.settled(now, self.settle_s):
            return "no file declares it, for too short a time to be sure"
        for _, file in sorted(self._files.items()):
            why = file.could_declare(model_id)
            if why is not None:
                return f"no file declares it, but {why}"
        return None

    # -- what to tell

    def _state(self, verdicts: Mapping[str, Verdict], scan: Scan, now: float) -> DesiredState:
        next_check_s = self._next_check_s(scan, now)
        if scan.complete and next_check_s is None:
            self._complete = True
        return DesiredState(
            models=dict(self._accepted),
            problems=self._problems(verdicts, scan),
            conflicts={i: verdict.conflict for i, verdict in verdicts.items() if verdict.conflict},
            source_available=scan.root is not None,
            source_message=scan.error or "",
            complete=self._complete,
            next_check_s=next_check_s,
            server=self._server,
        )

    def _problems(self, verdicts: Mapping[str, Verdict], scan: Scan) -> tuple[Problem, ...]:
        problems = [p for file in self._files.values() for p in file.problems]
        problems.extend(self._server_file.problems)
        for path, why in scan.unreadable.items():
            message = f"cannot be read: {why}; nothing is unloaded until it can"
            problems.append(Problem(printable(path), None, None, None, message))
        for model_id, verdict in verdicts.items():
            problems.extend(_conflict_problems(model_id, verdict.conflict))
        return tuple(sorted(problems, key=_problem_order))

    def _next_check_s(self, scan: Scan, now: float) -> float | None:
        files = (*self._files.values(), self._server_file)
        waits = [w for f in files if (w := f.pending_s(now, self.settle_s)) is not None]
        if scan.torn:
            waits.append(self.settle_s)
        elif scan.complete and not self._run.settled(now, self.settle_s):
            waits.append(self._run.remaining_s(now, self.settle_s))
        return min(waits, default=None)


def _parse_server(path: str, data: bytes) -> Reading:
    server, problems = parse_server(data, file=path)
    return Reading(server=server, problems=problems, fault="is invalid" if problems else None)


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
