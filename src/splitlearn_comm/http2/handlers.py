"""How calls are handled: taken over, or by a thread of a pool as gRPC for Python does it.

taken over   `begin` or `open` of the handler's function, on the polling thread (see `calls`)
by a pool    the function itself, with the request or an iterator of requests and a context
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import grpc

from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2.calls import Stream, version_metadata
from splitlearn_comm.http2.context import DONE, Context, written
from splitlearn_comm.http2.stream import StreamOfCall

_log = logging.getLogger(__name__)

_READ_AHEAD = 8
"""Messages of a call that are read before its function asks for them."""


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
            if response is not DONE:
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
            self._requests.put(DONE)
        elif not self._begun:
            _no_message(self._stream)

    def sent(self) -> None:
        self._context.room.release()

    def over(self) -> None:
        self._requests.put(DONE)
        self._context.end()

    def stopping(self) -> None:
        """The server stops, which ends a call that is open for what may come, after what has come."""
        if not getattr(_function(self._handler), "ends_at_stop", False):
            return
        status, details = grpc.StatusCode.UNAVAILABLE, "the server is stopping"
        if self._handler.request_streaming:
            self._context.set_code(status)
            self._context.set_details(details)
            self._requests.put(DONE)
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
            if response is not DONE:
                context.answer(response, handler.response_serializer)
        elif getattr(function, "experimental_non_blocking", False):
            context.run(lambda: function(request, context, self._send))
        else:
            responses = context.run(lambda: function(request, context))
            if responses is not DONE:
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
        self._stream.write(written(self._handler.response_serializer, response))

    def _iterator(self) -> Iterator[object]:
        while True:
            message = self._requests.get()
            if message is DONE:
                # For whoever asks again.
                self._requests.put(DONE)
                return
            self._stream.read_on()
            yield _read(self._handler.request_deserializer, message)


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
