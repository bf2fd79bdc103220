"""Tensors between two processes of one machine by a file in memory, beside the call that is about them.

    client: writes the tensor ─► call with the file's name and size ─► server: reads it
    client: reads the answer  ◄─ response with a size ◄─ server: writes the answer behind it

The file belongs to the client, which makes it in `/dev/shm`, uses it for one request at a time, and removes
it. The request stays in it until it is answered, so that it can be made again. A client that was killed
removes nothing: each holds a lock on its files, and what nobody holds is removed by a later client.
The server copies from it and to it and maps nothing: a mapped file that its owner makes shorter kills whoever
reads it. Only files of the server's own user, with a name of this form, are touched, and only for calls that
came by a Unix socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from splitlearn_comm.core.errors import InvalidRequest

KEY = "shared_memory"
"""In a request's metadata: `NAME:BYTES`."""
DIRECTORY = Path("/dev/shm")
_VALUE = re.compile(r"(splitlearn-[0-9a-f]{32}):([0-9]{1,15})")
_NAMES = f"splitlearn-{'[0-9a-f]' * 32}"
_LEFT_S = 600.0
"""A file that nobody holds, and that was not written to for so long, is taken for left."""


def available() -> bool:
    """Whether this system has such files."""
    return DIRECTORY.is_dir()


def read(value: str, most_bytes: int) -> memoryview:
    """What a request says is in its file; the bytes are the caller's own.

    Args:
        value: as it stands in the metadata.
        most_bytes: what a message may have.

    Raises:
        InvalidRequest: if there is no such file, it is not as said, or too large.
    """
    name, size = _parsed(value)
    if size > most_bytes:
        raise InvalidRequest(f'metadata["{KEY}"]: {size} bytes; at most {most_bytes} are accepted')
    with _opened(name) as file:
        found = os.fstat(file).st_size
        if found < size:
            raise InvalidRequest(f'metadata["{KEY}"]: {name} has {found} bytes, not {size}')
        try:
            return _all_of(file, 0, size)
        except OSError as error:
            raise InvalidRequest(f'metadata["{KEY}"]: {name}: {error}') from None


def write(value: str, data: bytes | memoryview) -> int:
    """Put an answer behind its request; how many bytes it has.

    Raises:
        InvalidRequest: if the file is gone.
    """
    name, size = _parsed(value)
    with _opened(name) as file:
        _put(file, size, data)
    return len(data)


def remove_left() -> None:
    """Remove the files of this user's clients that are no more.

    Not at once: a client that somebody else has written may know nothing of locks.
    """
    for path in DIRECTORY.glob(_NAMES):
        with contextlib.suppress(OSError, InvalidRequest), _opened(path.name) as file:
            if time.time() - os.fstat(file).st_mtime < _LEFT_S:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class SharedFile:
    """A file of the client's own. Raises OSError where it cannot be made.

    In a process that was forked it is its parent's, and stays when it is closed.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._size = 0
        self._file = -1
        while self._file < 0 or not os.fstat(self._file).st_nlink:
            # Until it is locked another client may take it for one that was left, and remove it.
            if self._file >= 0:
                os.close(self._file)
            self.name = f"splitlearn-{secrets.token_hex(16)}"
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
            self._file = os.open(DIRECTORY / self.name, flags, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    @property
    def own(self) -> bool:
        """Whether this process has made it."""
        return self._owner == os.getpid()

    @property
    def said(self) -> str:
        """What a request's metadata says of it."""
        return f"{self.name}:{self._size}"

    def put(self, data: bytes | memoryview) -> str:
        """Write a request's tensor; what its metadata says of that."""
        self._size = len(data)
        _put(self._file, 0, data)
        return self.said

    def given(self) -> memoryview:
        """The request's tensor."""
        return _all_of(self._file, 0, self._size)

    def take(self, size: int) -> memoryview:
        """The answer. Raises OSError if it is not there."""
        found = os.fstat(self._file).st_size - self._size
        if not 0 <= size <= found:
            # Checked first, for room is made for what the server says.
            raise OSError(f"{self.name}: {found} bytes are there, not {size}")
        return _all_of(self._file, self._size, size)

    def close(self) -> None:
        """Remove it. A second call does nothing."""
        if self._file >= 0:
            if self.own:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(DIRECTORY / self.name)
            os.close(self._file)
            self._file = -1


def _parsed(value: str) -> tuple[str, int]:
    match = _VALUE.fullmatch(value)
    if match is None:
        raise InvalidRequest(f'metadata["{KEY}"]: expected NAME:BYTES, got {value[:80]!r}')
    return match[1], int(match[2])


@contextlib.contextmanager
def _opened(name: str) -> Iterator[int]:
    try:
        file = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidRequest(f'metadata["{KEY}"]: {name}: {error.strerror}') from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise InvalidRequest(f'metadata["{KEY}"]: {name} is no file of the server\'s user')
        yield file
    finally:
        os.close(file)


def _all_of(file: int, first: int, size: int) -> memoryview:
    view = memoryview(bytearray(size))
    at = 0
    while at < size:
        got = os.preadv(file, [view[at:]], first + at)
        if not got:
            raise OSError(f"{at} of {size} bytes are there")
        at += got
    return view


def _put(file: int, first: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    at = 0
    while at < len(view):
        at += os.pwrite(file, view[at:], first + at)
