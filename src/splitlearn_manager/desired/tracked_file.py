"""One file of the desired directory through its life: first seen, settled, read, changed, gone.

    seen ──► settled ──► read ──► seen (changed) ──► settled ──► read …
                                └► absent ──► gone for good (two complete scans agree)

A tracked file answers three questions about the models that it declares: which declarations stand
(`declarations`), which ids it declared last and may still declare (`kept`, while there is a `doubt`),
and whether it could declare an id that nobody declares any more (`could_declare`). It never decides
about a model: that takes all files together, and is the business of `acceptance`.

What counts is only ever read from a settled file, and only if its fingerprint is the same after the
reading as before. An unsettled file is peeked at once for each fingerprint: what it says is a hint at
which weights will be needed, for nothing more, since the writer may be half way through. Equal bytes are
parsed once: of a good file only their digest is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.scanner import FileEntry, Fingerprint, describe, is_gone, printable
from splitlearn_manager.desired.settle import Settling
from splitlearn_manager.desired.state import SourceRef

Read = Callable[[str], bytes]
"""The bytes of a file, by its relative path. May raise OSError."""

Stat = Callable[[str], Fingerprint]
"""The fingerprint of a file, by its relative path. May raise OSError."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One valid document of a model file.

    Attributes:
        mark: see `DesiredModel`.
    """

    config: ModelConfig
    spec_hash: str
    load_hash: str
    ref: SourceRef
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file says.

    Attributes:
        declarations: its valid documents; a model_id may occur twice.
        server: of `server.yaml`, the valid configuration.
        problems: what is wrong with the other documents.
        fault: why the reading is not the whole truth, as `is invalid`; None for a file without problems.
        invalid_ids: ids of documents that are not valid.
        data: of a faulty file, its bytes, to see which ids occur in it.
        opaque: nothing at all is known of the content.
    """

    declarations: tuple[Declaration, ...] = ()
    server: ServerConfig | None = None
    problems: tuple[Problem, ...] = ()
    fault: str | None = None
    invalid_ids: frozenset[str] = frozenset()
    data: bytes = b""
    opaque: bool = False


Parse = Callable[[str, bytes], Reading]
"""(relative path, bytes) → what they say. Never raises for what the bytes are."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a file's last declarations may not be its present ones.

    Attributes:
        why: for a person, beginning with the file's name.
        lasting: it takes a person to end it; otherwise the next looks will.
        absent: the file is not there; should that last, there is nothing left to doubt.
    """

    why: str
    lasting: bool
    absent: bool = False


NOTHING_READ = Reading()


@dataclass(frozen=True, slots=True)
class _Peek:
    entry: FileEntry
    digest: bytes
    reading: Reading


class TrackedFile:
    """A file that was seen once, until its absence is proven.

    Args:
        path: relative to the root.
        kept: what an earlier process knew it to declare.
    """

    __slots__ = (
        "_digest",
        "_in_sight",
        "_kept",
        "_last_entry",
        "_peek",
        "_read_entry",
        "_reading",
        "_settling",
        "name",
        "path",
    )

    def __init__(self, path: str, kept: Mapping[str, SourceRef] | None = None) -> None:
        self.path = path
        self.name = printable(path)
        self._settling: Settling[FileEntry | None] = Settling()  # None: absent
        self._in_sight = False
        self._last_entry: FileEntry | None = None
        self._read_entry: FileEntry | None = None
        self._reading = NOTHING_READ
        self._digest = b""
        self._peek: _Peek | None = None
        self._kept: Mapping[str, SourceRef] | None = kept  # None: what the reading declares

    # -- what the scans saw

    def remember(self, kept: Mapping[str, SourceRef]) -> None:
        """What an earlier process knew it to declare."""
        self._kept = kept

    def see(self, entry: FileEntry, now: float) -> None:
        """A scan listed the file."""
        self._in_sight = True
        self._last_entry = entry
        self._settling.look(entry, now)

    def miss(self, now: float, *, proves_absence: bool) -> None:
        """A scan did not list the file; a scan with holes proves nothing by that."""
        self._in_sight = proves_absence
        if proves_absence:
            self._settling.look(None, now)
        else:
            self.forget_absence()

    def forget_absence(self) -> None:
        """Looks at which the file was absent no longer count: the directory is another one now."""
        if self._settling.value is None:
            self._settling.forget()

    def settle(self, now: float, settle_s: float, read: Read, stat: Stat, parse: Parse) -> None:
        """Read the file if it has settled, or peek at it if it has not."""
        entry = self._settling.value
        if entry is None or not self._in_sight:
            return
        if not self._settling.settled(now, settle_s):
            if not self._is_current and entry.fingerprint is not None:
                self._peek_at(entry, read, parse)
        elif not self._is_current or self._reading.opaque:
            self._read(entry, now, read, stat, parse)

    # -- what follows from it

    @property
    def declarations(self) -> tuple[Declaration, ...]:
        """The declarations that stand: the file is as it was when it was read."""
        return self._reading.declarations if self._is_current else ()

    @property
    def reading(self) -> Reading | None:
        """The present reading; None while the file is in any state but the one that was read."""
        return self._reading if self._is_current else None

    @property
    def seen_at(self) -> float:
        """When the file was first seen as it is."""
        return self._settling.since

    @property
    def in_sight(self) -> bool:
        """The last scan either listed it or proves that it is not there."""
        return self._in_sight

    @property
    def was_seen(self) -> bool:
        """A scan listed it at least once in this process."""
        return self._last_entry is not None

    @property
    def is_at_rest(self) -> bool:
        """Another look would change nothing, unless it saw another file."""
        return self._is_current and not self._reading.opaque

    @property
    def is_faulty(self) -> bool:
        """The last reading was not the whole truth."""
        return self._reading.fault is not None

    @property
    def needs_parsing(self) -> bool:
        """What it says is not known yet, not even as a hint."""
        entry = self._settling.value
        if entry is None or entry.fingerprint is None or not self._in_sight or self._is_current:
            return False
        return self._peek is None or self._peek.entry != entry

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Of the last reading, which stands until there is another."""
        return self._reading.problems

    @property
    def kept(self) -> Mapping[str, SourceRef]:
        """The ids that the file declared when it was last known to be right."""
        if self._kept is not None:
            return self._kept
        return {found.config.model_id: found.ref for found in self._reading.declarations}

    @property
    def upcoming(self) -> tuple[Declaration, ...]:
        """What the file will declare if it settles as it is: a hint, never to be acted on."""
        if self._peek is None or self._is_current or self._peek.entry != self._settling.value:
            return ()
        return self._peek.reading.declarations

    @property
    def doubt(self) -> Doubt | None:
        """Why `kept` still counts; None when `declarations` is all that the file declares."""
        if not self._in_sight:
            return Doubt(f"{self.name} cannot be seen at the moment", lasting=False)
        if not self._settling.known:
            return Doubt(f"{self.name} vanished while it was being read", lasting=False)
        if self._settling.value is None:
            return Doubt(f"{self.name} is gone, for too short a time to be sure", False, True)
        if not self._is_current:
            return Doubt(f"{self.name} is still changing", lasting=False)
        if self._reading.fault:
            return Doubt(f"{self.name} {self._reading.fault}", lasting=True)
        return None

    @property
    def doubt_of_all(self) -> Doubt | None:
        """Why this file may declare just any id; None when it is known which ids it can mean.

        A file that is gone counts as it was, until its absence is proven: with it, the scans before did
        not agree about who declares what.
        """
        if not self._in_sight:
            return None
        if self._last_entry != self._read_entry:
            return self.doubt
        if self._reading.opaque:
            return Doubt(f"{self.name} {self._reading.fault}", lasting=True)
        return None

    def doubt_of(self, model_id: str) -> Doubt | None:
        """Why this file, which is invalid, may mean an id that no file is known to declare.

        It could mean the ids that occur in its bytes (zero bytes aside: UTF-16). All others it does not
        name, so a file that is never put right does not keep every model alive.
        """
        if not self._in_sight or self._last_entry != self._read_entry:
            return None
        if model_id in self._reading.invalid_ids or model_id.encode() in self._reading.data:
            why = f"{self.name} {self._reading.fault} and mentions it; correct that file"
            return Doubt(why, lasting=True)
        return None

    def is_proven_gone(self, now: float, settle_s: float) -> bool:
        """Two looks that could see it, at least `settle_s` apart, did not."""
        return self._settling.value is None and self._settling.settled(now, settle_s)

    @property
    def is_unsettled(self) -> bool:
        """The next look may see it settled, or its absence proven."""
        return self._in_sight and not self._is_current and self._is_known

    def pending_s(self, now: float, settle_s: float) -> float | None:
        """Seconds until a look may settle something about this file; None when nothing is open."""
        return self._settling.remaining_s(now, settle_s) if self.is_unsettled else None

    # -- reading

    @property
    def _is_known(self) -> bool:
        """Not `server.yaml` before there is one."""
        return self._settling.value is not None or self._last_entry is not None or bool(self._kept)

    @property
    def _is_current(self) -> bool:
        entry = self._settling.value
        return self._in_sight and entry is not None and entry == self._read_entry

    def _peek_at(self, entry: FileEntry, read: Read, parse: Parse) -> None:
        if self._peek is not None and self._peek.entry == entry:
            return
        try:
            data = read(self.path)
        except OSError:
            self._peek = None  # only a hint is lost; the reading that counts reports the error
            return
        digest = _digest(data)
        self._peek = _Peek(entry, digest, self._known(digest) or parse(self.path, data))

    def _known(self, digest: bytes) -> Reading | None:
        """What bytes with this digest say, if that was seen last.

        The bytes peeked at may be older than their fingerprint tells (two writes within one tick of the
        file system's clock), so only equal bytes save the parsing.
        """
        if digest == self._digest and not self._reading.opaque:
            return self._reading
        return self._peek.reading if self._peek and self._peek.digest == digest else None

    def _read(self, entry: FileEntry, now: float, read: Read, stat: Stat, parse: Parse) -> None:
        if entry.fingerprint is None:
            self._take(entry, self._unreadable(entry.error or "", opaque=not entry.dangling))
            return
        try:
            data = read(self.path)
            after = stat(self.path)
        except OSError as error:
            if is_gone(error):
                self._settling.forget()
            else:
                self._take(entry, self._unreadable(describe(error), opaque=True))
            return
        if after != entry.fingerprint:
            self._settling.look(FileEntry(self.path, after), now)
            return
        digest = _digest(data)
        self._take(entry, self._known(digest) or parse(self.path, data))
        self._digest = digest

    def _take(self, entry: FileEntry, reading: Reading) -> None:
        # A document that is missing from a faulty file may be the faulty one.
        before = self.kept if reading.fault else None
        self._read_entry = entry
        self._reading = reading
        self._digest = b""
        self._peek = None
        self._kept = None
        if before is not None:
            self._kept = {**before, **self.kept}

    def _unreadable(self, why: str, *, opaque: bool) -> Reading:
        message = f"cannot be read: {why}"
        problem = Problem(self.name, None, None, None, message)
        return Reading(problems=(problem,), fault=message, opaque=opaque)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
