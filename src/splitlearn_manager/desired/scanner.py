"""What lies in the desired directory at one moment: a listing, and how far it can be trusted.

A scan lists names and fingerprints. It never reads a file, never decides what is desired, and never
raises for what the file system does: whatever could not be looked at is part of the result, because a
listing with holes must not be taken for deletions. All that one scan leaves to the next are the entries
of untouched files, which are then the very same objects.

    complete      every directory was listed, and every file in it was looked at
    not complete  something was missing, unreadable or changing; the files that were seen are listed
    root is None  the directory itself could not be listed: nothing at all is known

Names that start with `.` are skipped, `*.yaml` and `*.yml` are kept, symbolic links are followed. A
directory is visited once however many links lead to it, so loops end and nothing conflicts with itself.
Cost: one listing and one stat a directory, one stat a file and a link; no more than that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from splitlearn_manager.config.files import DirEntry, FileStat, FileSystem

Fingerprint = tuple[int, int, int, int, int]
"""dev, inode, size, mtime_ns, ctime_ns: two that are equal mean an untouched file."""

SERVER_FILE = "server.yaml"
MODEL_SUFFIXES = (".yaml", ".yml")

# ELOOP: a link that leads to itself. ESTALE: what a network file system says of a deleted file.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as the scan saw it.

    Attributes:
        path: relative to the root, with `/`.
        fingerprint: None where the file could not be looked at; `error` then says why.
        error: for a person.
        dangling: a link that leads nowhere, so there is no content at all behind the name.
    """

    path: str
    fingerprint: Fingerprint | None
    error: str | None = None
    dangling: bool = False


@dataclass(frozen=True)
class Scan:
    """One look at the directory.

    Attributes:
        complete: nothing was missed; only such a scan can say that a file is absent.
        files: model files by relative path.
        error: the first thing that was wrong, for a person; None when complete.
        server: `server.yaml` at the root, which is no model file.
        root: (dev, inode) of the directory; None when it could not be listed.
        torn: something changed while it was looked at, so a look soon after helps.
        unreadable: directories that could not be listed, with the reason.
        dangling: links, other than model files, that lead nowhere: there may have been files below.
        links: every link that was met, for whoever watches what is behind them.
    """

    complete: bool
    files: Mapping[str, FileEntry]
    error: str | None = None
    server: FileEntry | None = None
    root: tuple[int, int] | None = None
    torn: bool = False
    unreadable: Mapping[str, str] = field(default_factory=dict)
    dangling: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


def describe(error: OSError) -> str:
    """An operating system's error in a few words, without its number and path."""
    return error.strerror or type(error).__name__


def printable(path: str) -> str:
    """A path for messages: names that are not UTF-8 would make printing them fail."""
    if path.isascii():
        return path
    return path.encode("utf-8", "backslashreplace").decode()


def is_gone(error: OSError) -> bool:
    """Whether the error says that nothing is there, rather than that it cannot be looked at."""
    return error.errno in _GONE


class Scanner:
    """Lists one directory.

    Args:
        root: the desired directory; it need not exist.
        fs: the file system's calls.
    """

    def __init__(self, root: str | Path, fs: FileSystem) -> None:
        self._root = os.fspath(root)
        self._fs = fs
        self._last: Mapping[str, FileEntry] = {}

    def scan(self) -> Scan:
        """Look once. Never raises OSError; see `Scan` for what could not be seen."""
        try:
            before = self._fs.stat(self._root)
            if not before.is_dir:
                return _unavailable(f"{self._root} is not a directory")
            walk = _Walk(self._fs, self._root, before, self._last)
            walk.run()
        except OSError as error:
            if is_gone(error):
                return _unavailable(f"{self._root} does not exist")
            return _unavailable(f"{self._root} cannot be read: {describe(error)}")
        try:
            after = self._fs.stat(self._root)
        except OSError:
            walk.torn = f"{self._root} vanished while it was being read"
        else:
            if _identity(after) != _identity(before):
                walk.torn = f"{self._root} was replaced while it was being read"
        self._last = walk.files
        return walk.result(_identity(before))


class _Walk:
    """One pass over the tree: the real directories first, then what links add to them."""

    def __init__(
        self, fs: FileSystem, root: str, stat: FileStat, last: Mapping[str, FileEntry]
    ) -> None:
        self._fs = fs
        self._root = root
        self._last = last
        self._visited = {_identity(stat)}
        self._linked: list[str] = []
        self.files: dict[str, FileEntry] = {}
        self.server: FileEntry | None = None
        self.torn: str | None = None
        self.unreadable: dict[str, str] = {}
        self.dangling: list[str] = []
        self.links: list[str] = []

    def run(self) -> None:
        """Raises OSError only for the root itself."""
        self._descend("", self._fs.list_dir(self._root))
        while self._linked:
            # Sorted, so that of several links to one directory the same one always counts.
            self._linked.sort(reverse=True)
            self._enter(self._linked.pop())

    def result(self, root: tuple[int, int]) -> Scan:
        errors = [
            f"{printable(path)} cannot be read: {why}"
            for path, why in sorted(self.unreadable.items())
        ]
        if self.torn:
            errors.append(self.torn)
        return Scan(
            complete=not errors,
            files=self.files,
            error=errors[0] if errors else None,
            server=self.server,
            root=root,
            torn=self.torn is not None,
            unreadable=self.unreadable,
            dangling=tuple(sorted(self.dangling)),
            links=tuple(sorted(self.links)),
        )

    def _descend(self, directory: str, entries: Iterable[DirEntry]) -> None:
        """Raises OSError where this very directory cannot be listed, to its end."""
        below = f"{directory}/" if directory else ""
        directories = []
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_symlink:
                self._follow(below + name)
            elif entry.is_dir:
                directories.append(below + name)
            elif name.endswith(MODEL_SUFFIXES):
                self._look(below + name, entry.stat)
        # Sorted: of several ways to one directory (a mount can make two) the same one always counts.
        for path in sorted(directories):
            self._enter(path)

    def _enter(self, path: str) -> None:
        try:
            stat = self._fs.stat(self._absolute(path))
            if _identity(stat) in self._visited:
                return
            self._visited.add(_identity(stat))
            self._descend(path, self._fs.list_dir(self._absolute(path)))
        except OSError as error:
            if is_gone(error):
                self.torn = f"{printable(path)} vanished while it was being read"
            else:
                self.unreadable[path] = describe(error)

    def _follow(self, path: str) -> None:
        self.links.append(path)
        is_model = path.endswith(MODEL_SUFFIXES)
        try:
            stat = self._fs.stat(self._absolute(path))
        except OSError as error:
            dangling = is_gone(error)
            if is_model:
                why = "the link leads nowhere" if dangling else describe(error)
                self._add(FileEntry(path, None, why, dangling))
            elif dangling:
                self.dangling.append(path)
            else:
                self.unreadable[path] = describe(error)
        else:
            if stat.is_dir:
                self._linked.append(path)
            elif is_model:
                self._add_file(path, stat)

    def _look(self, path: str, stat: FileStat | None) -> None:
        try:
            stat = stat or self._fs.stat(self._absolute(path))
        except OSError as error:
            if is_gone(error):
                self.torn = f"{printable(path)} vanished while it was being read"
            else:
                self._add(FileEntry(path, None, describe(error)))
        else:
            if stat.is_dir:
                self.torn = f"{printable(path)} was replaced while it was being read"
            else:
                self._add_file(path, stat)

    def _add_file(self, path: str, stat: FileStat) -> None:
        found, last = stat.fingerprint, self._last.get(path)
        if last is not None and last.fingerprint == found and last.error is None:
            self._add(last)
        else:
            self._add(FileEntry(path, found))

    def _add(self, entry: FileEntry) -> None:
        if entry.path == SERVER_FILE:
            self.server = entry
        else:
            self.files[entry.path] = entry

    def _absolute(self, path: str) -> str:
        return os.path.join(self._root, path)


def _identity(stat: FileStat) -> tuple[int, int]:
    return (stat.dev, stat.inode)


def _unavailable(error: str) -> Scan:
    return Scan(complete=False, files={}, error=error)
