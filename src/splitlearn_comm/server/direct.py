"""Calls without a thread of their own: taken over as their message arrives, answered from any thread.

    gRPC's polling thread:   call → room for it? → message → `begin(message, call)` ┐
    whoever has the answer:  `call.send(bytes)` or `call.refuse(status, details)`  ◄┘

gRPC's own way gives each call a thread, wakes it for the message, and holds it until the answer; handing a
request from thread to thread costs more than anything else that a small request costs. What waits or takes
long must not be done on the polling thread: `call.run` hands it to the pool, where it goes gRPC's own way.

gRPC for Python has no public interface for this. `available` says whether this version's inner parts are
those that this module was written for; where they are not, nothing of it is used and all calls go gRPC's way.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, lru_cache
from typing import Any, Protocol

import grpc

from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.server.pool import BoundedPool

_log = logging.getLogger(__name__)

_IN_POOL = (
    "rpc_event",
    "state",
    "behavior",
    "argument_thunk",
    "request_deserializer",
    "response_serializer",
)
_EXPECTED = {
    "_unary_response_in_pool": _IN_POOL,
    "_stream_response_in_pool": _IN_POOL,
    "_get_initial_metadata_operation": ("state", "metadata"),
    "_status": ("rpc_event", "state", "serialized_response"),
    "_abort": ("state", "call", "code", "details"),
    "_possibly_finish_call": ("state", "token"),
    "_is_rpc_state_active": ("state",),
    "_process_event_and_continue": ("state", "event"),
    "_begin_shutdown_once": ("state",),
    "_request_call": ("state",),
    "_request_registered_call": ("state", "method"),
    "_serve": ("state",),
    "_Context": ("rpc_event", "state", "request_deserializer"),
}
_EXPECTED_NAMES = (
    "_RECEIVE_MESSAGE_TOKEN",
    "_SEND_MESSAGE_TOKEN",
    "_OPEN",
    "_CLOSED",
    "_EMPTY_FLAGS",
    "_ServerStage",
)
_NO_MESSAGE = b"the call ended without a message"


class Call(Protocol):
    """A call that is answered once, from any thread."""

    def remaining_s(self) -> float:
        """Seconds until the caller's deadline; very many without one."""
        ...

    def active(self) -> bool:
        """Whether somebody waits for the answer."""
        ...

    def peer(self) -> str:
        """Who calls, as gRPC writes it: `ipv4:…`, `ipv6:…` or `unix:…`."""
        ...

    def name_version(self, version: str) -> None:
        """Have the answer say, in its trailing metadata, which version of the model gave it."""
        ...

    def send(self, *response: Bytes) -> None:
        """Answer with an encoded message, given in parts."""
        ...

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        """End the call without an answer."""
        ...

    def run(self, handle: Callable[[Any, grpc.ServicerContext], object], request: object) -> None:
        """Have a thread of the pool call `handle(request, context)` as gRPC would, and answer with that."""
        ...


class Begins(Protocol):
    """A handler that takes calls over."""

    def begin(self, message: bytes, call: Call) -> None:
        """Take the call over. On the polling thread: it never waits, and never raises."""
        ...


VERSION_KEY = "splitlearn-version"
"""In trailing metadata: which version of the model has answered."""


@lru_cache(maxsize=1024)
def version_metadata(version: str) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of an answer."""
    return ((VERSION_KEY, version),)


@cache
def available() -> bool:
    """Whether this version of gRPC has the inner parts that calls are taken over with."""
    try:
        from grpc import _server
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        for name, parameters in _EXPECTED.items():
            found = getattr(_server, name)
            if tuple(inspect.signature(found).parameters) != parameters:
                return False
        known = all(hasattr(_server, name) for name in _EXPECTED_NAMES)
        return known and hasattr(cygrpc, "ReceiveMessageOperation")
    except (ImportError, AttributeError, ValueError):
        return False


class DirectPool(BoundedPool):
    """A pool whose calls are taken over by those handlers that have a method `begin`.

    Such a call counts as work of the pool until it is answered. One whose handler says that it is `full` (a
    text) is refused without reading its message.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Take a call over, or queue what is not one as any pool does."""
        from grpc import _server

        if args and args[0] is _server._stream_response_in_pool:
            _, event, state, behavior, *_ = args
            if hasattr(behavior, "open"):
                DirectStream(event, state, behavior.open).begin()
                return None  # type: ignore[return-value]
        if not args or args[0] is not _server._unary_response_in_pool:
            return super().submit(fn, *args, **kwargs)
        _, event, state, behavior, _, _, serializer = args
        call = UnaryCall(self, event, state, fn, serializer)
        if hasattr(behavior, "begin"):
            self.enter()
            _receive(event, state, behavior, call)
        elif hasattr(behavior, "full"):
            call.reject(grpc.StatusCode.RESOURCE_EXHAUSTED, behavior.full)
        else:
            return super().submit(fn, *args, **kwargs)
        # gRPC counts the calls whose future it gets; this pool counts them itself.
        return None  # type: ignore[return-value]


def _receive(event: Any, state: Any, behavior: Begins, call: UnaryCall) -> None:
    """Have `behavior` take the call over once its message is there. The state's lock is held."""
    from grpc import _server
    from grpc._cython import cygrpc  # type: ignore[attr-defined]

    def arrived(received: Any) -> Any:
        message = received.batch_operations[0].message()
        with state.condition:
            if message is None:
                if state.client is _server._OPEN:
                    state.client = _server._CLOSED
                _server._abort(state, event.call, cygrpc.StatusCode.unimplemented, _NO_MESSAGE)
            finished = _server._possibly_finish_call(state, _server._RECEIVE_MESSAGE_TOKEN)
        if message is None:
            call.end()
            return finished
        try:
            behavior.begin(message, call)
        except BaseException:
            # An error here would end the polling thread, and with it the server.
            _log.exception("a call could not be taken over")
            call.refuse(grpc.StatusCode.INTERNAL, "the server could not read the request")
        return finished

    operations = (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),)
    event.call.start_server_batch(operations, arrived)
    state.due.add(_server._RECEIVE_MESSAGE_TOKEN)


class UnaryCall:
    """One call of gRPC's, see `Call`."""

    __slots__ = ("_ended", "_event", "_pool", "_run", "_serializer", "_state")

    def __init__(
        self, pool: DirectPool, event: Any, state: Any, run: Callable[..., Any], serializer: Any
    ) -> None:
        self._pool = pool
        self._event = event
        self._state = state
        self._run = run
        self._serializer = serializer
        self._ended = False

    def remaining_s(self) -> float:
        return max(0.0, float(self._event.call_details.deadline) - time.time())

    def active(self) -> bool:
        from grpc import _server

        return bool(_server._is_rpc_state_active(self._state))

    def peer(self) -> str:
        return str(self._context().peer())

    def name_version(self, version: str) -> None:
        self._state.trailing_metadata = version_metadata(version)

    def send(self, *response: Bytes) -> None:
        from grpc import _server

        _server._status(self._event, self._state, b"".join(response))
        self.end()

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        self.reject(status, details)
        self.end()

    def reject(self, status: grpc.StatusCode, details: str) -> None:
        """As `refuse`, for a call that the pool does not count."""
        from grpc import _server

        context = self._context()
        context.set_code(status)
        context.set_details(details)
        _server._status(self._event, self._state, None)

    def run(self, handle: Callable[[Any, grpc.ServicerContext], object], request: object) -> None:
        from grpc import _server

        def work() -> None:
            try:
                self._run(
                    _server._unary_response_in_pool,
                    self._event,
                    self._state,
                    handle,
                    lambda: request,
                    None,
                    self._serializer,
                )
            finally:
                self.end()

        try:
            self._pool.start(work)
        except RuntimeError:
            self.refuse(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def end(self) -> None:
        """It is no work of the pool's any more; a second call does nothing."""
        if not self._ended:
            self._ended = True
            self._pool.leave()

    def _context(self) -> Any:
        from grpc import _server

        return _server._Context(self._event, self._state, None)


class Wire(Protocol):
    """The network's side of a stream."""

    def remaining_s(self) -> float:
        """Seconds until the caller's deadline; very many without one."""
        ...

    def active(self) -> bool:
        """Whether somebody is there."""
        ...

    def peer(self) -> str:
        """Who calls, see `Call`."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a message, after those that were written before; from any thread."""
        ...

    def read_on(self) -> None:
        """Go on reading, after `Stream.received` said that it does not want more."""
        ...

    def end(self, status: grpc.StatusCode, details: str) -> None:
        """End the call once all is sent."""
        ...


class Stream(Protocol):
    """Our side of a stream. None of these waits, or raises."""

    def received(self, frame: bytes) -> bool:
        """A message came; whether further ones are wanted now."""
        ...

    def sent(self) -> None:
        """A message that was written has been sent."""
        ...

    def no_more(self) -> None:
        """The caller sends nothing more."""
        ...


class DirectStream:
    """One call of gRPC's with many messages each way, read and written without a thread."""

    def __init__(self, event: Any, state: Any, open_stream: Callable[[Wire], Stream]) -> None:
        self._event = event
        self._state = state
        self._lock = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._sending = False
        self._ended: tuple[grpc.StatusCode, str] | None = None
        self._stream = open_stream(self)

    def begin(self) -> None:
        """Read the first message. The state's lock is held."""
        self.read_on()

    def remaining_s(self) -> float:
        return max(0.0, float(self._event.call_details.deadline) - time.time())

    def active(self) -> bool:
        from grpc import _server

        return bool(_server._is_rpc_state_active(self._state))

    def peer(self) -> str:
        from grpc import _server

        return str(_server._Context(self._event, self._state, None).peer())

    def read_on(self) -> None:
        from grpc import _server
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        operations = (cygrpc.ReceiveMessageOperation(_server._EMPTY_FLAGS),)
        with self._state.condition:
            if self.active():
                self._event.call.start_server_batch(operations, self._arrived)
                self._state.due.add(_server._RECEIVE_MESSAGE_TOKEN)

    def write(self, frame: bytes) -> None:
        with self._lock:
            self._unsent.append(frame)
            if self._sending:
                return
            self._sending = True
        self._send_next()

    def end(self, status: grpc.StatusCode, details: str) -> None:
        with self._lock:
            self._ended = self._ended or (status, details)
            if self._sending:
                return
            self._sending = True
        self._send_next()

    def _send_next(self) -> None:
        """Send what is next; whoever comes here has set `_sending`."""
        from grpc import _server
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        with self._lock:
            frame = self._unsent.popleft() if self._unsent else None
            if frame is None and self._ended is None:
                self._sending = False
                return
        with self._state.condition:
            if not self.active():
                return
            if frame is None:
                assert self._ended is not None
                context = _server._Context(self._event, self._state, None)
                context.set_code(self._ended[0])
                context.set_details(self._ended[1])
                _server._status(self._event, self._state, None)
                return
            operations = [cygrpc.SendMessageOperation(frame, _server._EMPTY_FLAGS)]
            if self._state.initial_metadata_allowed:
                first = _server._get_initial_metadata_operation(self._state, None)
                operations.insert(0, first)
                self._state.initial_metadata_allowed = False
            self._event.call.start_server_batch(operations, self._sent)
            self._state.due.add(_server._SEND_MESSAGE_TOKEN)

    # On the polling thread.

    def _arrived(self, received: Any) -> Any:
        from grpc import _server

        message = received.batch_operations[0].message()
        with self._state.condition:
            finished = _server._possibly_finish_call(self._state, _server._RECEIVE_MESSAGE_TOKEN)
        try:
            if message is None:
                self._stream.no_more()
            elif self._stream.received(message):
                self.read_on()
        except BaseException:
            # An error here would end the polling thread, and with it the server.
            _log.exception("a message of a stream could not be read")
            self.end(grpc.StatusCode.INTERNAL, "the server could not read the request")
        return finished

    def _sent(self, _: Any) -> Any:
        from grpc import _server

        with self._state.condition:
            finished = _server._possibly_finish_call(self._state, _server._SEND_MESSAGE_TOKEN)
        try:
            self._stream.sent()
            self._send_next()
        except BaseException:
            _log.exception("a stream could not go on")
        return finished
