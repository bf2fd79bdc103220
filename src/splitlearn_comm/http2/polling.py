"""The thread that looks at all connections, as one that also runs what their calls ask for.

    look for calls without waiting ─► begin each ─► nothing more there: run a batch, answer it ─► look again

Small forwards cost less than waking a thread for them, so that what is expected to be short runs here,
between two looks. Calls that come meanwhile wait for the next look, and are its batch. What is long, or not
known yet, is run by others (see `Work`). A piece of work that turns out to take long loses the polling to
another thread, so that nothing else waits for it longer than about `TAKEOVER_S`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

_log = logging.getLogger(__name__)

TAKEOVER_S = 0.05
"""Work that takes longer no longer keeps calls from being begun."""
_MOST_LOOKS = 16
"""So often something may have arrived before work goes first, however much there is."""


class Work(Protocol):
    """What is run between two looks for calls. None of these raises."""

    def polled_here(self) -> None:
        """The thread that calls this begins the calls from now on; the one before it does no more."""
        ...

    def fileno(self) -> int | None:
        """A file that is readable when `arrived` is to be called; None if there is nothing of the kind."""
        ...

    def arrived(self) -> None:
        """Take what was begun here and has been run elsewhere; called by the thread that polls."""
        ...

    def has_work(self) -> bool:
        """Whether anything waits or runs, wherever it should; asked before each look, so it must be cheap."""
        ...

    def waits_here(self) -> bool:
        """Whether something waits that should run on the polling thread."""
        ...

    def run_here(self) -> None:
        """Run a piece of it."""
        ...


class NoWork:
    """Nothing: all that calls ask for is done by others."""

    def polled_here(self) -> None:
        pass

    def fileno(self) -> int | None:
        return None

    def arrived(self) -> None:
        pass

    def has_work(self) -> bool:
        return False

    def waits_here(self) -> bool:
        return False

    def run_here(self) -> None:
        pass


class Polling:
    """The thread that polls, and the one that takes over from it.

    Args:
        look: takes what has arrived; told whether to wait until something does. Whether anything had; None
            once there is nothing to look at any more.
        work: see `Work`.
    """

    def __init__(self, look: Callable[[bool], bool | None], work: Work) -> None:
        self._look = look
        self._work = work
        # What says who polls. It changes only while the one that polled runs a piece of work: two threads
        # never look at the same time.
        self._turn = threading.Lock()
        self._poller: object = None
        self._since_s: float | None = None
        self._runs = 0
        self._over = False
        self._sleeps = False
        self._wake = threading.Event()

    def start(self) -> None:
        """Begin to poll."""
        self._poller = me = object()
        _thread("grpc-polling", lambda: self._poll(me))
        if not isinstance(self._work, NoWork):
            _thread("grpc-takeover", self._watch)

    def _poll(self, me: object) -> None:
        self._work.polled_here()
        looks = 0
        while self._poller is me:
            arrived: bool | None = True
            while arrived and looks < _MOST_LOOKS:
                arrived = self._look(not self._work.has_work())
                looks += 1
            if arrived is None:
                self._over = True
                self._wake.set()
                return
            looks = 0
            if self._work.waits_here():
                self._run(me)
            elif not arrived:
                # What there is to do is done elsewhere.
                if self._look(True) is None:
                    continue
                looks = 1

    def _run(self, me: object) -> None:
        with self._turn:
            self._since_s = time.monotonic()
        self._runs += 1
        if self._sleeps:
            self._sleeps = False
            self._wake.set()
        try:
            self._work.run_here()
        except BaseException:
            # An error here would end the polling thread, and with it the server.
            _log.exception("what waited could not be run")
        with self._turn:
            if self._poller is me:
                self._since_s = None

    def _takes_long(self) -> bool:
        since_s = self._since_s
        return since_s is not None and time.monotonic() - since_s > TAKEOVER_S

    def _is_watched_by_another(self) -> bool:
        """Whether there is a thread that watches from now on.

        Made sure of before the polling is taken over: where the system allows no further thread, whoever runs
        the work has to come back to it.
        """
        try:
            _thread("grpc-takeover", self._watch)
        except RuntimeError:
            _log.warning("no thread can be started: calls wait for a forward that takes long")
            return False
        return True

    def _taken_over(self) -> object:
        """Takes the polling from who runs a piece of work for too long; None if nobody does."""
        with self._turn:
            if not self._takes_long():
                return None
            self._poller, self._since_s = object(), None
            return self._poller

    def _watch(self) -> None:
        """Take over when a piece of work takes long. Sleeps while nothing is run."""
        while not self._over:
            runs = self._runs
            if self._takes_long() and self._is_watched_by_another():
                if (me := self._taken_over()) is not None:
                    self._poll(me)
                return
            self._wake.wait(TAKEOVER_S)
            self._wake.clear()
            if self._runs == runs and self._since_s is None:
                self._sleeps = True
                if self._runs == runs and not self._over:
                    self._wake.wait()
                self._sleeps = False


def _thread(name: str, target: Any) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()
