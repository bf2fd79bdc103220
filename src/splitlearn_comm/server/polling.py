"""gRPC's polling thread, as one that also runs what its calls ask for: no request changes threads.

    look for calls without waiting ─► begin each ─► nothing more there: run a batch, answer it ─► look again

Small forwards cost less than waking a thread for them, so that what is expected to be short runs here,
between two looks. Calls that come meanwhile wait for the next look, and are its batch. What is long, or not
known yet, is run by others (see `Work`). A piece of work that turns out to take long loses the polling to
another thread, so that nothing else waits for it longer than about `TAKEOVER_S`.

As `splitlearn_comm.server.direct`, this needs inner parts of gRPC, and is used only where these are known.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Protocol

import grpc

_log = logging.getLogger(__name__)

TAKEOVER_S = 0.05
"""Work that takes longer no longer keeps calls from being begun."""
_NO_CALLS_S = 0.2
"""How long to wait for calls before looking whether the server is still wanted."""
_MOST_EVENTS = 256
"""So many events are looked at before work goes first, however many calls come."""
_AT_ONCE = 0.0


class Work(Protocol):
    """What is run between two looks for calls. None of these raises."""

    def polled_here(self) -> None:
        """The thread that calls this begins the calls from now on; the one before it does no more."""
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


def start(server: grpc.Server, work: Work) -> None:
    """Start a server whose polling thread runs `work`, in place of `server.start()`.

    Raises:
        ValueError: if it was started before.
    """
    from grpc import _server

    state = server._state  # type: ignore[attr-defined]
    with state.lock:
        if state.stage is not _server._ServerStage.STOPPED:
            raise ValueError("the server was started before")
        state.server.start()
        state.stage = _server._ServerStage.STARTED
        for method in state.registered_method_handlers:
            _server._request_registered_call(state, method)
        _server._request_call(state)
    Polling(state, work).start()


class Polling:
    """The thread that polls, and the one that takes over from it.

    Args:
        state: of the server.
        work: see `Work`.
    """

    def __init__(self, state: Any, work: Work) -> None:
        self._state = state
        self._work = work
        self._poller: object = None
        self._since_s: float | None = None
        self._runs = 0
        self._over = False
        self._sleeps = False
        self._wake = threading.Event()

    def start(self) -> None:
        """Begin to poll."""
        _thread("grpc-polling", self._poll)
        _thread("grpc-takeover", self._watch)

    def _poll(self) -> None:
        from grpc import _server
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        me = self._poller = object()
        self._since_s = None
        self._work.polled_here()
        timed_out = cygrpc.CompletionType.queue_timeout
        state, events, looked = self._state, 0, False
        while self._poller is me:
            enough = looked or events >= _MOST_EVENTS
            if enough:
                events = 0
                if self._work.waits_here():
                    self._run(me)
                    looked = False
                    continue
            at_once = not enough and self._work.has_work()
            event = state.completion_queue.poll(_AT_ONCE if at_once else time.time() + _NO_CALLS_S)
            if state.server_deallocated:
                _server._begin_shutdown_once(state)
            looked = event.completion_type == timed_out
            events += 1
            if not looked and not _server._process_event_and_continue(state, event):
                self._over = True
                self._wake.set()
                return
            # What an event refers to may be waited for by the next look.
            event = None

    def _run(self, me: object) -> None:
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
        if self._poller is me:
            self._since_s = None

    def _watch(self) -> None:
        """Take over when a piece of work takes long. Sleeps while nothing is run."""
        while not self._over:
            runs, since_s = self._runs, self._since_s
            if since_s is not None and time.monotonic() - since_s > TAKEOVER_S:
                _thread("grpc-takeover", self._watch)
                self._poll()
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
