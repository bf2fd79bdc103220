"""Which real directories to watch so that no change of a path goes unnoticed. Decides, watches nothing.

The operating system watches directories, not paths: a watch on a symbolic link's target hears nothing
when the link is turned to another target, and a watch on a directory hears nothing once that directory
has been renamed away. So a path is taken apart into hops, and each directory in which a name decides
where the path leads is watched for that name:

    /srv/desired ─► /git/current ─► /git/rev-2      watch /srv for `desired`, /git for `current` and
                                                    `rev-2`, and /git/rev-2 with all below it

A path that does not exist is watched where it would first appear.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

MAX_HOPS = 40  # as many symbolic links as Linux follows

# Kinds of file system that other machines, or a program behind FUSE, change without the kernel's notice.
_UNHEARD = frozenset(
    {
        *("afs", "ceph", "cifs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"),
        *("9p", "beegfs", "glusterfs", "prl_fs", "vboxsf", "virtiofs"),
    }
)
_HEARD_FUSE = "fuse.fuse-overlayfs"  # the layers of a rootless container: local files


@dataclass(frozen=True)
class Watch:
    """One directory to watch.

    Attributes:
        directory: a real path, without symbolic links.
        identity: (dev, inode) at the time of planning.
        names: the names in it that matter; None for all of them and everything below.
    """

    directory: str
    identity: tuple[int, int]
    names: frozenset[str] | None


def plan_watches(root: str, others: Iterable[str] = ()) -> dict[str, Watch]:
    """The watches for `root` and all below it, and for other files and directories.

    Never raises for what the paths are: what does not exist is watched for at its nearest parent.
    """
    names: dict[str, set[str]] = {}
    trees: set[str] = set()
    for path in (root, *others):
        decisive, end = _follow(path)
        for directory, name in decisive:
            names.setdefault(directory, set()).add(name)
        if end is not None and os.path.isdir(end):
            trees.add(end)
    outer = {tree for tree in trees if not _is_below(tree, trees)}
    watches = {tree: _watch(tree, None) for tree in outer}
    for directory, found in names.items():
        if directory not in outer and not _is_below(directory, outer):
            watches[directory] = _watch(directory, frozenset(found))
    return {directory: watch for directory, watch in watches.items() if watch is not None}


def covering(watches: Iterable[str], needed: Iterable[str]) -> set[str]:
    """Those of the watched directories that `needed` ones are, or lie below."""
    found = set(watches)
    return {d for d in found if any(n == d or _is_below(n, {d}) for n in needed)}


def unheard_file_system(path: str, mountinfo: str) -> str | None:
    """The kind of file system that `path` lies on, if changes to it may go unnoticed; else None.

    Args:
        path: a real absolute path.
        mountinfo: the text of /proc/self/mountinfo.
    """
    best, kind = "", None
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if len(fields) < 10 or "-" not in fields:
            continue
        mount = fields[4].encode().decode("unicode_escape")
        at_or_below = path == mount or _is_below(path, {mount})
        # `>=`: of two mounts on one place, the later one is what is seen.
        if at_or_below and len(mount) >= len(best):
            best, kind = mount, fields[fields.index("-") + 1]
    if kind is None or kind == _HEARD_FUSE:
        return None
    return kind if kind in _UNHEARD or kind.split(".")[0] == "fuse" else None


def _follow(path: str) -> tuple[list[tuple[str, str]], str | None]:
    """The (directory, name) pairs that decide where `path` leads, and the real path that it ends at.

    The end is None where nothing exists; the last pair then is the first missing name.
    """
    decisive: list[tuple[str, str]] = []
    here, ahead, hops = "/", _parts(os.path.abspath(path)), 0
    while ahead:
        name = ahead.pop(0)
        if name == "..":
            here = os.path.dirname(here)
            continue
        there = os.path.join(here, name)
        try:
            is_link = stat.S_ISLNK(os.lstat(there).st_mode)
            target = os.readlink(there) if is_link else ""
        except OSError:
            return [*decisive, (here, name)], None
        if is_link or not ahead:
            decisive.append((here, name))
        if not is_link:
            here = there
            continue
        hops += 1
        if hops > MAX_HOPS:
            return decisive, None
        here = "/" if target.startswith("/") else here
        ahead = [*_parts(target), *ahead]
    return decisive, here


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _is_below(path: str, trees: Iterable[str]) -> bool:
    return any(path.startswith(tree.rstrip("/") + "/") for tree in trees)


def _watch(directory: str, names: frozenset[str] | None) -> Watch | None:
    try:
        found = os.stat(directory)
    except OSError:
        return None  # it went away between two calls; the next refresh plans anew
    return Watch(directory, (found.st_dev, found.st_ino), names)
