"""One call on its connection: its messages as they arrive, its answer as it leaves, and its end.

A caller may send `WINDOW` bytes of each call unasked; more only for a message whose size is known and
allowed, and only while the call reads. A call counts until its answer has gone out: what a server holds for
one who does not read is bounded like calls are.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import grpc

from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2 import frames, headers
from splitlearn_comm.http2.headers import CallHead, Metadata
from splitlearn_comm.http2.messages import Assembly, Compressed, MessageFault
from splitlearn_comm.http2.outgoing import Lane, Outgoing

_log = logging.getLogger(__name__)

WINDOW = 1 << 20
"""Bytes of a call that may arrive before anything of it was looked at."""
NEVER_S = float("inf")


class Handler(Protocol):
    """What a call is handled by, on the polling thread. None of these waits."""

    def message(self, message: Bytes) -> bool:
        """A message has arrived; whether more are wanted now."""
        ...

    def no_more(self) -> None:
        """The caller sends nothing more."""
        ...

    def over(self) -> None:
        """The call has ended, answered or not; called once, on any thread."""
        ...

    def sent(self) -> None:
        """A message has gone out; on any thread."""
        ...


class _Ended:
    """Handles a call that has ended, since it and what it was handled by would keep each other."""

    def message(self, message: Bytes) -> bool:
        return True

    def no_more(self) -> None:
        pass

    def over(self) -> None:
        pass

    def sent(self) -> None:
        pass


_ENDED = _Ended()


class Carrier(Protocol):
    """The connection that a call is on.

    Attributes:
        peer: who calls, see `splitlearn_comm.http2.calls.Call`.
        streams: the calls on it, by their numbers.
        max_message_length: bytes, each way.
    """

    peer: str
    streams: dict[int, StreamOfCall]
    outgoing: Outgoing
    max_message_length: int

    def soon(self, work: Callable[[], None]) -> None:
        """Have the polling thread do something."""
        ...

    def ended(self, stream: StreamOfCall) -> None:
        """A call has ended; on any thread."""
        ...

    def aside(self, work: Callable[[], None]) -> None:
        """Have another thread do something that takes long.

        Raises:
            RuntimeError: if there is too much of that.
        """
        ...


class StreamOfCall:
    """One call, until its answer has gone out. Its methods may be called from any thread.

    Attributes:
        head: what its headers say.
        until_s: the caller's deadline, on the clock of `time.monotonic`.
        active: whether somebody waits for the answer.
        trailing: metadata that ends the answer.
        handler: what the call is handled by.
        unpacking: a message of it is being unpacked, and no later one is handed over before that.
        is_ending: the last frame of its messages has begun; with `is_whole` all of them have arrived.
    """

    __slots__ = (
        "active",
        "assembly",
        "connection",
        "granted",
        "handler",
        "head",
        "held",
        "is_ending",
        "is_whole",
        "lane",
        "paused",
        "trailing",
        "unpacking",
        "until_s",
    )

    def __init__(self, connection: Carrier, number: int, head: CallHead) -> None:
        self.connection = connection
        self.head = head
        self.lane = Lane(number, self._sent, self.end)
        self.until_s = NEVER_S if head.timeout_s is None else time.monotonic() + head.timeout_s
        self.active = True
        self.trailing: Metadata = ()
        self.handler: Handler | None = None
        self.assembly = Assembly(connection.max_message_length, head.encoding)
        self.granted = WINDOW
        self.held: deque[Bytes | Compressed] = deque()
        self.paused = False
        self.unpacking = False
        self.is_ending = False
        self.is_whole = False

    def remaining_s(self) -> float:
        """Seconds until the caller's deadline; infinite without one."""
        return max(0.0, self.until_s - time.monotonic())

    def peer(self) -> str:
        """Who calls, see `splitlearn_comm.http2.calls.Call`."""
        return self.connection.peer

    def answer(self, *parts: Bytes) -> None:
        """Send the one message of the answer, and end the call."""
        if self._fits(parts):
            self.active = False
            tail = headers.trailers(grpc.StatusCode.OK, "", self.trailing)
            self.connection.outgoing.send(self.lane, parts, tail)

    def begin_answer(self, metadata: Metadata) -> None:
        """Send the headers that begin the answer, with these added; nothing if it has begun."""
        if not self.lane.began:
            head = headers.answer_head(metadata)
            self.connection.outgoing.send(self.lane, None, head=head)

    def write(self, *parts: Bytes) -> None:
        """Send a message of the answer."""
        if self._fits(parts):
            self.connection.outgoing.send(self.lane, parts)

    def finish(self, status: grpc.StatusCode, details: str) -> None:
        """End the call with a status, after what was written."""
        self.active = False
        tail = headers.trailers(status, details, self.trailing)
        self.connection.outgoing.send(self.lane, None, tail, stop=not self.is_ending)

    def turn_away(self, status: grpc.StatusCode, details: str) -> None:
        """End a call that nothing was made of, whether its caller takes that or not."""
        stop, tail = not self.is_ending, headers.trailers(status, details)
        outgoing = self.connection.outgoing
        outgoing.turn_away(self.lane.number, headers.answer_head(), tail, stop=stop)
        self.end()

    def read_on(self) -> None:
        """Go on handing messages over."""
        self.connection.soon(self.resume)

    def end(self) -> None:
        """All of the call is over; a second call does nothing."""
        self.active = False
        if self.connection.streams.pop(self.lane.number, None) is None:
            return
        handler, self.handler = self.handler, _ENDED
        if handler is not None:
            handler.over()
        self.lane.forget()
        self.connection.ended(self)

    def _fits(self, parts: Sequence[Bytes]) -> bool:
        """Whether a message may be sent; the caller is told if not."""
        size, limit = sum(map(len, parts)), self.connection.max_message_length
        if size > limit:
            text = f"the answer is a message of {size} bytes; the most that is sent is {limit}"
            self.finish(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return size <= limit

    def _sent(self) -> None:
        if self.handler is not None:
            self.handler.sent()

    # On the polling thread.

    def take(self, message: Bytes | Compressed) -> None:
        """A message is complete."""
        if self.paused or self.unpacking:
            self.held.append(message)
            return
        if isinstance(message, Compressed):
            plain = self.assembly.plain_if_small(message)
            if plain is None:
                self._unpack_aside(message)
                return
            message = plain
        assert self.handler is not None
        try:
            self.paused = not self.handler.message(message)
        except Exception:
            # An error here would end the polling thread, and with it the server.
            _log.exception("a message could not be taken")
            self.finish(grpc.StatusCode.INTERNAL, "the server could not read the request")

    def resume(self) -> None:
        """Hand over what has arrived meanwhile, and ask for more."""
        self.paused = False
        while self.held and not self.paused and not self.unpacking and self.active:
            self.take(self.held.popleft())
        if self.is_whole and not self.held and not self.paused:
            self.sender_done()
        else:
            self.grant()

    def _unpack_aside(self, message: Compressed) -> None:
        """Unpack a message on another thread: what is tiny as it comes may take tenths of a second."""

        def unpack() -> None:
            try:
                if self.active:
                    plain = self.assembly.plain(message)
                    self.connection.soon(lambda: self._unpacked(plain))
            except MessageFault as fault:
                self.finish(fault.status, fault.details)
            except Exception:
                _log.exception("a message could not be unpacked")
                self.finish(grpc.StatusCode.INTERNAL, "the server could not read the request")

        self.unpacking = True
        try:
            self.connection.aside(unpack)
        except RuntimeError:
            text = "the server has too many compressed messages to unpack; try again later"
            self.finish(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _unpacked(self, plain: Bytes) -> None:
        self.unpacking = False
        self.held.appendleft(plain)
        self.resume()

    def grant(self) -> None:
        """Let the caller send on, if it should."""
        if self.paused or self.unpacking or self.is_whole or not self.active:
            return
        wanted = max(self.assembly.missing, WINDOW)
        if self.granted < wanted // 2 or self.granted < self.assembly.missing:
            more = wanted - self.granted
            self.granted += more
            self.connection.outgoing.control(frames.window_update(self.lane.number, more))

    def sender_done(self) -> None:
        """The caller sends nothing more."""
        self.is_whole = True
        if self.held or self.paused or self.unpacking or not self.active:
            return
        assert self.handler is not None
        try:
            self.handler.no_more()
        except Exception:
            _log.exception("a call could not go on")
            self.finish(grpc.StatusCode.INTERNAL, "the server could not go on")
