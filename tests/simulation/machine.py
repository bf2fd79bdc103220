"""The simulated machine: time, an agenda, the file system and the state files, and what can go wrong.

Every effect that a node has on its surroundings passes `Machine.effect`. That is where a crash happens:
from then on the node is dead, and each further effect raises `Crash` again, so that code which catches
everything (a loader's guard, a listener) cannot go on behind the crash.

It decides nothing: what happens when is the script's business, what it means the oracle's.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from simulation.texts import ROOT
from support.fake_fs import FakeFileSystem

WALL_S = 1_700_000_000.0


class Crash(BaseException):
    """The node's process ends here. Nothing in the product may survive it."""


class Broken(Exception):
    """A property does not hold.

    Args:
        property_id: as in DESIGN.md, `I7`; or a word for what every step must do.
    """

    def __init__(self, property_id: str, message: str) -> None:
        super().__init__(f"{property_id}: {message}")
        self.property_id = property_id
        self.message = message


@dataclass(frozen=True)
class Line:
    """One line of a trace."""

    step: int
    at_s: float
    who: str
    text: str

    def __str__(self) -> str:
        return f"{self.step:5}  {self.at_s:9.3f}  {self.who:<6} {self.text}"


class Machine:
    """See the module's text.

    Args:
        lists_stats: whether listing a directory gives the files' stats as well.

    Attributes:
        t: seconds since the episode began; never jumps.
        wall_jump_s: what people did to the wall clock.
        dead: the node has crashed, and is not up again.
        steps: turns, pieces of work and acts so far.
    """

    def __init__(self, *, lists_stats: bool = False) -> None:
        self.t = 0.0
        self.wall_jump_s = 0.0
        self.steps = 0
        self.fs = FakeFileSystem(lists_stats=lists_stats)
        self.fs.before = self._before_fs_call
        self.state = StateFiles(self)
        self.lines: list[tuple[int, float, str, Callable[[], str] | str]] = []
        self.violation: Broken | None = None
        self.dead = False
        self.crash_at: tuple[str, int] | None = None
        self.crashed_at = ""
        self.scan_faults = 0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._fs_errors: list[int] = []
        self._in_mid_scan: list[tuple[int, Callable[[], None]]] = []
        self._in_each_scan: list[tuple[int, Callable[[], None]]] = []

    # Telling.

    def tell(self, who: str, text: Callable[[], str] | str) -> None:
        """Adds a line to the trace; a callable is asked only if somebody reads it."""
        self.lines.append((self.steps, self.t, who, text))

    def trace(self) -> list[Line]:
        return [
            Line(step, t, who, text if isinstance(text, str) else text())
            for step, t, who, text in self.lines
        ]

    def violated(self, property_id: str, message: str) -> None:
        """Notes that a property is broken, from a place where an exception would be caught by the node."""
        if self.violation is None:
            self.violation = Broken(property_id, message)

    # Time.

    def later(self, delay_s: float, do: Callable[[], None]) -> None:
        """Puts something on the agenda."""
        heapq.heappush(self._agenda, (self.t + delay_s, next(self._order), do))

    @property
    def next_at(self) -> float | None:
        return self._agenda[0][0] if self._agenda else None

    def pop(self) -> Callable[[], None]:
        return heapq.heappop(self._agenda)[2]

    def fast_forward(self) -> None:
        """All that is to come happens now, soonest first."""
        while self._agenda:
            self.pop()()

    def move_to(self, t: float) -> None:
        if t > self.t:
            self.fs.advance(t - self.t)
            self.t = t

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Whoever looks at the files within the block is no part of the node: nothing goes wrong."""
        self.fs.before = None
        try:
            yield
        finally:
            self.fs.before = self._before_fs_call

    # Effects, and what can go wrong with them.

    def effect(self, kind: str) -> None:
        """The node does something that others see. Raises Crash where its process ends."""
        if self.dead:
            raise Crash
        if self.crash_at is None:
            return
        where, left = self.crash_at
        if where not in (kind, "anything"):
            return
        if left > 0:
            self.crash_at = (where, left - 1)
            return
        self.die(f"at {kind}")
        raise Crash

    def die(self, where: str) -> None:
        self.crash_at = None
        self.dead = True
        self.crashed_at = where
        self.tell("node", f"CRASHES {where}")

    def fail_fs_call(self, after: int) -> None:
        """One call of the file system fails with EIO, `after` further ones have gone well."""
        self._fs_errors.append(after)

    def change_in_mid_scan(self, after: int, change: Callable[[], None]) -> None:
        """Something happens to the files during a scan, `after` further calls."""
        self._in_mid_scan.append((after, change))

    def change_in_each_scan(self, scans: int, after: int, change: Callable[[], None]) -> None:
        """The same in each of the next `scans` scans, `after` calls from the listing of the root."""
        self._in_each_scan += [(after, change)] * scans

    def no_more_faults(self) -> None:
        self.crash_at = None
        self._fs_errors.clear()
        for _, change in self._in_mid_scan:
            change()
        self._in_mid_scan.clear()
        self._in_each_scan.clear()
        for path in list(self.fs._faults):
            self.fs.heal(path)
        self.state.heal()

    def _before_fs_call(self, call: str, path: str) -> None:
        self.effect("file")
        if self._in_each_scan and (call, path) == ("list_dir", ROOT):
            self._in_mid_scan.append(self._in_each_scan.pop(0))
        if self._in_mid_scan:
            due = [change for left, change in self._in_mid_scan if left <= 0]
            self._in_mid_scan = [(left - 1, do) for left, do in self._in_mid_scan if left > 0]
            for change in due:
                change()
        if path in self.fs._faults:
            self.scan_faults += 1
        if self._fs_errors:
            due_errors = [left for left in self._fs_errors if left <= 0]
            self._fs_errors = [left - 1 for left in self._fs_errors if left > 0]
            if due_errors:
                self.scan_faults += 1
                self.tell("disk", f"{call} {path} fails: I/O error")
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)


class NodeClock:
    """The clocks of one boot: the monotonic one starts anew with it, the wall clock jumps."""

    def __init__(self, machine: Machine, booted_at: float) -> None:
        self._machine = machine
        self.booted_at = booted_at

    def now(self) -> float:
        return self._machine.t - self.booted_at

    def wall(self) -> float:
        return WALL_S + self._machine.t + self._machine.wall_jump_s


class StateFiles:
    """The files of state_dir, whole or not at all, on a disk that can be full or broken.

    Attributes:
        held: what is on the disk.
        error: the errno of each write until it is healed.
        lossy: a file was lost or spoiled, so that nothing can be promised of what was kept.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.held: dict[str, bytes] = {}
        self.error: int | None = None
        self.read_error: int | None = None
        self.writes = 0

    def names(self) -> list[str]:
        self._machine.effect("state")
        if self.read_error is not None:
            raise OSError(self.read_error, os.strerror(self.read_error))
        return sorted(self.held)

    def read(self, name: str) -> bytes:
        self._machine.effect("state")
        if self.read_error is not None:
            raise OSError(self.read_error, os.strerror(self.read_error), name)
        if name not in self.held:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self.held[name]

    def write(self, name: str, data: bytes) -> None:
        self._machine.effect("state")
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), name)
        self.writes += 1
        self.put(name, data)
        self._machine.effect("state")

    def put(self, name: str, data: bytes) -> None:
        """The moment in which the new content is there."""
        self.held[name] = data

    def remove(self, name: str) -> None:
        self._machine.effect("state")
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), name)
        self.held.pop(name, None)
        self._machine.effect("state")

    def heal(self) -> None:
        self.error = self.read_error = None
