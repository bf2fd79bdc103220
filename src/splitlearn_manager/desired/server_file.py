"""`server.yaml` from scan to scan: the last good one counts, until its absence is proven."""

from __future__ import annotations

from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.reading import parse_server_file
from splitlearn_manager.desired.scanner import SERVER_FILE, Scan
from splitlearn_manager.desired.tracked_file import Read, Stat, TrackedFile


class ServerFile:
    """Give it every scan, in order."""

    def __init__(self) -> None:
        self._file = TrackedFile(SERVER_FILE)
        self._root: tuple[int, int] | None = None
        self.config: ServerConfig | None = None
        """The last good one; None when there is none."""

    def observe(self, scan: Scan, now: float, settle_s: float, read: Read, stat: Stat) -> None:
        """Take a scan into account."""
        if scan.complete and scan.root != self._root:
            self._file.forget_absence()
            self._root = scan.root
        if scan.server is not None:
            self._file.see(scan.server, now)
        else:
            self._file.miss(now, proves_absence=scan.complete)
        self._file.settle(now, settle_s, read, stat, parse_server_file)
        reading = self._file.reading
        if reading is not None and reading.server is not None and not reading.problems:
            self.config = reading.server
        elif self._file.is_proven_gone(now, settle_s):
            self.config = None
            self._file = TrackedFile(SERVER_FILE)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with it, by the last reading."""
        return self._file.problems

    @property
    def is_at_rest(self) -> bool:
        """A scan that sees the same file as the last one would change nothing."""
        return self._file.is_at_rest or not (self._file.was_seen and self._file.in_sight)

    def pending_s(self, now: float, settle_s: float) -> float | None:
        """Seconds until a look may settle something about it; None when nothing is open."""
        return self._file.pending_s(now, settle_s)
