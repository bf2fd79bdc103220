"""The file-system calls that reading desired state needs, behind one small protocol.

`FileSystem` is the seam: the scanner, the acceptance of files and the look-up of weights call
nothing else, so a test replaces the disk by a fake. `RealFileSystem` is the disk.
`write_atomically` is how every file of ours is written: readers see the old
bytes or the new ones, never a half.

Nothing here interprets a file, keeps anything open, or retries: errors of the system come through
as `OSError`, for the caller knows what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as stat_module
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol


class FileStat(NamedTuple):
    """What identifies the content of a file, symlinks followed; sizes in bytes, times in ns."""

    dev: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    is_dir: bool

    @property
    def fingerprint(self) -> tuple[int, int, int, int, int]:
        """(dev, inode, size, mtime_ns, ctime_ns): equal until somebody writes to the file."""
        return self[:5]


class DirEntry(NamedTuple):
    """One name in a directory.

    Attributes:
        name: the bare name.
        is_dir: whether it is a directory, or a symlink that leads to one.
        is_symlink: whether the name itself is a symlink (dangling or not).
        stat: of a file, what `FileSystem.stat` would say; None where it would have to be asked (for
            directories, symlinks and names that begin with a dot), and where asking failed.
    """

    name: str
    is_dir: bool
    is_symlink: bool
    stat: FileStat | None = None


class FileSystem(Protocol):
    """Reading access to files. Every call may raise `OSError`."""

    def list_dir(self, path: str) -> Iterable[DirEntry]:
        """The names in a directory, in no particular order, one by one: a later one may raise too."""
        ...

    def stat(self, path: str) -> FileStat:
        """What `path` leads to, symlinks followed."""
        ...

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a regular file; ask for one more than you accept."""
        ...

    def open(self, path: str) -> BinaryIO:
        """A regular file, to be read here and there; whoever opened it closes it."""
        ...


class RealFileSystem:
    """The disk."""

    def list_dir(self, path: str) -> Iterator[DirEntry]:
        # Thousands that live at a time would set off garbage collections.
        with os.scandir(path) as entries:
            yield from map(_dir_entry, entries)

    def stat(self, path: str) -> FileStat:
        return _file_stat(os.stat(path))

    def read(self, path: str, limit: int) -> bytes:
        with self.open(path) as file:
            return file.read(limit)

    def open(self, path: str) -> BinaryIO:
        # O_NONBLOCK: opening a named pipe would otherwise wait for ever for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = open(descriptor, "rb")  # noqa: SIM115 - the caller closes it
        try:
            mode = os.fstat(descriptor).st_mode
            if stat_module.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat_module.S_ISREG(mode):
                raise OSError(errno.EINVAL, "Not a regular file", path)
        except BaseException:
            file.close()
            raise
        return file


def _file_stat(found: os.stat_result) -> FileStat:
    return FileStat(
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        stat_module.S_ISDIR(found.st_mode),
    )


def _dir_entry(entry: os.DirEntry[str]) -> DirEntry:
    is_symlink, is_dir = entry.is_symlink(), _leads_to_directory(entry)
    if is_symlink or is_dir or entry.name.startswith("."):
        return DirEntry(entry.name, is_dir, is_symlink)
    try:
        return DirEntry(entry.name, False, False, _file_stat(entry.stat(follow_symlinks=False)))
    except OSError:
        return DirEntry(entry.name, False, False)  # whoever asks for it gets the error


def _leads_to_directory(entry: os.DirEntry[str]) -> bool:
    # A symlink loop makes is_dir() raise; such a name leads nowhere, as a dangling one does.
    try:
        return entry.is_dir()
    except OSError:
        return False


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`; a crash at any moment leaves old or new, whole.

    A symlink stays a symlink: the file that it leads to is replaced. The mode of an existing file
    is kept. The temporary name begins with a dot, which a scanner of desired state skips.

    Raises:
        OSError: the directory cannot be written to, or the disk is full; `path` is then as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, stat_module.S_IMODE(os.stat(target).st_mode))
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
