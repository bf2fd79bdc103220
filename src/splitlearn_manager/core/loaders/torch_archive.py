"""Reads the members of a torch archive straight into memory, and knows which tensors they are.

torch.save writes zip archives whose members are not compressed, one for each storage. So a storage's bytes
lie in one piece in the file, and are read from there into the place where they will stay. torch's own reader
does not compare checksums; this one does, while the bytes pass by, and once for a file that stays as it is.

Which tensors a state dict has is read by `config.archive_pickle`, which runs nothing.
"""

from __future__ import annotations

import os
import pickle
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

from splitlearn_manager.config.archive_pickle import (
    PickleReader,
    TensorReference,
    UnknownStorage,
    state_dict_in,
)
from splitlearn_manager.core.loaders.file_format import corrupt
from splitlearn_manager.core.loaders.own_memory import PIECE_BYTES, StoredTensor, contiguous_stride

MAX_PICKLE_BYTES = 256 * 2**20
"""The largest description that is read; no model needs as much."""

STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
"""What the class of a storage is called in a pickle, without the ending `Storage`."""

_MOST_REMEMBERED = 4096
"""Files whose checked members are remembered."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_UTF_8 = 0x800


class CheckedMembers:
    """Members whose checksums were right, by the file as it was; safe to use from several threads.

    A file that was read before is read again when its model comes back. As long as nobody has changed it
    (device, inode, size, times of the last change), what was right is right, and need not cost as much as
    the reading itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: OrderedDict[tuple[int, ...], set[str]] = OrderedDict()

    def has(self, file: tuple[int, ...], name: str) -> bool:
        """Whether the member's checksum was right in just this file."""
        with self._lock:
            return name in self._members.get(file, ())

    def add(self, file: tuple[int, ...], name: str) -> None:
        """The member's checksum is right."""
        with self._lock:
            self._members.setdefault(file, set()).add(name)
            self._members.move_to_end(file)
            if len(self._members) > _MOST_REMEMBERED:
                self._members.popitem(last=False)


CHECKED = CheckedMembers()
"""One for the process, for all archives."""


def _identity(descriptor: int) -> tuple[int, ...]:
    stat = os.fstat(descriptor)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class TorchArchive:
    """An archive that is open for reading, until `close`.

    Raises:
        LoadError: it is cut off or damaged (reason `CorruptCheckpoint`); so do all methods.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._identity = _identity(self._file.fileno())
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            self._file.close()
            raise self._damaged(error) from error
        self._members = {info.filename: info for info in self._zip.infolist()}
        described = (name for name in self._members if name.endswith("/data.pkl"))
        self._root = next(described, "").rpartition("/")[0]
        self._sources: dict[str, Member] = {}

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read any more."""
        self._zip.close()
        self._file.close()

    def size(self, name: str) -> int | None:
        """Bytes of a member, `data.pkl` say; None if there is none of that name."""
        info = self._members.get(f"{self._root}/{name}")
        return None if info is None else info.file_size

    def read(self, name: str) -> bytes:
        """All of a small member; KeyError if there is none of that name."""
        info = self._members[f"{self._root}/{name}"]
        data = bytearray(info.file_size)
        member = Member(self, info)
        member.read(memoryview(data), 0)
        member.ensure_intact()
        return bytes(data)

    def storage(self, key: str) -> Member | None:
        """The bytes of a storage; None if it is not in the archive."""
        info = self._members.get(f"{self._root}/data/{key}")
        if info is None:
            return None
        return self._sources.setdefault(key, Member(self, info))

    @property
    def is_little_endian(self) -> bool:
        """As nearly all machines are that torch runs on; an archive that does not say is too."""
        size = self.size("byteorder")
        return size is None or (size == len(b"little") and self.read("byteorder") == b"little")

    def state_dict(self) -> dict[str, StoredTensor] | None:
        """The tensors of the state dict that the archive holds; None if it holds something else.

        Names that stand for the same tensor have the same `StoredTensor`.
        """
        size = self.size("data.pkl")
        if size is None or size > MAX_PICKLE_BYTES or not self.is_little_endian:
            return None
        try:
            loaded = PickleReader(self.read("data.pkl")).load()
        except _UNREADABLE:
            return None
        found = state_dict_in(loaded, lambda value: isinstance(value, TensorReference))
        if found is None:
            return None
        made: dict[TensorReference, StoredTensor | None] = {}
        tensors: dict[str, StoredTensor] = {}
        for name, reference in found.items():
            stored = made.setdefault(reference, self._stored(reference))
            if stored is None:
                return None
            tensors[name] = stored
        return tensors

    def _stored(self, reference: TensorReference) -> StoredTensor | None:
        dtype = STORAGE_DTYPES.get(reference.storage.kind.removesuffix("Storage"))
        source = self.storage(reference.storage.key)
        if dtype is None or source is None or reference.place is None:
            return None
        offset, shape, stride = reference.place
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (offset + reach) * dtype.itemsize > source.size:
            return None
        in_order = all(
            n == 1 or step == own
            for n, step, own in zip(shape, stride, contiguous_stride(shape), strict=True)
        )
        start = offset * dtype.itemsize
        return StoredTensor(dtype, shape, source, start, None if in_order else stride)

    def _damaged(self, error: object) -> Exception:
        return corrupt(self.path, f"is cut off or damaged ({error})")


_UNREADABLE = (
    UnknownStorage,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    MemoryError,
    RecursionError,
    OverflowError,
)


class Member:
    """One member's bytes; a `ByteSource`. Used by one thread.

    The checksum is kept up as long as the bytes are asked for in order. One that is 0 means that the archive
    was written without checksums.
    """

    def __init__(self, archive: TorchArchive, info: zipfile.ZipInfo) -> None:
        self.size = info.file_size
        self._archive = archive
        self._info = info
        self._data_start: int | None = None
        self._stream = (
            None if info.compress_type == zipfile.ZIP_STORED else _Unpacked(archive, info)
        )
        self._checked_to = 0
        self._checksum = 0
        self._intact = info.CRC == 0 or CHECKED.has(archive._identity, info.filename)

    def read(self, target: memoryview, start: int) -> None:
        """Fill `target` with the bytes from `start` on."""
        if self._stream is not None:
            self._stream.read(target, start)
        else:
            self._read(target, start)
        if self._intact:
            return
        if start == 0:
            self._checked_to = self._checksum = 0
        if start == self._checked_to:
            self._checksum = zlib.crc32(target, self._checksum)
            self._checked_to += len(target)

    def ensure_intact(self) -> None:
        """Compare the checksum; reads what was not read in order again."""
        if self._intact:
            return
        if self._checked_to != self.size:
            buffer = memoryview(bytearray(min(PIECE_BYTES, self.size)))
            for start in range(0, self.size, PIECE_BYTES):
                self.read(buffer[: min(PIECE_BYTES, self.size - start)], start)
        if self._checksum != self._info.CRC:
            raise self._archive._damaged(f"{self._info.filename} has another checksum")
        self._intact = True
        # What was changed under the reading was not read as the file that it is now.
        if _identity(self._archive._file.fileno()) == self._archive._identity:
            CHECKED.add(self._archive._identity, self._info.filename)

    def _read(self, target: memoryview, start: int) -> None:
        file = self._archive._file
        try:
            if self._data_start is None:
                self._data_start = self._find_data()
            file.seek(self._data_start + start)
            if file.readinto(target) != len(target):
                raise EOFError(f"{self._info.filename} ends too early")
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._archive._damaged(error) from error

    def _find_data(self) -> int:
        """Where the bytes begin: behind a header of their own, whose length the directory does not say."""
        file, info = self._archive._file, self._info
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or info.flag_bits & _ENCRYPTED:
            raise zipfile.BadZipFile(f"{info.filename} cannot be read")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        encoding = "utf-8" if info.flag_bits & _UTF_8 else "cp437"
        name = file.read(name_length).decode(encoding, "replace")
        if signature != b"PK\x03\x04" or name != info.orig_filename:
            raise zipfile.BadZipFile(f"{info.filename} is not where the directory says")
        return int(info.header_offset + len(header) + name_length + extra_length)


class _Unpacked:
    """A compressed member, which can only be read in order; going back begins anew."""

    def __init__(self, archive: TorchArchive, info: zipfile.ZipInfo) -> None:
        self._archive = archive
        self._info = info
        self._at = 0
        self._open: IO[bytes] | None = None

    def read(self, target: memoryview, start: int) -> None:
        try:
            if self._open is None or start < self._at:
                self._open = self._archive._zip.open(self._info)
                self._at = 0
            while self._at < start:
                self._at += len(self._some(self._open, start - self._at))
            done = 0
            while done < len(target):
                some = self._some(self._open, len(target) - done)
                target[done : done + len(some)] = some
                done += len(some)
            self._at += done
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise self._archive._damaged(error) from error

    def _some(self, member: IO[bytes], wanted: int) -> bytes:
        data = member.read(min(wanted, PIECE_BYTES))
        if not data:
            raise EOFError(f"{self._info.filename} ends too early")
        return data
