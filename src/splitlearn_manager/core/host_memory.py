"""How much memory this machine has, and how much of it is used, as this process may use it.

In a container the kernel ends a process that exceeds its control group's limit, however much memory
the machine has. So the limits of the process's own control group and of all above it count, in
version 1 and version 2 of that interface, and used is what is used of the tightest. Page cache that
the kernel would give back at once does not count as used. A limit on the process's address space
(`ulimit -v`) counts like one on memory: what exceeds it is refused.

Reads files and decides; keeps nothing, and never fails: what is not there limits nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
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
class MemoryLimit:
    """A limit that this process stands under, alone or with others, and what is used of it."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class _Interface:
    """Where one version of the interface keeps what we read."""

    folder: str
    limits: tuple[str, ...]
    usage: str
    inactive: str
    active: str
    mapped: str
    shared: str


_V1 = _Interface(
    "memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "total_active_file",
    "total_mapped_file",
    "total_shmem",
)
# Above memory.high processes are slowed down until they stand still, so it is as good as a limit.
_V2 = _Interface(
    "",
    ("memory.max", "memory.high"),
    "memory.current",
    "inactive_file",
    "active_file",
    "file_mapped",
    "shmem",
)
_PROC_CGROUP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


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


def memory_limits() -> tuple[MemoryLimit, ...]:
    """All limits that this process stands under."""
    own = address_space_limit()
    return cgroup_limits() if own is None else (*cgroup_limits(), own)


def cgroup_limits(
    proc_cgroup: Path = _PROC_CGROUP, mount: Path = _MOUNT
) -> tuple[MemoryLimit, ...]:
    """The limits of control groups, from the process's own up to the root; none off Linux."""
    levels = _levels(proc_cgroup, mount)
    limits = (_limit_of(group, interface) for interface, group in levels)
    return tuple(limit for limit in limits if limit is not None)


def address_space_limit() -> MemoryLimit | None:
    """What `ulimit -v` allows this process; None without such a limit, and off Linux."""
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError):
        return None
    return MemoryLimit(limit, int(pages) * os.sysconf("SC_PAGE_SIZE"))


def memory_stall(proc_cgroup: Path = _PROC_CGROUP, mount: Path = _MOUNT) -> float | None:
    """For how much of the last 10 s some process of the own control group waited for memory, in percent.

    None where that is not measured: only version 2 of the interface has it.
    """
    for interface, group in _levels(proc_cgroup, mount):
        if interface is not _V2:
            continue
        try:
            text = (group / "memory.pressure").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        return _stalled_percent(text)
    return None


def host_memory(
    physical_bytes: int, available_bytes: int, limits: Iterable[MemoryLimit]
) -> HostMemory:
    """What the process may use: of the machine's memory, no more than the tightest limit."""
    total, free = physical_bytes, available_bytes
    for limit in limits:
        total = min(total, limit.limit_bytes)
        free = min(free, limit.limit_bytes - limit.used_bytes)
    return HostMemory(total / BYTES_PER_MB, max(0, min(free, total)) / BYTES_PER_MB)


def _levels(proc_cgroup: Path, mount: Path) -> Iterator[tuple[_Interface, Path]]:
    """The folders of the groups that the process is in, its own first."""
    try:
        groups = memory_groups(proc_cgroup.read_text(encoding="utf-8"))
    except OSError:
        return
    for interface, path in groups:
        root = mount / interface.folder
        # A container sees its own group as the root of the mount, and may be told a path on the
        # host that is not there: the levels that cannot be read are skipped.
        parts = () if ".." in path.parts else path.parts[1:]
        for depth in range(len(parts), -1, -1):
            yield interface, root.joinpath(*parts[:depth])


def _limit_of(group: Path, interface: _Interface) -> MemoryLimit | None:
    set_ = [n for name in interface.limits if (n := _number(group / name)) is not None]
    usage = _number(group / interface.usage)
    if not set_ or usage is None:
        return None
    return MemoryLimit(min(set_), max(0, usage - _reclaimable(group / "memory.stat", interface)))


def _stalled_percent(text: str) -> float | None:
    """`avg10` of the line `some avg10=0.12 avg60=…`."""
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind != "some":
            continue
        for field in fields:
            name, _, value = field.partition("=")
            if name == "avg10":
                try:
                    return float(value)
                except ValueError:
                    return None
    return None


def _number(path: Path) -> int | None:
    """The number in the file; None if there is none, or it says `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _reclaimable(path: Path, interface: _Interface) -> int:
    """Bytes of page cache that are not in use at this moment.

    Files that were read more than once (models that come back) are on the active list and given back
    like the others; what programs have mapped, their code for one, would be missed at once.
    """
    stat = _numbers(path)
    inactive = stat.get(interface.inactive, 0)
    mapped = max(0, stat.get(interface.mapped, 0) - stat.get(interface.shared, 0))
    return max(inactive, inactive + stat.get(interface.active, 0) - mapped)


def _numbers(path: Path) -> Mapping[str, int]:
    """The lines `name number` of a file; none if it cannot be read."""
    found = {}
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            found[name] = int(value)
    except (OSError, ValueError):
        return {}
    return found
