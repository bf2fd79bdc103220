"""ComputeStream: many requests over one call, each answered as Compute would, when its answer is ready.

    frame ─► request with the caller's id ─► as a unary call of its own ─► frame with that id

A stream reads on while at most `WINDOW` of its requests are unanswered, or their answers unsent: what one
caller can make the server hold is bounded by that, and by the pool of all calls, whose limit counts here too.
A request that is withdrawn, or whose time is over, is answered by nothing, or by a refusal, as a unary call.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError

from splitlearn_comm.core import frames
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2.calls import Call, Wire
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.pool import BoundedPool

WINDOW = 64
"""Requests of one stream that are under way at a time."""

Begin = Callable[[compute_pb2.ComputeRequest, Bytes, Call], None]


class Streams:
    """All that are open.

    Args:
        begin: takes one request over, without waiting.
        pool: counts them, and has threads for those that wait.
        max_message_length: bytes of an answer; a larger one would end all of its stream.
    """

    def __init__(self, begin: Begin, pool: BoundedPool, max_message_length: int) -> None:
        self._begin = begin
        self._pool = pool
        self._max_message_length = max_message_length
        self._open: weakref.WeakSet[RequestStream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._stopping = False

    def open(self, wire: Wire) -> RequestStream:
        """A stream over `wire`."""
        stream = RequestStream(wire, self._begin, self._pool, self._max_message_length)
        with self._lock:
            self._open.add(stream)
            stopping = self._stopping
        if stopping:
            stream.stop()
        return stream

    def stop(self) -> None:
        """Let all end once what they asked is answered; nothing more is read."""
        with self._lock:
            self._stopping = True
            streams = list(self._open)
        for stream in streams:
            stream.stop()

    def handle(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """A stream in gRPC's own way: this thread sends, and one beside it reads."""
        wire = _QueuedWire(context)
        stream = self.open(wire)
        threading.Thread(target=wire.read, args=(requests, stream), daemon=True).start()
        yield from wire.sending(stream)


class RequestStream:
    """One stream, see `splitlearn_comm.http2.calls.Stream`."""

    def __init__(
        self, wire: Wire, begin: Begin, pool: BoundedPool, max_message_length: int
    ) -> None:
        self.wire = wire
        self.pool = pool
        self.max_message_length = max_message_length
        self._begin = begin
        self._lock = threading.Lock()
        self._calls: dict[int, StreamedCall] = {}
        self._held = 0
        self._paused = False
        self._over: tuple[grpc.StatusCode, str] | None = None

    def received(self, frame: Bytes) -> bool:
        """A request came; whether more are wanted now."""
        try:
            streamed, request, data = _read(frame)
        except DecodeError:
            self.wire.end(grpc.StatusCode.INVALID_ARGUMENT, "the message is no StreamedRequest")
            return False
        if not streamed.HasField("request"):
            with self._lock:
                withdrawn = self._calls.get(streamed.id)
            if withdrawn is not None:
                withdrawn.withdraw()
            return True
        call = StreamedCall(self, streamed)
        with self._lock:
            known = self._calls.setdefault(streamed.id, call)
            self._held += 1
            self._paused = self._held >= WINDOW
            reads_on = not self._paused and self._over is None
        if known is not call:
            text = f"id: request {streamed.id} of this stream has no answer yet; give each an id of its own"
            call.refuse(grpc.StatusCode.INVALID_ARGUMENT, text)
        elif self.pool.full:
            text = f"the server has {self.pool.limit} compute calls under way, its limit; try again later"
            call.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        else:
            call.counted = True
            self.pool.enter()
            self._begin(request, data, call)
        return reads_on

    def sent(self) -> None:
        """An answer has gone out."""
        self._let_go()

    def no_more(self) -> None:
        """The caller is done, apart from the answers."""
        self._end(grpc.StatusCode.OK, "")

    def stop(self) -> None:
        """End once what was asked is answered."""
        self._end(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def answer(self, call: StreamedCall, *frame: Bytes) -> None:
        """A request is over; without a frame it was withdrawn."""
        with self._lock:
            if self._calls.get(call.number) is call:
                del self._calls[call.number]
        if call.counted:
            self.pool.leave()
        if frame:
            self.wire.write(*frame)
        else:
            self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._held -= 1
            reads_on = self._paused and self._held < WINDOW and self._over is None
            if reads_on:
                self._paused = False
            over = self._over if not self._held else None
        if reads_on:
            self.wire.read_on()
        if over is not None:
            self.wire.end(*over)

    def _end(self, status: grpc.StatusCode, details: str) -> None:
        with self._lock:
            self._over = self._over or (status, details)
            over = self._over if not self._held else None
        if over is not None:
            self.wire.end(*over)


class StreamedCall:
    """One request of a stream, see `splitlearn_comm.http2.calls.Call`."""

    def __init__(self, stream: RequestStream, streamed: compute_pb2.StreamedRequest) -> None:
        self.number = streamed.id
        self.counted = False
        self._stream = stream
        self._withdrawn = False
        self._version = ""
        self._until_s = (
            time.monotonic() + streamed.timeout_s if streamed.HasField("timeout_s") else None
        )

    def remaining_s(self) -> float:
        of_stream = self._stream.wire.remaining_s()
        if self._until_s is None:
            return of_stream
        return min(of_stream, max(0.0, self._until_s - time.monotonic()))

    def active(self) -> bool:
        return not self._withdrawn and self._stream.wire.active()

    def peer(self) -> str:
        return self._stream.wire.peer()

    def withdraw(self) -> None:
        """Nobody waits for it any more."""
        self._withdrawn = True

    def name_version(self, version: str) -> None:
        self._version = version

    def send(self, *response: Bytes) -> None:
        frame = frames.enclosed(response, self._id())
        size, limit = sum(map(len, frame)), self._stream.max_message_length
        if size > limit:
            text = f"the answer is a message of {size} bytes; the most that is sent is {limit}"
            self.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            return
        self._answer(*frame)

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        refusal = compute_pb2.Refusal(code=status.value[0], message=details)
        message = compute_pb2.StreamedResponse(id=self.number, refusal=refusal)
        self._answer(message.SerializeToString())

    def run(
        self, handle: Callable[[object, grpc.ServicerContext], object], request: object
    ) -> None:
        def work() -> None:
            context = _StreamedContext(self)
            try:
                response = handle(request, context)  # type: ignore[arg-type]
            except _Aborted as aborted:
                self.refuse(aborted.status, aborted.details)
            else:
                assert isinstance(response, bytes)
                self.send(response)

        try:
            self._stream.pool.start(work)
        except RuntimeError:
            self.refuse(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    def _answer(self, *frame: Bytes) -> None:
        self._stream.answer(self, *(() if self._withdrawn else frame))

    def _id(self) -> bytes:
        told = compute_pb2.StreamedResponse(id=self.number, version=self._version)
        return told.SerializeToString()


class _Aborted(Exception):
    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


class _StreamedContext:
    """What handlers use of gRPC's context, for one request of a stream."""

    def __init__(self, call: StreamedCall) -> None:
        self.time_remaining = call.remaining_s
        self.is_active = call.active
        self.peer = call.peer
        self._call = call

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        for _, version in metadata:
            self._call.name_version(version)

    def abort(self, status: grpc.StatusCode, details: str) -> NoReturn:
        raise _Aborted(status, details)


class _QueuedWire:
    """A stream whose messages a generator sends, and a thread reads."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._out: queue.SimpleQueue[bytes | tuple[grpc.StatusCode, str]] = queue.SimpleQueue()
        self._may_read = threading.Semaphore(0)
        context.add_callback(lambda: self.end(grpc.StatusCode.CANCELLED, ""))

    def remaining_s(self) -> float:
        remaining = self._context.time_remaining()
        return float("inf") if remaining is None else float(remaining)

    def active(self) -> bool:
        return bool(self._context.is_active())

    def peer(self) -> str:
        return str(self._context.peer())

    def write(self, *frame: Bytes) -> None:
        self._out.put(b"".join(frame))

    def read_on(self) -> None:
        self._may_read.release()

    def end(self, status: grpc.StatusCode, details: str) -> None:
        self._out.put((status, details))

    def read(self, requests: Iterator[bytes], stream: RequestStream) -> None:
        """Hand the messages over until there are no more."""
        try:
            for frame in requests:
                if not stream.received(frame):
                    self._may_read.acquire()
            stream.no_more()
        except Exception:
            # gRPC's way of saying that the caller is gone.
            self.end(grpc.StatusCode.CANCELLED, "")

    def sending(self, stream: RequestStream) -> Iterator[bytes]:
        """What is to be sent, until the end."""
        try:
            while isinstance(frame := self._out.get(), bytes):
                yield frame
                stream.sent()
        finally:
            # The reader, if it waits, finds nobody there; gRPC may end this in the midst of an answer.
            self._may_read.release()
        if frame[0] is not grpc.StatusCode.OK:
            self._context.abort(*frame)


def _read(
    frame: Bytes,
) -> tuple[compute_pb2.StreamedRequest, compute_pb2.ComputeRequest, Bytes]:
    """The request with its id and time limit, what it asks, and the bytes of its tensor."""
    taken = frames.take_apart(frame)
    streamed = compute_pb2.StreamedRequest.FromString(bytes(frame) if taken is None else taken[1])
    if taken is not None and streamed.HasField("request"):
        # A message that comes twice is merged, which only the whole frame tells.
        taken, streamed = None, compute_pb2.StreamedRequest.FromString(bytes(frame))
    if taken is None:
        return streamed, streamed.request, streamed.request.data
    request, data = frames.read(compute_pb2.ComputeRequest(), taken[0])
    streamed.request.SetInParent()
    return streamed, request, data
