"""Bugs in looking at the directory and in accepting, holding and letting go what it declares."""

from __future__ import annotations

import dataclasses
from typing import Any

from mutants.mutant import Mutant, instead
from splitlearn_manager.config.files import FileStat
from splitlearn_manager.core.model_reader import ModelReader
from splitlearn_manager.desired import acceptance, scanner, weights
from splitlearn_manager.desired.absence import Absence, digest_of
from splitlearn_manager.desired.acceptance import Acceptance
from splitlearn_manager.desired.claims import Verdict
from splitlearn_manager.desired.scanner import Scan, Scanner
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import Instructions
from splitlearn_manager.desired.tracked_file import TrackedFile
from splitlearn_manager.desired.tracking import Tracking
from splitlearn_manager.reconcile.orders import Orders
from splitlearn_manager.reconcile.reconciler import Reconciler


def _looks_only_when_told(loop: Any) -> Any:
    return loop.turn(look=loop._look_asked or loop._desired.next_check_s is not None)


def _reads_at_once(file: Any) -> Any:
    if file._is_current:
        return file._reading.declarations
    return file._peek.reading.declarations if file._peek else ()


def _scan_with_holes_is_whole(real: Any) -> Any:
    def scan(self: Any) -> Scan:
        found = real(self)
        if found.root is None:
            return found
        return dataclasses.replace(found, complete=True, error=None, torn=False, dangling=())

    return scan


def _no_directory_is_an_empty_one(real: Any) -> Any:
    def scan(self: Any) -> Scan:
        found = real(self)
        return found if found.root is not None else Scan(complete=True, files={}, root=(0, 0))

    return scan


def _keeps_to_the_first_directory(real: Any) -> Any:
    def scan(self: Any) -> Scan:
        found = real(self)
        first = self.__dict__.setdefault("first", found.root or None)
        if first is None:
            self.__dict__.pop("first")
        if found.root is None or found.root == first:
            return found
        return Scan(complete=False, files={}, error="another directory is there")

    return scan


def _last_writer_wins(real: Any) -> Any:
    def judge(found: Any, current: Any, *, was_contested: bool) -> Verdict:
        if found.firm:
            last = max(found.firm, key=lambda declaration: declaration.ref)
            return Verdict(accept=last, refs=(last.ref,), seen_at=found.seen_at)
        return real(found, current, was_contested=was_contested)

    return judge


def _invalid_is_empty(real: Any) -> Any:
    def take(self: Any, entry: Any, reading: Any) -> None:
        real(
            self, entry, dataclasses.replace(reading, fault=None, data=b"", invalid_ids=frozenset())
        )
        self._kept = None

    return take


def _another_line_is_another_version(real: Any) -> Any:
    def accept(self: Any, verdict: Any, found: Any, current: Any, now: float) -> Any:
        made = real(self, verdict, found, current, now)
        if (
            current is not None
            and current.source != found.ref
            and made.generation == current.generation
        ):
            self._generations[found.config.model_id] += 1
            return dataclasses.replace(made, generation=made.generation + 1)
        return made

    return accept


def _any_digest_will_do(real: Any) -> Any:
    def decide(self: Any, missing: Any, accepted: Any, confirmed: str, *, certain: bool) -> Any:
        confirmed = digest_of(missing) if confirmed else ""
        return real(self, missing, accepted, confirmed, certain=certain)

    return decide


def _confirms_blindly(self: Any, digest: str) -> str:
    self.confirmed_prune = digest
    return "confirmed"


def _suspension_is_not_told(real: Any) -> Any:
    def look(self: Any, now: float, instructions: Instructions) -> Any:
        return real(self, now, dataclasses.replace(instructions, suspended=frozenset()))

    return look


def _forgets_generations(real: Any) -> Any:
    def restore(self: Any, models: Any) -> None:
        real(self, [dataclasses.replace(model, generation=1) for model in models])

    return restore


def _weights_count_at_once(real: Any) -> Any:
    def look(self: Any, now: float, settle_s: float, ask: Any) -> bool:
        before = self.settled
        changed = real(self, now, settle_s, ask)
        if self.settling.known:
            self.settled = self.settling.value
        return bool(changed or before != self.settled)

    return look


def _torn_is_whole(real: Any) -> Any:
    def scan(self: Any) -> Scan:
        found = real(self)
        if not found.torn:
            return found
        return dataclasses.replace(found, complete=True, error=None, torn=False)

    return scan


def _kept_is_desired(real: Any) -> Any:
    def restore(self: Any, models: Any) -> None:
        real(self, models)
        self._undecided = frozenset()

    return restore


def _held_while_others_are_broken(real: Any) -> Any:
    def judge(self: Any, model_id: str, look: Any) -> Verdict:
        found = real(self, model_id, look)
        if self._tracking._faulty:
            return dataclasses.replace(
                found, accept=None, hold="another file is broken", lasting=True
            )
        return found

    return judge


MUTANTS = (
    Mutant(
        "events are trusted, not the scan",
        "controllers that are edge-triggered: an inotify queue that overflows, a network mount that "
        "reports nothing, and a change is never seen",
        lambda: [(Reconciler, "next_turn", _looks_only_when_told)],
    ),
    Mutant(
        "one look is enough",
        "poll-mode servers that load a file in the middle of its being copied",
        lambda: [(Settling, "settled", lambda self, now, settle_s: self.known)],
    ),
    Mutant(
        "two looks are enough, however close",
        "debouncing by counting: two polls in the same millisecond agree on half a file",
        lambda: [(Settling, "settled", lambda self, now, settle_s: self._looks >= 2)],
    ),
    Mutant(
        "a truncated YAML counts, because it validates",
        "whoever parses before the writer is done: a cut-off document is often a valid one",
        lambda: [(TrackedFile, "declarations", property(_reads_at_once))],
    ),
    Mutant(
        "mtime alone is the fingerprint",
        "make, and caches by mtime: rsync -t, git and tar set it back",
        lambda: [(FileStat, "fingerprint", property(lambda self: (0, 0, 0, self.mtime_ns, 0)))],
    ),
    Mutant(
        "size and mtime are the fingerprint",
        "rsync's quick check: an edit of equal length within the clock's tick, or with mtime restored",
        lambda: [
            (
                FileStat,
                "fingerprint",
                property(lambda self: (0, 0, self.size, self.mtime_ns, 0)),
            )
        ],
    ),
    Mutant(
        "a scan with holes is taken for whole",
        "a directory that cannot be listed, or changes while it is listed, read as so many deletions",
        lambda: [instead(Scanner, "scan", _scan_with_holes_is_whole)],
    ),
    Mutant(
        "a scan torn by a swap is taken for whole",
        "directory listings beside a ConfigMap's or git-sync's swap: half of the old, half of the new",
        lambda: [instead(Scanner, "scan", _torn_is_whole)],
    ),
    Mutant(
        "an outage of the source is taken for deletion",
        "GitOps controllers that prune everything when the repository or the mount is gone",
        lambda: [instead(Scanner, "scan", _no_directory_is_an_empty_one)],
    ),
    Mutant(
        "the first directory is held on to",
        "watches by inode: the directory is deleted and made anew, and the node looks at its ghost",
        lambda: [instead(Scanner, "scan", _keeps_to_the_first_directory)],
    ),
    Mutant(
        "absence needs no proof",
        "`kubectl apply --prune`-like sweeps: not seen once is gone",
        lambda: [
            (Tracking, "is_certain", lambda self, *arguments: True),
            (Tracking, "doubt_of_absence", lambda self, model_id: None),
        ],
    ),
    Mutant(
        "what is being deleted is pruned piece by piece",
        "an `rm -rf` in progress that stays below every threshold for mass deletion",
        lambda: [
            (
                Tracking,
                "is_certain",
                lambda self, scan, now, settle_s: (
                    scan.complete and self._run.settled(now, settle_s)
                ),
            )
        ],
    ),
    Mutant(
        "the prune guard is ignored",
        "Argo CD and Flux without their deletion safeguards: an empty commit empties the cluster",
        lambda: [(Absence, "_is_too_much", lambda self, missing, managed: False)],
    ),
    Mutant(
        "a confirmation's digest is not compared",
        "`--force` flags: confirmed for one set of things, used up by another",
        lambda: [
            instead(Absence, "decide", _any_digest_will_do),
            (Orders, "confirm_prune", _confirms_blindly),
        ],
    ),
    Mutant(
        "one broken file holds up all others",
        "configurations that are valid as a whole or not at all: one team's typo stops everybody's rollout",
        lambda: [instead(Acceptance, "_judge", _held_while_others_are_broken)],
    ),
    Mutant(
        "in a conflict the last writer wins",
        "controllers that fight over one object declared twice, each overwriting the other",
        lambda: [instead(acceptance, "judge", _last_writer_wins)],
    ),
    Mutant(
        "an invalid file declares nothing",
        "kubelet's static pods: a typo in the manifest stops the pod",
        lambda: [instead(TrackedFile, "_take", _invalid_is_empty)],
    ),
    Mutant(
        "backups and temporary files are read",
        "include directories (`conf.d/*`): the editor's `a.yaml~` is served beside a.yaml",
        lambda: [(scanner, "MODEL_SUFFIXES", (".yaml", ".yml", "~", ".bak", "#", "4913"))],
    ),
    Mutant(
        "links are not followed",
        "a ConfigMap volume or a git-sync checkout, which consist of links, looks empty",
        lambda: [(scanner._Walk, "_follow", lambda self, path: None)],
    ),
    Mutant(
        "another file or line is another version",
        "deployments rolled because a comment, a label or a file name changed",
        lambda: [instead(Acceptance, "_accept", _another_line_is_another_version)],
    ),
    Mutant(
        "a suspended model follows its file",
        "Flux's suspend on the parent only: the child is reconciled all the same",
        lambda: [instead(DesiredSource, "look", _suspension_is_not_told)],
    ),
    Mutant(
        "a restart forgets generations",
        "observedGeneration that starts at 1 again, so that one number means two specs",
        lambda: [instead(Acceptance, "restore", _forgets_generations)],
    ),
    Mutant(
        "what was accepted before the restart is loaded first",
        "caches trusted before the first sync: the deleted object comes back for a moment",
        lambda: [instead(Acceptance, "restore", _kept_is_desired)],
    ),
    Mutant(
        "weights count as soon as they are there",
        "a model directory picked up while it is being copied",
        lambda: [instead(weights._Source, "look", _weights_count_at_once)],
    ),
    Mutant(
        "weights that change while they are read are served",
        "a mapped checkpoint rewritten in place: one model of two versions",
        lambda: [(ModelReader, "_check_unchanged", lambda self, spec: None)],
    ),
)
