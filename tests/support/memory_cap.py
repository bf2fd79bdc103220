"""A limit on the memory of a process that a test starts: a control group, or its address space.

    with MemoryCap("cgroup", 900) as cap, Node(directory, launcher=cap.launcher) as node:
        …
        assert cap.kills() == 0

A group is made below the test's own, where the system permits that, and is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from splitlearn_manager.core.host_memory import BYTES_PER_MB, memory_groups
from support.waiting import eventually

CGROUP, ADDRESS_SPACE = "cgroup", "address space"

_JOIN = """
import os, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""
_CONFINE = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class MemoryCap:
    """See the module's text. `mb` is in MB of 2**20 bytes."""

    def __init__(self, kind: str, mb: float) -> None:
        self._bytes = int(mb * BYTES_PER_MB)
        self._kind = kind
        self._group: Path | None = None

    def __enter__(self) -> MemoryCap:
        if self._kind == CGROUP:
            self._group = _make_group(self._bytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        group, self._group = self._group, None
        if group is not None:
            eventually(lambda: _removed(group), "the group is empty, and gone", 30)

    @property
    def launcher(self) -> tuple[str, ...]:
        """Comes before the command that is to be confined."""
        if self._kind == ADDRESS_SPACE:
            return (sys.executable, "-c", _CONFINE, str(self._bytes))
        assert self._group is not None, "use it in a `with`"
        return (sys.executable, "-c", _JOIN, str(self._group / "cgroup.procs"))

    def kills(self) -> int:
        """How many processes the kernel has ended for want of memory."""
        if self._group is None:
            return 0
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                fields = dict(
                    line.split() for line in (self._group / name).read_text().splitlines()
                )
                return int(fields["oom_kill"])
        raise AssertionError("the group does not say")

    def peak_mb(self) -> float:
        """The most that was used, page cache included; 0 where it is not known."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError):
                if self._group is not None:
                    return int((self._group / name).read_text()) / BYTES_PER_MB
        return 0.0


def cgroups_permitted() -> bool:
    """Whether this process may make control groups with a limit on memory."""
    try:
        group = _make_group(64 * BYTES_PER_MB)
    except OSError:
        return False
    return _removed(group)


def _make_group(limit: int) -> Path:
    """A group below this process's own. Raises OSError where that is not permitted."""
    failure = OSError("there is no control group for memory")
    for own, name in _own_groups():
        group = own / f"test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError as error:
            failure = error
            continue
        try:
            (group / name).write_text(str(limit))
            return group
        except OSError as error:
            failure = error
            group.rmdir()
    raise failure


def _own_groups() -> Iterator[tuple[Path, str]]:
    """Folders of the groups that this process is in, with the name of the file for the limit."""
    with contextlib.suppress(OSError):
        for interface, path in memory_groups(Path("/proc/self/cgroup").read_text()):
            folder = Path("/sys/fs/cgroup", interface.folder, *path.parts[1:])
            if folder.is_dir() and os.access(folder, os.W_OK):
                yield folder, interface.limits[0]


def _removed(group: Path) -> bool:
    """Whether it is gone; a group with processes stays."""
    try:
        group.rmdir()
    except OSError:
        return not group.exists()
    return True
