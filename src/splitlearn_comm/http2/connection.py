"""What arrives on one connection: frames, the calls that they begin and carry, and flow control.

    bytes ─► frames ─► headers: a call, and who handles it
                   └► data: its messages, each handed over as it is complete
                   └► what the other end takes, asks and ends

Only the polling thread comes here, but for the methods of `StreamOfCall`. What the other end does wrong ends
its connection (`ConnectionFault`) or its call, never anything else.

Of the whole connection a caller may send as much as it likes: what is held is bounded for each call (see
`stream`), and calls by the server. Connections take turns: what one has sent beyond what can be looked at in
`TURN_S` waits for the next look, and nothing more of it is read until then.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import sys
import termios
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from splitlearn_comm.http2 import frames, headers
from splitlearn_comm.http2.frames import ConnectionFault
from splitlearn_comm.http2.headers import CallHead, HeaderReader
from splitlearn_comm.http2.messages import MessageFault
from splitlearn_comm.http2.outgoing import Outgoing
from splitlearn_comm.http2.stream import WINDOW, StreamOfCall

_log = logging.getLogger(__name__)

TURN_S = 0.005
"""So long the frames of one connection are taken, however many and small, before others are looked at. An
honest burst of a hundred calls is shorter."""
_FRAME_BYTES = 1 << 20
"""The largest frame that is taken; only those of messages may be so large."""
_MOST_OTHER_BYTES = 64 * 1024
"""The largest frame, and the longest headers, that are no message's."""
_GIVE_BACK_AT = 1 << 30
_STRAIGHT_BYTES = 64 * 1024
"""If a message lacks so much, it is read to where it belongs, without a copy. Other data is taken in pieces
that are no larger."""

_HELLO = frames.settings(
    {
        frames.INITIAL_WINDOW: WINDOW,
        frames.MAX_FRAME: _FRAME_BYTES,
        frames.MAX_HEADERS: headers.MAX_HEADERS_BYTES,
    }
) + frames.window_update(0, frames.LARGEST_WINDOW - frames.FIRST_WINDOW)


class Host(Protocol):
    """The server that a connection belongs to."""

    max_message_length: int

    def begin(self, stream: StreamOfCall) -> None:
        """Find a handler for a new call, or refuse it."""
        ...

    def ended(self, stream: StreamOfCall) -> None:
        """A call has ended; on any thread."""
        ...

    def soon(self, work: Callable[[], None]) -> None:
        """Have the polling thread do something."""
        ...

    def aside(self, work: Callable[[], None]) -> None:
        """Have another thread do something that takes long.

        Raises:
            RuntimeError: if there is too much of that.
        """
        ...

    def watch(self, connection: Connection) -> None:
        """Tell the connection when the system takes more."""
        ...

    def closed(self, connection: Connection) -> None:
        """The connection is no more."""
        ...


class Connection:
    """See the module's text.

    Args:
        connection: a socket that does not block.
        peer: who is at the other end, see `splitlearn_comm.http2.calls.Call`.

    Attributes:
        is_behind: its turn was over before all was taken that was read; `read` is to be called again soon,
            whether more arrives or not.
    """

    def __init__(self, host: Host, connection: socket.socket, peer: str) -> None:
        self._host = host
        self.max_message_length = host.max_message_length
        self.soon, self.ended, self.aside = host.soon, host.ended, host.aside
        self.socket = connection
        self.peer = peer
        self.streams: dict[int, StreamOfCall] = {}
        self.outgoing = Outgoing(
            connection, lambda: host.watch(self), lambda: host.soon(self.close)
        )
        self.is_behind = False
        self._headers = HeaderReader()
        self._rest = b""
        self._greeted = False
        # The latest call that was begun, and the latest that was taken: while leaving, none is.
        self._begun = 0
        self._last = 0
        self._leaving = False
        self._closed = False
        self._took = 0
        # Of the frame of data that is arriving: its stream, what it lacks, the padding behind it, its flags.
        self._stream: StreamOfCall | None = None
        self._lacks = 0
        self._padding = 0
        self._flags = 0
        # Of headers that come in several frames.
        self._block: bytearray | None = None
        self._block_of = (0, 0)

    def read(self, scratch: memoryview) -> None:
        """Take what has arrived; `scratch` is room for it."""
        try:
            straight = self._straight() if self._lacks >= _STRAIGHT_BYTES else None
            if self.is_behind:
                size = len(self._rest)
                self._parse(memoryview(self._rest))
            elif straight is not None:
                size = self.socket.recv_into(straight[1])
                if size:
                    self._took_straight(straight[0], size)
            else:
                begin = len(self._rest)
                scratch[:begin] = self._rest
                size = self.socket.recv_into(scratch[begin:])
                if size:
                    self._parse(scratch[: begin + size])
            if not self.is_behind:
                self.outgoing.go_on()
        except BlockingIOError:
            return
        except ConnectionFault as fault:
            _log.debug("peer=%s code=%d %s", self.peer, fault.code, fault.why)
            self.outgoing.control(frames.go_away(self._last, fault.code, fault.why))
            size = 0
        except OSError:
            size = 0
        if not size:
            self.close()

    def leave(self) -> None:
        """Take no new calls, and say so."""
        if not self._leaving:
            self._leaving = True
            why = "the server is stopping"
            self.outgoing.control(frames.go_away(self._last, frames.NO_ERROR, why))

    @property
    def is_taken(self) -> bool:
        """Whether the other end, or its system, has all that was sent; on any thread.

        What our own system still has of it is lost as the connection is closed, if the other end sends
        anything then: and callers do, as they read.
        """
        return self.outgoing.is_empty and not self._unsent_bytes()

    def close(self) -> None:
        """End the connection and all its calls; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.is_behind = False
        self.outgoing.close()
        self._host.closed(self)
        self.socket.close()
        for stream in list(self.streams.values()):
            self._gone(stream)

    def _unsent_bytes(self) -> int:
        if self.socket.family == socket.AF_UNIX:
            return 0  # they are with the other end at once
        try:
            answer = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError):
            return 0  # it is closed, or the system does not tell
        return int.from_bytes(answer, sys.byteorder)

    # Frames.

    def _parse(self, data: memoryview) -> None:
        at, end = 0, len(data)
        until_s = time.monotonic() + TURN_S
        self.is_behind = False
        if not self._greeted:
            size = len(frames.PREFACE)
            if data[: min(end, size)] != frames.PREFACE[:end]:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
            if end < size:
                self._rest = bytes(data)
                return
            self._greeted = True
            self.outgoing.control(_HELLO)
            at = size
        while True:
            if 0 < at < end and time.monotonic() > until_s:
                self.is_behind = True
                break
            if self._lacks:
                taken = min(self._lacks, end - at, _STRAIGHT_BYTES)
                if taken:
                    self._lacks -= taken
                    self._take_data(data[at : at + taken])
                    at += taken
                if self._lacks:
                    if at == end:
                        break
                    continue
                self._end_of_data()
            if self._padding:
                taken = min(self._padding, end - at)
                self._padding -= taken
                at += taken
            if end - at < frames.HEAD_BYTES:
                break
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            kind, flags, stream = frames.rest_of_head(data, at + 3)
            stream &= frames.LARGEST_WINDOW
            if kind == frames.DATA:
                if flags & frames.PADDED and end - at == frames.HEAD_BYTES:
                    break
                at += frames.HEAD_BYTES
                at += self._begin_data(size, flags, stream, data[at : at + 1])
                continue
            if size > _MOST_OTHER_BYTES:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            if end - at < frames.HEAD_BYTES + size:
                break
            at += frames.HEAD_BYTES
            self._take_frame(kind, flags, stream, bytes(data[at : at + size]))
            at += size
        self._rest = bytes(data[at:])

    def _take_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and kind != frames.CONTINUATION:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "headers that are not continued")
        take = _TAKE.get(kind)
        if take is not None:
            take(self, flags, number, payload)

    # Data.

    def _begin_data(self, size: int, flags: int, number: int, first: memoryview) -> int:
        """A frame of data begins; how many bytes behind its head are no data."""
        if self._block is not None or not number or number > self._begun:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "data of no call")
        if size > _FRAME_BYTES:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
        self._took += size
        if self._took >= _GIVE_BACK_AT:
            self.outgoing.control(frames.window_update(0, self._took))
            self._took = 0
        # A call that has ended may have been sent more before its caller heard of that.
        self._stream = stream = self.streams.get(number)
        if stream is not None:
            stream.granted -= size
            if stream.granted < 0:
                self._break(stream, frames.FLOW_CONTROL_ERROR)
            elif stream.is_ending:
                self._break(stream, frames.PROTOCOL_ERROR)
            stream.is_ending = bool(flags & frames.END_STREAM)
        self._flags = flags
        skipped = 0
        if flags & frames.PADDED:
            skipped, self._padding = 1, first[0] if size else 0
            if self._padding >= size:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "more padding than data")
            size -= 1 + self._padding
        self._lacks = size
        if not size:
            self._end_of_data()
        return skipped

    def _take_data(self, piece: memoryview) -> None:
        stream = self._stream
        if stream is None or not stream.active:
            return
        try:
            for message in stream.assembly.feed(piece):
                if stream.active:
                    stream.take(message)
        except MessageFault as fault:
            stream.finish(fault.status, fault.details)
            return
        stream.grant()

    def _end_of_data(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._flags & frames.END_STREAM:
            self._sender_done(stream)
        else:
            # Padding took of the window too, where there was nothing else.
            stream.grant()

    def _sender_done(self, stream: StreamOfCall) -> None:
        stream.is_whole = True
        if stream.active and stream.assembly.is_within:
            stream.finish(grpc.StatusCode.INTERNAL, "the call ended within a message")
        stream.is_ending = True
        stream.sender_done()

    def _straight(self) -> tuple[StreamOfCall, memoryview] | None:
        """Where the data of the present frame may be read to, without a copy."""
        stream = self._stream
        if stream is None or not stream.active:
            return None
        room = stream.assembly.room()
        if room is None or len(room) < _STRAIGHT_BYTES:
            return None
        return stream, room[: self._lacks]

    def _took_straight(self, stream: StreamOfCall, size: int) -> None:
        self._lacks -= size
        message = stream.assembly.filled(size)
        if message is not None:
            stream.take(message)
        stream.grant()
        if not self._lacks:
            self._end_of_data()

    # Headers.

    def _take_headers(self, flags: int, number: int, payload: bytes) -> None:
        begin, end = 0, len(payload)
        if flags & frames.PADDED:
            begin, end = 1, end - payload[0] if payload else -1
        if flags & frames.PRIORITY:
            begin += 5
        if begin > end:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "more padding than headers")
        if not number % 2:
            raise ConnectionFault(frames.PROTOCOL_ERROR, f"a call with the number {number}")
        self._block_of = number, flags
        self._collect(flags, payload[begin:end])

    def _take_continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or number != self._block_of[0]:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "no headers that could be continued")
        self._collect(flags, payload)

    def _collect(self, flags: int, part: bytes) -> None:
        if self._block is not None:
            self._block += part
            if len(self._block) > _MOST_OTHER_BYTES:
                raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "headers without an end")
        if not flags & frames.END_HEADERS:
            self._block = bytearray(part) if self._block is None else self._block
            return
        block, self._block = self._block, None
        # Whatever becomes of them, they are read: later ones may refer to them.
        head = self._headers.read(part if block is None else bytes(block))
        number, first_flags = self._block_of
        stream = self.streams.get(number)
        if stream is not None:
            if not first_flags & frames.END_STREAM or stream.is_ending:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "headers within a call")
            self._sender_done(stream)
        elif number > self._begun:
            self._begun = number
            self._begin_call(number, head, first_flags)

    def _begin_call(self, number: int, head: CallHead, flags: int) -> None:
        if self._leaving:
            self.outgoing.control(frames.reset(number, frames.REFUSED_STREAM))
            return
        self._last = number
        if head.fault:
            tail = headers.trailers(grpc.StatusCode.INTERNAL, head.fault)
            begin = headers.no_call_head(head.http_status)
            self.outgoing.turn_away(number, begin, tail, stop=not flags & frames.END_STREAM)
            return
        stream = StreamOfCall(self, number, head)
        stream.is_ending = bool(flags & frames.END_STREAM)
        self.streams[number] = stream
        self._host.begin(stream)
        if flags & frames.END_STREAM:
            self._sender_done(stream)

    # All other frames.

    def _take_reset(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4 or not number or number > self._begun:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "an end of no call")
        stream = self.streams.get(number)
        if stream is not None:
            self._break(stream, None)

    def _take_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % frames.SETTING_BYTES or (flags & frames.ACK and payload):
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "settings of another size")
        if flags & frames.ACK:
            return
        window: int | None = None
        frame_size: int | None = None
        for at in range(0, len(payload), frames.SETTING_BYTES):
            name, value = frames.setting_at(payload, at)
            if name == frames.INITIAL_WINDOW:
                if value > frames.LARGEST_WINDOW:
                    raise ConnectionFault(frames.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                window = value
            elif name == frames.MAX_FRAME:
                if not frames.LEAST_MAX_FRAME <= value <= frames.LARGEST_MAX_FRAME:
                    raise ConnectionFault(frames.PROTOCOL_ERROR, f"frames of {value} bytes")
                frame_size = value
        self.outgoing.agree(window, frame_size)

    def _take_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != 8:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "a ping of another size")
        if not flags & frames.ACK:
            self.outgoing.control(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _take_window(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, "a window of another size")
        more = frames.number_at(payload)[0] & frames.LARGEST_WINDOW
        if number > self._begun:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a window of no call")
        stream = self.streams.get(number)
        if number and stream is None:
            return  # of a call that is over
        try:
            if not more:
                raise OverflowError
            self.outgoing.widen(None if stream is None else stream.lane, more)
        except OverflowError:
            if stream is None:
                why = "a window that cannot be"
                raise ConnectionFault(frames.FLOW_CONTROL_ERROR, why) from None
            self._break(stream, frames.FLOW_CONTROL_ERROR)

    def _take_promise(self, flags: int, number: int, payload: bytes) -> None:
        raise ConnectionFault(frames.PROTOCOL_ERROR, "a caller promises nothing")

    def _break(self, stream: StreamOfCall, code: int | None) -> None:
        self.outgoing.drop(stream.lane, code)
        self._gone(stream)

    def _gone(self, stream: StreamOfCall) -> None:
        """Nobody waits for the answer any more."""
        stream.active = False
        stream.end()


_TAKE: dict[int, Callable[[Connection, int, int, bytes], None]] = {
    frames.HEADERS: Connection._take_headers,
    frames.CONTINUATION: Connection._take_continuation,
    frames.RESET: Connection._take_reset,
    frames.SETTINGS: Connection._take_settings,
    frames.PING: Connection._take_ping,
    frames.WINDOW_UPDATE: Connection._take_window,
    frames.PUSH_PROMISE: Connection._take_promise,
}
