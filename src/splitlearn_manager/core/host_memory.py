"""How much memory this machine has, and how much of it is used, as this process may use it.

In a container the kernel ends a process that exceeds its control group's limit, however much memory
the machine has. So the limits of the process's own control group and of all above it count, in
version 1 and version 2 of that interface, and used is what is used of the tightest. Page cache that
the kernel would give back at once does not count as used.

Reads files and decides; keeps nothing, and never fails: what is not there limits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

BYTES_PER_MB = 2**20


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in MB (2**20 bytes)."""

    total_mb: float
    free_mb: float

    @property
    def used_mb(self) -> float:
        return self.total_mb - self.free_mb

    @property
    def percent(self) -> float:
        """Used, of the total: 0 to 100."""
        return 100.0 * self.used_mb / self.total_mb


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """The memory limit of one control group, and what its processes use of it."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class _Interface:
    """Where one version of the interface keeps what we read."""

    folder: str
    limit: str
    usage: str
    cache: str


_V1 = _Interface("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Interface("", "memory.max", "memory.current", "inactive_file")


def memory_groups(proc_cgroup: str) -> list[tuple[_Interface, PurePosixPath]]:
    """The control groups that limit memory, from the text of /proc/self/cgroup.

    Lines are `number:controllers:path`; version 2 has number 0 and names no controllers.
    """
    groups = []
    for line in proc_cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            groups.append((_V2, PurePosixPath(path)))
        elif "memory" in controllers.split(","):
            groups.append((_V1, PurePosixPath(path)))
    return groups


def cgroup_limits(
    proc_cgroup: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> tuple[CgroupLimit, ...]:
    """The limits on this process, from its own group up to the root; none off Linux."""
    try:
        groups = memory_groups(proc_cgroup.read_text(encoding="utf-8"))
    except OSError:
        return ()
    limits = []
    for interface, path in groups:
        root = mount / interface.folder
        # A container sees its own group as the root of the mount, and may be told a path on the
        # host that is not there: the levels that cannot be read are skipped.
        parts = () if ".." in path.parts else path.parts[1:]
        for depth in range(len(parts), -1, -1):
            limit = _limit_of(root.joinpath(*parts[:depth]), interface)
            if limit is not None:
                limits.append(limit)
    return tuple(limits)


def host_memory(
    physical_bytes: int, available_bytes: int, limits: Iterable[CgroupLimit]
) -> HostMemory:
    """What the process may use: of the machine's memory, no more than the tightest limit."""
    total, free = physical_bytes, available_bytes
    for limit in limits:
        total = min(total, limit.limit_bytes)
        free = min(free, limit.limit_bytes - limit.used_bytes)
    return HostMemory(total / BYTES_PER_MB, max(0, min(free, total)) / BYTES_PER_MB)


def _limit_of(group: Path, interface: _Interface) -> CgroupLimit | None:
    limit = _number(group / interface.limit)
    usage = _number(group / interface.usage)
    if limit is None or usage is None:
        return None
    return CgroupLimit(limit, max(0, usage - _cache(group / "memory.stat", interface.cache)))


def _number(path: Path) -> int | None:
    """The number in the file; None if there is none, or it says `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _cache(path: Path, key: str) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0
