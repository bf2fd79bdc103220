"""Where the record of a node is kept: a few small files, each old or new, never half.

    node.json              whose models they are, what people confirmed, and which are leaving
    models-00.json …       the models, spread over 64 files by their ids

`save` writes what differs from what it wrote last, so one edit in a directory of thousands writes one
file. Models that leave together leave together, however many files they are in: they are named in
`node.json` before the first of those files is written.

What cannot be read is reported, copied aside (`NAME.unreadable`) and then done without; a file that a
newer version wrote is reported and left alone. The files may be deleted at any time: `recheck` notices,
and the next `save` writes them anew. Nothing here decides what is worth keeping.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from splitlearn_manager.config.files import write_atomically
from splitlearn_manager.reconcile.record import (
    ModelRecord,
    NodeRecord,
    OtherVersion,
    Record,
    Unreadable,
    models_from_text,
    models_to_text,
    node_from_text,
    node_to_text,
    same_record,
)

NODE = "node.json"
SHARDS = 64
_ASIDE = ".unreadable"
_UNFINISHED = ".tmp"


class StateFiles(Protocol):
    """Named files that are read and written whole. Every call may raise OSError."""

    def names(self) -> list[str]:
        """The files that there are, in any order."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replaces the content; a crash at any moment leaves the old or the new one, whole."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file; without effect if there is none."""
        ...


class DirectoryFiles:
    """The files of one directory, which is made when the first of them is written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        try:
            return os.listdir(self._path)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self._path / name
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            # In the name of the file that people know, and not of a temporary one.
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class Store:
    """See the module's text. Used by one thread.

    Args:
        directory: the desired directory whose models these are. What was kept for another one is done
            without; empty takes whatever is there.

    Attributes:
        left_alone: names of files that a newer version wrote: nothing is kept in them.
    """

    def __init__(self, files: StateFiles, directory: str = "") -> None:
        self._files = files
        self._directory = directory
        self._kept: dict[str, ModelRecord] = {}  # what is on the disk, as far as is known
        self._written: set[str] = set()  # the files that models are in
        self._node = NodeRecord()
        self._stale: set[str] = set()  # files that are written whatever is in them
        self._aside: dict[str, bytes] = {}  # what could not be read, to be copied aside
        self.left_alone: frozenset[str] = frozenset()

    def load(self) -> tuple[Record, tuple[str, ...]]:
        """What was kept, and for people what of it could not be read. Writes nothing."""
        complaints: list[str] = []
        models: dict[str, ModelRecord] = {}
        try:
            names = [n for n in sorted(self._files.names()) if n == NODE or n in _SHARD_NAMES]
        except OSError as error:
            return Record(), (f"cannot be read: {_why(error)}; everything is decided anew",)
        for name in names:
            try:
                data = self._files.read(name)
            except OSError as error:
                complaints.append(f"{name} cannot be read: {_why(error)}; it is done without")
                self._stale.add(name)
                continue
            try:
                if name == NODE:
                    self._node = node_from_text(data)
                else:
                    found, problems = models_from_text(data)
                    models.update(found)
                    if problems:
                        complaints += [f"{name}: {p}; it is done without" for p in problems]
                        self._aside[name] = data
            except OtherVersion as version:
                self.left_alone |= {name}
                complaints.append(
                    f"{name} was written by a newer version of this program (format {version}): it is "
                    "left alone, so nothing is kept in it; start that version, or delete the file"
                )
            except Unreadable as error:
                complaints.append(f"{name}: {error}; it is done without")
                self._aside[name] = data
        self._stale |= self._aside.keys()
        self._kept = dict(models)
        self._written = {shard_of(model_id) for model_id in models}
        owner = self._node.directory
        if owner != self._directory and owner and self._directory:
            complaints.append(
                f"what is kept is that of {owner}, not of {self._directory}: it is done without"
            )
            self._stale.add(NODE)
            return Record(), tuple(complaints)
        for model_id in self._node.leaving:
            models.pop(model_id, None)
            self._stale.add(NODE)
        return Record(models, self._node.confirmed_prune), tuple(complaints)

    @property
    def pending(self) -> bool:
        """Whether a `save` of the same record again would write something."""
        return bool(self._stale - self.left_alone)

    def save(self, record: Record) -> None:
        """Writes what differs from what is kept.

        Raises:
            OSError: something could not be written; the next call tries it again.
        """
        self._set_aside()
        models = record.models
        gone = [model_id for model_id in self._kept if model_id not in models]
        changed = [m for m, wanted in models.items() if not self._is_kept(m, wanted)]
        dirty = {shard_of(model_id) for model_id in (*gone, *changed)} | self._stale - {NODE}
        node = NodeRecord(self._directory, record.confirmed_prune)
        spread = len({shard_of(model_id) for model_id in gone}) > 1
        if spread or node != self._node or NODE in self._stale:
            self._write_node(replace(node, leaving=tuple(sorted(gone))))
        self._write_shards(dirty - self.left_alone, models, gone)
        if NODE in self._stale:
            self._write_node(node)

    def recheck(self) -> None:
        """Looks which files are still there; the next `save` writes those that are not.

        Removes what a writer left behind that died while it wrote. Raises OSError if that fails.
        """
        there = set(self._files.names())
        for name in there:
            if name.startswith(".") and name.endswith(_UNFINISHED):
                self._files.remove(name)
        self._stale |= self._written - there
        if self._node != NodeRecord() and NODE not in there:
            self._stale.add(NODE)

    def _is_kept(self, model_id: str, wanted: ModelRecord) -> bool:
        kept = self._kept.get(model_id)
        if kept is wanted:
            return True
        if kept is None or not same_record(kept, wanted):
            return False
        self._kept[model_id] = wanted  # so that the other one need not be remembered
        return True

    def _write_shards(
        self, names: Iterable[str], models: Mapping[str, ModelRecord], gone: Iterable[str]
    ) -> None:
        """Writes these files, as many as can be; then raises the first error."""
        shards = {name: dict[str, ModelRecord]() for name in sorted(names)}
        for model_id, wanted in models.items() if shards else ():
            if (shard := shards.get(shard_of(model_id))) is not None:
                shard[model_id] = wanted
        failure: OSError | None = None
        for name, shard in shards.items():
            try:
                if shard:
                    self._files.write(name, models_to_text(shard))
                else:
                    self._files.remove(name)
            except OSError as error:
                failure = failure or error
                continue
            self._stale.discard(name)
            (self._written.add if shard else self._written.discard)(name)
            self._kept.update(shard)
            for model_id in gone:
                if shard_of(model_id) == name:
                    del self._kept[model_id]
        if failure is not None:
            raise failure

    def _write_node(self, node: NodeRecord) -> None:
        """Writes `node.json`; it stays to be written again until nothing leaves."""
        if NODE not in self.left_alone:
            self._stale.add(NODE)
            self._files.write(NODE, node_to_text(node))
        self._node = node
        if not node.leaving:
            self._stale.discard(NODE)

    def _set_aside(self) -> None:
        """Keeps a copy of what could not be read, for people: the files themselves are written anew."""
        while self._aside:
            name, data = self._aside.popitem()
            with contextlib.suppress(OSError):
                self._files.write(f"{name}{_ASIDE}", data)


def shard_of(model_id: str) -> str:
    """The name of the file that a model is kept in."""
    return f"models-{zlib.crc32(model_id.encode()) % SHARDS:02d}.json"


_SHARD_NAMES = frozenset(f"models-{number:02d}.json" for number in range(SHARDS))


def _why(error: OSError) -> str:
    return error.strerror or str(error)
