"""A `grpc.Server` of our own: one thread looks at all connections, and any thread may answer a call.

    listening socket ─► connection ─► call ─► the first handler that knows its method
                                            ├► taken over, begun on the polling thread
                                            └► run by a thread of its pool

It serves plain text: the tokens and encryption that gRPC's own server offers stay with that one. Services
are registered as with it, with the functions that gRPC's generated code calls.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import Any, NamedTuple

import grpc

from splitlearn_comm.http2.connection import Connection
from splitlearn_comm.http2.handlers import InPool, TakenOver, TakenOverStream
from splitlearn_comm.http2.headers import Metadata
from splitlearn_comm.http2.listening import listen, peer_of
from splitlearn_comm.http2.polling import NoWork, Polling, Work
from splitlearn_comm.http2.stream import Handler, StreamOfCall

_log = logging.getLogger(__name__)

_SCRATCH_BYTES = 256 * 1024
_LAST_WORDS_S = 0.5
"""How long at least a server that has stopped waits for its last answers to be taken."""
_READ = selectors.EVENT_READ
_WRITE = selectors.EVENT_WRITE


class _Details(NamedTuple):
    """What handlers are found by, as `grpc.HandlerCallDetails`."""

    method: str
    invocation_metadata: Metadata


class Server(grpc.Server):
    """See the module's text.

    Args:
        pool: runs the functions of handlers that name no pool of their own.
        max_message_length: bytes, of requests.
        max_calls: at once; further ones are refused.
        work: what the polling thread runs between two looks.
    """

    def __init__(
        self,
        pool: Any,
        *,
        max_message_length: int,
        max_calls: int,
        work: Work | None = None,
    ) -> None:
        self.max_message_length = max_message_length
        self._pool = pool
        self._max_calls = max_calls
        self._handlers: list[grpc.GenericRpcHandler[Any, Any]] = []
        work = work or NoWork()
        self._polling = Polling(self._look, work)
        self._selector = selectors.DefaultSelector()
        if (descriptor := work.fileno()) is not None:
            self._selector.register(descriptor, _READ, lambda events: work.arrived())
        self._listening: list[socket.socket] = []
        self._connections: set[Connection] = set()
        self._behind: set[Connection] = set()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._polled_by = 0
        self._soon: deque[Callable[[], None]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, _READ, self._wake_up)
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="grpc-aside")
        self._asides = 0
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._calls = 0
        self._started = False
        self._stopping = False
        self._over = False
        self._stopped = threading.Event()

    # As gRPC has it.

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """Register handlers; of several that know a method, the first one counts."""
        self._handlers.extend(generic_rpc_handlers)

    def add_insecure_port(self, address: str) -> int:
        """Listen on `host:port` or `unix:PATH`; the port.

        Raises:
            RuntimeError: if that cannot be.
        """
        try:
            listening = listen(address)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"cannot listen on {address}: {error}") from error
        self._listening.extend(listening)
        name = listening[0].getsockname()
        return int(name[1]) if isinstance(name, tuple) else 1

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Not here; see the module's text."""
        raise NotImplementedError("this server speaks plain text; use gRPC's own with credentials")

    def start(self) -> None:
        """Begin to answer.

        Raises:
            ValueError: if it was started before.
        """
        with self._lock:
            if self._started or self._stopping:
                raise ValueError("the server was started before")
            self._started = True
        for listening in self._listening:
            self._selector.register(
                listening, _READ, lambda events, listening=listening: self._accept(listening)
            )
        self._polling.start()

    def stop(self, grace: float | None = None) -> threading.Event:
        """Take no new calls; after `grace` seconds end those that still run.

        Returns at once; the event is set once all have ended and all ports are closed.
        """
        with self._lock:
            first, self._stopping = not self._stopping, True
            started = self._started
        if not started:
            self._close()
        else:
            if first:
                self.soon(self._leave)
            until_s = time.monotonic() + (grace or 0.0)
            threading.Thread(target=self._end, args=(until_s,), daemon=True).start()
        return self._stopped

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped; True if `timeout` seconds passed first."""
        return not self._stopped.wait(timeout)

    # For connections.

    def begin(self, stream: StreamOfCall) -> None:
        """Find a handler for a new call, or refuse it."""
        with self._lock:
            self._calls += 1
            too_many = self._calls > self._max_calls
        if too_many:
            text = f"the server has {self._max_calls} calls under way, its limit; try again later"
            # It must not count until its caller reads that: so many there may not be.
            stream.turn_away(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        try:
            handler = self._handler(stream)
        except Exception:
            _log.exception("method=%s", stream.head.method)
            stream.finish(grpc.StatusCode.INTERNAL, "the server could not find a handler")
            return
        if isinstance(handler, str):
            status = grpc.StatusCode.RESOURCE_EXHAUSTED
            stream.finish(status, handler)
        elif handler is None:
            text = f"there is no method {stream.head.method}"
            stream.finish(grpc.StatusCode.UNIMPLEMENTED, text)
        elif stream.handler is None:
            # Else it has begun, or ended, by itself.
            stream.handler = handler

    def ended(self, stream: StreamOfCall) -> None:
        """A call has ended."""
        with self._lock:
            self._calls -= 1
            if self._stopping and not self._calls:
                self._idle.notify_all()

    def soon(self, work: Callable[[], None]) -> None:
        """Have the polling thread do something, on any thread."""
        self._soon.append(work)
        if get_ident() != self._polled_by:
            with contextlib.suppress(OSError):
                self._waker.send(b"x")

    def aside(self, work: Callable[[], None]) -> None:
        """Have another thread do something that takes long; asked for by the polling thread.

        Raises:
            RuntimeError: if there is too much of that, for calls that may be over.
        """

        def counted() -> None:
            work()
            with self._lock:
                self._asides -= 1

        with self._lock:
            if self._asides >= self._max_calls:
                raise RuntimeError("too much is done aside")
            self._asides += 1
        self._aside.submit(counted)

    def watch(self, connection: Connection) -> None:
        """Tell the connection when the system takes more."""
        self.soon(lambda: self._select(connection, _READ | _WRITE))

    def closed(self, connection: Connection) -> None:
        """The connection is no more."""
        self._connections.discard(connection)
        self._behind.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)

    def _handler(self, stream: StreamOfCall) -> Handler | str | None:
        """What the call is handled by; a text if it is refused, None if nobody knows it."""
        details = _Details(stream.head.method, stream.head.metadata)
        for known in self._handlers:
            found = known.service(details)  # type: ignore[arg-type]
            if found is not None:
                break
        else:
            return None
        function: Any = next(
            filter(
                None,
                (found.unary_unary, found.stream_stream, found.unary_stream, found.stream_unary),
            )
        )
        pool = getattr(function, "experimental_thread_pool", None)
        if hasattr(function, "full"):
            return str(function.full)
        if hasattr(function, "begin"):
            return TakenOver(stream, function.begin, pool, found.response_serializer)
        if hasattr(function, "open"):
            return TakenOverStream(stream, function.open)
        return InPool(stream, found, pool or self._pool)

    # On the polling thread.

    def _look(self, wait: bool) -> bool | None:
        if self._over:
            return None
        self._polled_by = get_ident()
        behind = tuple(self._behind)
        found = self._selector.select(None if wait and not (self._soon or behind) else 0)
        try:
            for key, events in found:
                key.data(events)
            for connection in behind:
                self._read(connection)
            while self._soon:
                self._soon.popleft()()
        except Exception:
            # An error here would end the polling thread, and with it the server. Whoever was not looked at
            # is looked at next time.
            _log.exception("what a connection needed could not be done")
        return None if self._over else bool(found or self._behind)

    def _wake_up(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, address = listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listening)
            return
        connection.setblocking(False)
        peer = "unix:"
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = peer_of(address)
        found = Connection(self, connection, peer)
        self._connections.add(found)
        self._selector.register(connection, _READ, lambda events: self._serve(found, events))

    def _turn_away(self, listening: socket.socket) -> None:
        """There are no file descriptors left: whoever waits is told, by the one that was kept for this."""
        self._let_spare_go()
        with contextlib.suppress(OSError):
            listening.accept()[0].close()
            _log.warning("no file descriptors are left; a connection is turned away")
        # Another thread may have been quicker: then there is none until one is free again.
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _let_spare_go(self) -> None:
        # Its number is another file's from then on.
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)

    def _serve(self, connection: Connection, events: int) -> None:
        if events & _WRITE and not connection.outgoing.flush():
            self._select(connection, _READ)
        if events & _READ and not connection.is_behind:
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            connection.read(self._scratch)
        except Exception:
            _log.exception("peer=%s: its connection is closed", connection.peer)
            connection.close()
        if connection.is_behind:
            self._behind.add(connection)
        else:
            self._behind.discard(connection)

    def _select(self, connection: Connection, events: int) -> None:
        if connection in self._connections:
            key = self._selector.get_key(connection.socket)
            self._selector.modify(connection.socket, events, key.data)

    # Stopping.

    def _leave(self) -> None:
        for listening in self._listening:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(listening)
            listening.close()
        for connection in tuple(self._connections):
            connection.leave()
            for stream in list(connection.streams.values()):
                if isinstance(stream.handler, InPool):
                    stream.handler.stopping()

    def _end(self, until_s: float) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._calls, max(0.0, until_s - time.monotonic()))
        done = threading.Event()

        def end_calls() -> None:
            self._end_calls()
            done.set()

        self.soon(end_calls)
        if self._over:
            return  # stopped meanwhile: nobody does it any more
        done.wait()
        self._take_leave(until_s)
        self.soon(self._close)

    def _end_calls(self) -> None:
        for connection in tuple(self._connections):
            for stream in list(connection.streams.values()):
                stream.finish(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _take_leave(self, until_s: float) -> None:
        """Let callers take what was sent to them."""
        until_s = max(until_s, time.monotonic() + _LAST_WORDS_S)
        pause = threading.Event()
        while time.monotonic() < until_s:
            if all(connection.is_taken for connection in tuple(self._connections)):
                return
            pause.wait(0.005)

    def _close(self) -> None:
        if self._over:
            return
        self._over = True
        for connection in tuple(self._connections):
            connection.close()
        for listening in self._listening:
            listening.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()
        self._let_spare_go()
        self._aside.shutdown(wait=False)
        self._stopped.set()
