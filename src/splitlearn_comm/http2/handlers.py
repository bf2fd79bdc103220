"""How calls are handled: taken over, or by a thread of a pool as gRPC for Python does it.

taken over   `begin` or `open` of the handler's function, on the polling thread (see `calls`)
by a pool    the function itself, with the request or an iterator of requests and a context
"""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, NoReturn

import grpc

from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2.calls import Stream, version_metadata
from splitlearn_comm.http2.headers import Metadata
from splitlearn_comm.http2.stream import NEVER_S, StreamOfCall

_log = logging.getLogger(__name__)

_READ_AHEAD = 8
"""Messages of a call that are read before its function asks for them."""
_DONE = object()
_KEY = re.compile("[0-9a-z_.-]+")
_VALUE = re.compile("[ -~]*")


class TakenOver:
    """One message each way, taken over, see `splitlearn_comm.http2.calls.Call`.

    Args:
        begin: what takes the call over.
        pool: counts it until somebody has answered, whether the caller is still there or not, and has
            threads for what waits.
        serialize: for what such a thread answers.
    """

    __slots__ = ("_begin", "_begun", "_counts", "_pool", "_serialize", "_stream")

    def __init__(
        self,
        stream: StreamOfCall,
        begin: Callable[[Bytes, TakenOver], None],
        pool: Any,
        serialize: Callable[[Any], bytes] | None,
    ) -> None:
        self._stream = stream
        self._begin = begin
        self._serialize = serialize
        self._pool = pool
        self._begun = False
        self._counts = True
        pool.enter()

    # Of the connection's.

    def message(self, message: Bytes) -> bool:
        if not self._begun:
            self._begun = True
            try:
                self._begin(message, self)
            except BaseException:
                _log.exception("a call could not be taken over")
                self.refuse(grpc.StatusCode.INTERNAL, "the server could not read the request")
        return True

    def no_more(self) -> None:
        if not self._begun:
            _no_message(self._stream)

    def sent(self) -> None:
        pass

    def over(self) -> None:
        if not self._begun:
            self._leave()

    # Of whoever answers.

    def remaining_s(self) -> float:
        return self._stream.remaining_s()

    def active(self) -> bool:
        return self._stream.active

    def peer(self) -> str:
        return self._stream.peer()

    def name_version(self, version: str) -> None:
        self._stream.trailing = version_metadata(version)

    def send(self, *response: Bytes) -> None:
        self._stream.answer(*response)
        self._leave()

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        self._stream.finish(status, details)
        self._leave()

    def run(self, handle: Callable[[Any, grpc.ServicerContext], object], request: object) -> None:
        context = Context(self._stream)

        def work() -> None:
            response = context.run(lambda: handle(request, context))
            if response is not _DONE:
                context.answer(response, self._serialize)
            self._leave()

        try:
            self._pool.start(work)
        except RuntimeError:
            self.refuse(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _leave(self) -> None:
        if self._counts:
            self._counts = False
            self._pool.leave()


class TakenOverStream:
    """Many messages each way, taken over, see `splitlearn_comm.http2.calls.Wire`."""

    def __init__(self, stream: StreamOfCall, open_stream: Callable[[Any], Stream]) -> None:
        self._wire = stream
        self._ours = open_stream(self)

    # Of the connection's.

    def message(self, message: Bytes) -> bool:
        return self._ours.received(message)

    def no_more(self) -> None:
        self._ours.no_more()

    def sent(self) -> None:
        self._ours.sent()

    def over(self) -> None:
        self._ours.no_more()

    # Of our side's.

    def remaining_s(self) -> float:
        return self._wire.remaining_s()

    def active(self) -> bool:
        return self._wire.active

    def peer(self) -> str:
        return self._wire.peer()

    def write(self, *frame: Bytes) -> None:
        self._wire.write(*frame)

    def read_on(self) -> None:
        self._wire.read_on()

    def end(self, status: grpc.StatusCode, details: str) -> None:
        self._wire.finish(status, details)


class InPool:
    """Any call whose function a thread of a pool runs.

    A function with a true attribute `ends_at_stop` is one whose calls are open for what may come, and do not
    keep a server that stops.

    Args:
        handler: as registered.
        pool: runs it; while it is `full`, if it knows that, calls are refused.
    """

    def __init__(
        self, stream: StreamOfCall, handler: grpc.RpcMethodHandler[Any, Any], pool: Executor
    ) -> None:
        self._stream = stream
        self._handler = handler
        self._pool = pool
        self._context = Context(stream)
        self._requests: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._begun = False
        if handler.request_streaming:
            # A thread may send, and be told that it was sent, before this returns.
            stream.handler = self
            self._begin(self._iterator())

    # Of the connection's.

    def message(self, message: Bytes) -> bool:
        if self._handler.request_streaming:
            self._requests.put(message)
            return self._requests.qsize() < _READ_AHEAD
        if not self._begun:
            self._begin(message)
        return True

    def no_more(self) -> None:
        if self._handler.request_streaming:
            self._requests.put(_DONE)
        elif not self._begun:
            _no_message(self._stream)

    def sent(self) -> None:
        self._context.room.release()

    def over(self) -> None:
        self._requests.put(_DONE)
        self._context.end()

    def stopping(self) -> None:
        """The server stops, which ends a call that is open for what may come, after what has come."""
        if not getattr(_function(self._handler), "ends_at_stop", False):
            return
        status, details = grpc.StatusCode.UNAVAILABLE, "the server is stopping"
        if self._handler.request_streaming:
            self._context.set_code(status)
            self._context.set_details(details)
            self._requests.put(_DONE)
        else:
            self._stream.finish(status, details)

    # In the pool.

    def _begin(self, request: object) -> None:
        self._begun = True
        if getattr(self._pool, "full", False):
            # Calls count until they are over for their callers, and may wait here for longer than that.
            text = "the server has as many calls of this kind under way as it may; try again later"
            self._stream.finish(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        try:
            self._pool.submit(self._work, request)
        except RuntimeError:
            self._stream.finish(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _work(self, request: Any) -> None:
        handler, context = self._handler, self._context
        if not handler.request_streaming:
            try:
                request = _read(handler.request_deserializer, request)
            except Exception:
                text = "the message is not what the method takes"
                self._stream.finish(grpc.StatusCode.INVALID_ARGUMENT, text)
                return
        function = _function(handler)
        if not handler.response_streaming:
            response = context.run(lambda: function(request, context))
            if response is not _DONE:
                context.answer(response, handler.response_serializer)
        elif getattr(function, "experimental_non_blocking", False):
            context.run(lambda: function(request, context, self._send))
        else:
            responses = context.run(lambda: function(request, context))
            if responses is not _DONE:
                context.run(lambda: self._send_all(responses))

    def _send_all(self, responses: Iterable[object]) -> None:
        for response in responses:
            self._send(response)
            while self._stream.active and not self._context.room.acquire(timeout=1.0):
                pass  # the caller does not take it
            if not self._stream.active:
                return
        self._send(None)

    def _send(self, response: object) -> None:
        """Send a message; None ends the call."""
        if response is None:
            self._stream.finish(*self._context.status)
            return
        self._stream.write(_written(self._handler.response_serializer, response))

    def _iterator(self) -> Iterator[object]:
        while True:
            message = self._requests.get()
            if message is _DONE:
                # For whoever asks again.
                self._requests.put(_DONE)
                return
            self._stream.read_on()
            yield _read(self._handler.request_deserializer, message)


class Aborted(Exception):
    """Ends a handler whose call has been given its status."""


class Context(grpc.ServicerContext):
    """What handlers learn of their call, and tell about it."""

    def __init__(self, stream: StreamOfCall) -> None:
        self._stream = stream
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []
        self.room = threading.Semaphore(0)

    # What runs a handler.

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; `_DONE` if it raised, and the caller has been told."""
        try:
            return work()
        except Aborted:
            self._stream.finish(*self.status)
        except Exception as error:
            _log.exception("method=%s", self._stream.head.method)
            text = f"the server's handler raised {type(error).__name__}"
            self._stream.finish(grpc.StatusCode.UNKNOWN, text)
        return _DONE

    def answer(self, response: object, serialize: Callable[[Any], bytes] | None) -> None:
        """Send the one message of the answer, or the status that the handler has set instead."""
        if self.status[0] is not grpc.StatusCode.OK:
            self._stream.finish(*self.status)
            return
        data = self.run(lambda: _written(serialize, response))
        if data is not _DONE:
            self._stream.answer(data)

    @property
    def status(self) -> tuple[grpc.StatusCode, str]:
        """What the call ends with."""
        code = self._code or grpc.StatusCode.OK
        # What is no status, and no text, must not keep the call from ending.
        return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN, (
            str(self._details or "")
        )

    def end(self) -> None:
        """The call is over."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        self.room.release()
        for callback in callbacks or ():
            try:
                callback()
            except Exception:
                # It ends with the calls beside it, which must be told too.
                _log.exception("method=%s", self._stream.head.method)

    # As gRPC has it.

    def is_active(self) -> bool:
        return self._stream.active

    def time_remaining(self) -> float | None:  # type: ignore[override]
        left_s = self._stream.remaining_s()
        return None if left_s == NEVER_S else left_s

    def cancel(self) -> None:
        self._stream.finish(grpc.StatusCode.CANCELLED, "cancelled by the server")

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def invocation_metadata(self) -> Metadata:
        return self._stream.head.metadata

    def peer(self) -> str:
        return self._stream.peer()

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, bytes]:
        return {}

    def send_initial_metadata(self, initial_metadata: Any) -> None:
        self._stream.begin_answer(_as_metadata(initial_metadata))

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._stream.trailing = _as_metadata(trailing_metadata)

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self._code, self._details = code, details
        raise Aborted(details)

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        if status.trailing_metadata:
            self.set_trailing_metadata(status.trailing_metadata)
        self.abort(status.code, status.details)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details


def _as_metadata(pairs: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """What a handler adds to its answer.

    Raises:
        ValueError: if that cannot travel: told here, where the handler hears of it.
    """
    return tuple(_as_field(key, value) for key, value in pairs)


def _as_field(key: str, value: str | bytes) -> tuple[str, str | bytes]:
    if not _KEY.fullmatch(key):
        text = f"metadata {key!r}: a key has lower-case letters, digits and _ . - alone"
        raise ValueError(text)
    if key.endswith("-bin"):
        return key, value.encode() if isinstance(value, str) else bytes(value)
    text = value if isinstance(value, str) else bytes(value).decode("latin-1")
    if not _VALUE.fullmatch(text):
        raise ValueError(f"metadata {key!r}: a value is printable ASCII, or its key ends in -bin")
    return key, text


def _no_message(stream: StreamOfCall) -> None:
    stream.finish(grpc.StatusCode.UNIMPLEMENTED, "the call ended without a message")


def _function(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[..., Any]:
    name = "_".join(
        "stream" if streaming else "unary"
        for streaming in (handler.request_streaming, handler.response_streaming)
    )
    function: Callable[..., Any] = getattr(handler, name)
    return function


def _read(deserialize: Callable[[bytes], Any] | None, message: Any) -> Any:
    data = bytes(message)
    return data if deserialize is None else deserialize(data)


def _written(serialize: Callable[[Any], bytes] | None, response: Any) -> bytes:
    data: bytes = response if serialize is None else serialize(response)
    return data
