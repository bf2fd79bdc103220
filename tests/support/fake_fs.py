"""A file system in memory, as treacherous as real ones: the FileSystem protocol without a disk.

Inode numbers are reused at once, ctime comes from a clock that stands still until `advance`, mtime can
be set to anything, links can dangle and loop, a write can stop half way, listings come in any order, and
any call can be made to fail. Paths are absolute and use `/`.
"""

from __future__ import annotations

import errno
import heapq
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from splitlearn_manager.config.files import DirEntry, FileStat

MAX_LINKS = 40


@dataclass
class _Node:
    inode: int
    kind: str  # file, dir or link
    mtime_ns: int
    ctime_ns: int
    data: bytes = b""
    target: str = ""
    children: dict[str, _Node] = field(default_factory=dict)


class FakeFileSystem:
    """See the module. `calls` counts list_dir, stat and read.

    Args:
        lists_stats: listings carry the files' stats, as those of a real disk do.
    """

    def __init__(self, *, lists_stats: bool = False) -> None:
        self.lists_stats = lists_stats
        self.now_ns = 1_000_000_000_000_000_000
        self.dev = 1
        self.calls = {"list_dir": 0, "stat": 0, "read": 0}
        self.order: Callable[[list[DirEntry]], list[DirEntry]] = lambda entries: entries
        self.before: Callable[[str, str], None] | None = None
        """Called with (call, path) before each call: the place to change things in mid-scan."""
        self._free: list[int] = []
        self._last_inode = 1
        self._root = _Node(1, "dir", self.now_ns, self.now_ns)
        self._faults: dict[str, int] = {}

    # -- the protocol

    def list_dir(self, path: str) -> list[DirEntry]:
        self._called("list_dir", path)
        node = self._follow(path)
        if node.kind != "dir":
            raise self._error(errno.ENOTDIR, path)
        entries = []
        for name, child in list(node.children.items()):
            leads_to_dir = child.kind == "dir"
            if child.kind == "link":
                try:
                    leads_to_dir = self._follow(f"{path}/{name}").kind == "dir"
                except OSError:
                    leads_to_dir = False
            stat = None
            if self.lists_stats and child.kind == "file" and not name.startswith("."):
                try:
                    stat = self.stat(f"{path}/{name}")
                except OSError:
                    stat = None
            entries.append(DirEntry(name, leads_to_dir, child.kind == "link", stat))
        return self.order(entries)

    def stat(self, path: str) -> FileStat:
        self._called("stat", path)
        node = self._follow(path)
        return FileStat(
            dev=self.dev,
            inode=node.inode,
            size=len(node.data),
            mtime_ns=node.mtime_ns,
            ctime_ns=node.ctime_ns,
            is_dir=node.kind == "dir",
        )

    def read(self, path: str, limit: int) -> bytes:
        self._called("read", path)
        node = self._follow(path)
        if node.kind == "dir":
            raise self._error(errno.EISDIR, path)
        return node.data[:limit]

    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self.read(path, sys.maxsize))

    # -- what the world does

    def advance(self, seconds: float) -> None:
        """Let time pass: only then do time stamps of later changes differ."""
        self.now_ns += int(seconds * 1e9)

    def mkdir(self, path: str) -> None:
        parent, name = self._parent(path)
        self._put(parent, name, self._new("dir"))

    def write(self, path: str, data: bytes) -> None:
        """Write in place: the inode stays, as with `>` in a shell."""
        parent, name = self._parent(path)
        node = parent.children.get(name)
        if node is not None and node.kind == "link":
            node = self._follow(path)
        if node is None:
            node = self._new("file")
            self._put(parent, name, node)
        node.data = data
        node.mtime_ns = node.ctime_ns = self.now_ns

    def append(self, path: str, data: bytes) -> None:
        self.write(path, self._follow(path).data + data)

    def replace(self, path: str, data: bytes) -> None:
        """Write beside and rename over: a new inode, as editors and our own writer do."""
        parent, name = self._parent(path)
        node = self._new("file")
        node.data = data
        old = parent.children.get(name)
        self._put(parent, name, node)
        if old is not None:
            self._release(old)

    def symlink(self, target: str, path: str) -> None:
        """Make or turn a link, atomically."""
        parent, name = self._parent(path)
        node = self._new("link")
        node.target = target
        old = parent.children.get(name)
        self._put(parent, name, node)
        if old is not None:
            self._release(old)

    def rename(self, old: str, new: str) -> None:
        source, old_name = self._parent(old)
        node = source.children.pop(old_name)
        target, new_name = self._parent(new)
        replaced = target.children.get(new_name)
        self._put(target, new_name, node)
        node.ctime_ns = self.now_ns
        if replaced is not None:
            self._release(replaced)

    def delete(self, path: str) -> None:
        """Delete a file, a link or a whole tree."""
        parent, name = self._parent(path)
        self._release(parent.children.pop(name))

    def touch(self, path: str, mtime_ns: int | None = None) -> None:
        """Set mtime, to any value; ctime becomes now, which no program can help."""
        node = self._follow(path)
        node.mtime_ns = self.now_ns if mtime_ns is None else mtime_ns
        node.ctime_ns = self.now_ns

    def fail(self, path: str, error: int) -> None:
        """Make each call for exactly this path fail with an errno, until `heal`."""
        self._faults[path] = error

    def heal(self, path: str) -> None:
        self._faults.pop(path, None)

    def exists(self, path: str) -> bool:
        try:
            self._follow(path)
        except OSError:
            return False
        return True

    def content(self, path: str) -> bytes:
        return self._follow(path).data

    # -- inside

    def _called(self, call: str, path: str) -> None:
        self.calls[call] += 1
        if self.before is not None:
            self.before(call, path)
        if path in self._faults:
            raise self._error(self._faults[path], path)

    def _new(self, kind: str) -> _Node:
        if self._free:
            inode = heapq.heappop(self._free)
        else:
            self._last_inode += 1
            inode = self._last_inode
        return _Node(inode, kind, self.now_ns, self.now_ns)

    def _put(self, parent: _Node, name: str, node: _Node) -> None:
        parent.children[name] = node

    def _release(self, node: _Node) -> None:
        heapq.heappush(self._free, node.inode)
        for child in node.children.values():
            self._release(child)

    def _parent(self, path: str) -> tuple[_Node, str]:
        directory, name = os.path.split(path)
        node = self._follow(directory)
        if node.kind != "dir":
            raise self._error(errno.ENOTDIR, directory)
        return node, name

    def _follow(self, path: str) -> _Node:
        node = self._root
        for name in path.split("/"):
            if not name:
                continue
            if node.kind != "dir":
                raise self._error(errno.ENOTDIR, path)
            child = node.children.get(name)
            if child is None or child.kind == "link":
                return self._follow_links(path)
            node = child
        return node

    def _follow_links(self, path: str) -> _Node:
        """As `_follow`, for a path with links or dots in it; raises for one that leads nowhere."""
        ahead = [part for part in path.split("/") if part]
        trail = [self._root]
        links = 0
        while ahead:
            name = ahead.pop(0)
            if name in (".", ".."):
                trail = trail[:-1] or trail if name == ".." else trail
                continue
            if trail[-1].kind != "dir":
                raise self._error(errno.ENOTDIR, path)
            child = trail[-1].children.get(name)
            if child is None:
                raise self._error(errno.ENOENT, path)
            if child.kind != "link":
                trail.append(child)
                continue
            links += 1
            if links > MAX_LINKS:
                raise self._error(errno.ELOOP, path)
            if child.target.startswith("/"):
                trail = [self._root]
            ahead = [part for part in child.target.split("/") if part] + ahead
        return trail[-1]

    def _error(self, number: int, path: str) -> OSError:
        return OSError(number, os.strerror(number), path)
