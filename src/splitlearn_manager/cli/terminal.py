"""What moves on a terminal: why a command waits, and in `run` a bar for each load.

Only on a terminal that can move its cursor; anywhere else nothing is shown but the lines that are
logged and printed anyway. It shows what others know and decides nothing.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from splitlearn_manager.cli.render import print_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.status import Status

    from splitlearn_manager.core.model_manager import ModelManager

_SHOW_CURSOR = b"\x1b[?25h"
_REDRAW_S = 0.1
_LEVEL_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}
_KEY = re.compile(r"(?:^|(?<= ))\w+=")


def moving_console() -> Console | None:
    """Standard error, if it is a terminal on which lines can be written over; None otherwise."""
    if not sys.stderr.isatty():
        return None
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return None if console.is_dumb_terminal else console


class Waiting:
    """A line with what is waited for, on a terminal; gone when the `with` ends."""

    def __init__(self) -> None:
        self._console = moving_console()
        self._status: Status | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, because: Sequence[str]) -> None:
        """Shows the first of the reasons, and how many there are."""
        if self._console is None:
            return
        more = f"  (and {len(because) - 1} more)" if len(because) > 1 else ""
        text = Text(f"{because[0] if because else 'the directory settles'}{more}", style="dim")
        text.truncate(max(20, self._console.width - 4), overflow="ellipsis")
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)


class Screen:
    """The terminal of `run`: a bar for each load that is under way, the log above them.

    Level-triggered: at each change it compares the bars with the loads that there are.

    Args:
        console: see `moving_console`.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console
        self._progress: Progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[size]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Two threads that draw at a time leave half a screen: all drawing is done under one lock.
            auto_refresh=False,
            redirect_stdout=False,
        )
        self._lock = threading.Lock()
        self._loads: dict[str, TaskID] = {}
        self._reading: TaskID | None = None
        self._manager: ModelManager | None = None
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._follow, name="screen", daemon=True)

    def write(self, line: str, level: int) -> None:
        """A line of the log."""
        text = Text(line, style=_LEVEL_STYLES.get(level, ""))
        text.highlight_regex(_KEY, "dim")
        with self._lock:
            self._console.print(text)

    def print_lines(self, lines: Iterable[Text]) -> None:
        """Prints to standard output, which may be the same terminal."""
        with self._lock:
            self._progress.stop()
            print_lines(lines)
            sys.stdout.flush()
            self._show_or_hide()

    def follow(self, manager: ModelManager) -> None:
        """Shows the loads of this manager from now on."""
        self._manager = manager
        manager.on_change(self._changed.set)
        self._thread.start()

    def files_read(self, done: int, total: int) -> None:
        """Shows how many of the directory's files have been read."""
        with self._lock:
            if self._closed:
                return
            if self._reading is None:
                size = f"{total:,} files"
                self._reading = self._progress.add_task("reading", total=total, size=size)
            self._progress.update(self._reading, completed=done, total=total)
            if done >= total:
                self._progress.remove_task(self._reading)
                self._reading = None
            self._show_or_hide()
            self._changed.set()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        with self._lock:
            self._closed = True
            self._progress.stop()
        self._changed.set()

    def _follow(self) -> None:
        while not self._closed:
            # Time passes on the bars that there are; without any there is nothing to draw.
            self._changed.wait(_REDRAW_S if self._progress.task_ids else None)
            self._changed.clear()
            with self._lock:
                if not self._closed:
                    self._compare()

    def _compare(self) -> None:
        from splitlearn_manager.core.lifecycle import State

        assert self._manager is not None
        views = self._manager.snapshot().instances
        serving = {view.model_id for view in views if view.state is State.READY}
        loading = {view.key: view for view in views if view.state is State.LOADING}
        for key in [key for key in self._loads if key not in loading]:
            self._progress.remove_task(self._loads.pop(key))
        for key, view in loading.items():
            if key not in self._loads:
                verb = "updating" if view.model_id in serving else "loading"
                mb = f"{view.reserved_mb:,.0f} MB " if view.reserved_mb else ""
                self._loads[key] = self._progress.add_task(
                    f"{verb} {view.model_id}", total=None, size=f"{mb}on {view.device}"
                )
        self._show_or_hide()

    def _show_or_hide(self) -> None:
        """The screen is written over only while there is something to see."""
        if self._progress.task_ids and not self._closed:
            self._progress.start()
            self._progress.refresh()
        else:
            self._progress.stop()


def show_cursor() -> None:
    """Brings the cursor back, for a process that ends on the spot."""
    import os

    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
