"""Wakes the loop up when files may have changed. It decides nothing, and nothing depends on it.

Events are hints: every change is found by the next scan in any case, the watcher only makes it soon.
So an event that is lost costs time, never correctness, and whatever goes wrong here (no inotify, too
many watches, a network file system, a thread that died) ends in `mode == "polling"` with a `reason`,
never in an exception.

    start ──► refresh (each turn of the loop: directories replaced, links turned, new weights) ──► stop

Reading a file, by us or by others, wakes nobody. When events were lost that we would have heard, the
node wakes up too. Threads: watchdog's observer, and one for each watched directory; all have ended when
`stop` returns.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)

from splitlearn_manager.desired.scanner import describe
from splitlearn_manager.desired.watch_plan import (
    Watch,
    covering,
    plan_watches,
    unheard_file_system,
)

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver, ObservedWatch

Mode = Literal["inotify", "fsevents", "polling"]

MAX_WATCHES = 64
"""Directories watched at most, each of which costs a thread; further ones are left to polling."""

RETRY_S = 30.0
"""After a failure, how long until watching is tried again."""

# What the kernel is asked to report: each event that says that a content, a name or a permission changed.
# Not reading, of which there is an event or two for each file that a scan opens: a wake-up by our own scan
# would never end, and the threads that take thousands of events compete with the scan. Not the time stamp
# of a directory, which follows each change inside it.
_HEARD: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]

_WATCHDOG = logging.getLogger("watchdog")

_MODES: dict[str, Mode] = {"InotifyObserver": "inotify", "FSEventsObserver": "fsevents"}


class _Handler(FileSystemEventHandler):
    """What watchdog calls for one watched directory."""

    def __init__(self, watch: Watch, wake: Callable[[], None]) -> None:
        self._watch = watch
        self._wake = wake
        self.lost = threading.Event()  # the directory itself went away, and the watch with it

    def dispatch(self, event: FileSystemEvent) -> None:
        source, target = os.fsdecode(event.src_path), os.fsdecode(event.dest_path or b"")
        if source == self._watch.directory:
            if event.event_type in ("deleted", "moved"):
                self.lost.set()
                self._wake()
            return
        names = self._watch.names
        if names is None or {os.path.basename(source), os.path.basename(target)} & names:
            self._wake()


class _Warned(logging.Handler):
    """Wakes up when watchdog warns of anything: that is all it says when the kernel dropped events."""

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self._wake = wake

    def emit(self, record: logging.LogRecord) -> None:
        self._wake()


@dataclass(frozen=True)
class _Armed:
    watch: Watch
    handle: ObservedWatch
    handler: _Handler


class Watcher:
    """Calls `wake` soon after something under `root`, or behind one of `extra`, changed.

    All methods are called from one thread; `wake` is called from another and must not block.

    Args:
        root: the desired directory; it need not exist.
        wake: for instance an Event's `set`.
        extra: further files and directories, as in `watch_paths`.
        observer: makes watchdog's observer; for tests. None: the best one of this system.
        mountinfo: the text of /proc/self/mountinfo; for tests. None: read it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        root: str | Path,
        wake: Callable[[], None],
        extra: Iterable[str | Path] = (),
        *,
        observer: Callable[[], BaseObserver] | None = None,
        mountinfo: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = os.path.abspath(root)
        self._wake = wake
        self._warned = _Warned(wake)
        self._extra = tuple(os.path.abspath(path) for path in extra)
        self._make_observer = observer or _best_observer
        self._mountinfo = mountinfo
        self._clock = clock
        self._observer: BaseObserver | None = None
        self._armed: dict[str, _Armed] = {}
        self._running = False
        self._retry_at = 0.0
        self._mode: Mode = "polling"
        self._reason = "not started"

    @property
    def mode(self) -> Mode:
        """How changes of the desired directory are noticed at present."""
        return self._mode

    @property
    def reason(self) -> str:
        """Why the mode is polling, or what is not watched in another mode; empty when all is well."""
        return self._reason

    def start(self) -> None:
        """Begin to watch; says in `mode` whether that worked."""
        self._running = True
        self._retry_at = 0.0
        self.refresh()

    def stop(self) -> None:
        """End all threads. May be called twice, and followed by `start`."""
        self._running = False
        self._close("stopped")

    def watch_paths(self, paths: Iterable[str | Path]) -> None:
        """Replace the paths that are watched beside the root: what links lead to, weights, factories."""
        extra = tuple(os.path.abspath(path) for path in paths)
        if extra != self._extra:
            self._extra = extra
            self.refresh()

    def refresh(self) -> None:
        """Watch what has to be watched now; call it each turn of the loop. Costs a stat a directory."""
        if not self._running:
            return
        if self._observer is None and not self._open():
            return
        if not self._is_alive():
            return
        plan = plan_watches(self._root, self._extra)
        essential = covering(plan, plan_watches(self._root))
        try:
            heard = self._heard()
            for directory, armed in list(self._armed.items()):
                lost = armed.handler.lost.is_set() or armed.handle not in heard
                if lost or plan.get(directory) != armed.watch:
                    self._disarm(directory)
        except Exception as error:  # see _open
            self._fail(f"watching failed: {_explain(error)}")
            return
        # What the root needs comes first: it must not be lost to the limit.
        order = sorted(plan.values(), key=lambda w: (w.directory not in essential, w.directory))
        failures = [why for watch in order if (why := self._arm(watch)) is not None]
        self._reason = "; ".join(failures)
        if not essential <= self._armed.keys():
            self._fail(failures[0])

    # -- steps, none of which raises

    def _open(self) -> bool:
        if self._clock() < self._retry_at:
            return False
        kind = unheard_file_system(os.path.realpath(self._root), self._mounts())
        if kind is not None:
            return self._fail(
                f"{self._root} is on a file system ({kind}) that may not report changes"
            )
        try:
            observer = self._make_observer()
        except (
            Exception
        ) as error:  # whatever keeps this system from watching, polling is the answer
            return self._fail(f"changes cannot be watched: {_explain(error)}")
        mode = _MODES.get(type(observer).__name__)
        if mode is None:
            return self._fail("this system has neither inotify nor FSEvents")
        observer.start()
        _WATCHDOG.addHandler(self._warned)
        self._observer, self._mode = observer, mode
        return True

    def _arm(self, watch: Watch) -> str | None:
        """Watch a directory; says what went wrong if it could not be done."""
        if watch.directory in self._armed or self._observer is None:
            return None
        if len(self._armed) >= MAX_WATCHES:
            return f"{watch.directory} is not watched: {MAX_WATCHES} directories are already"
        handler = _Handler(watch, self._wake)
        try:
            handle = self._observer.schedule(
                handler,
                watch.directory,
                recursive=watch.names is None,
                event_filter=_HEARD,
            )
        except Exception as error:  # see _open
            return f"{watch.directory} cannot be watched: {_explain(error)}"
        self._armed[watch.directory] = _Armed(watch, handle, handler)
        # Something may have changed between the last scan and this watch.
        self._wake()
        return None

    def _disarm(self, directory: str) -> None:
        armed = self._armed.pop(directory)
        if self._observer is not None:
            self._observer.unschedule(armed.handle)

    def _is_alive(self) -> bool:
        """Whether the threads that every watch depends on still run; falls back to polling if not."""
        if self._observer is None:
            return False
        own = [v for v in vars(self._observer).values() if isinstance(v, threading.Thread)]
        if all(thread.is_alive() for thread in (self._observer, *own)):
            return True
        return self._fail("watching failed: the thread that reports changes has ended")

    def _heard(self) -> set[ObservedWatch]:
        """The watches whose own threads still run."""
        emitters = self._observer.emitters if self._observer is not None else ()
        return {emitter.watch for emitter in emitters if emitter.is_alive()}

    def _fail(self, reason: str) -> bool:
        """Fall back to polling; False, for callers that report success."""
        self._close(reason)
        self._retry_at = self._clock() + RETRY_S
        return False

    def _close(self, reason: str) -> None:
        observer, self._observer = self._observer, None
        self._armed.clear()
        self._mode, self._reason = "polling", reason
        if observer is not None:
            observer.stop()
            observer.join()
            _WATCHDOG.removeHandler(self._warned)

    def _mounts(self) -> str:
        if self._mountinfo is not None:
            return self._mountinfo
        try:
            return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""  # not Linux: FSEvents says itself what it cannot watch


def _best_observer() -> BaseObserver:
    from watchdog.observers import Observer

    return Observer()


def _explain(error: Exception) -> str:
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "fs.inotify.max_user_watches is reached"
        if error.errno == errno.EMFILE:
            return "fs.inotify.max_user_instances, or the limit of open files, is reached"
        return describe(error)
    return str(error) or type(error).__name__
