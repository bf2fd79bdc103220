"""What leaves on one connection, from any thread, and never waiting.

    answer ─► within the windows, and nothing waits before it? ─► one call of the system's
                └► a copy, until the caller takes more ─► the thread that looks at connections

Whoever has an answer sends it; what the system does not take at once, and what the caller's flow control
holds back, goes out when the polling thread hears that there is room. The parts of an answer may change once
`send` has returned: what is kept of them is copied.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2 import frames, headers, messages

_MOST_PARTS = 512
"""Parts of one call of the system's; the least that one allows is 1024."""
_AT_ONCE = 1 << 20
"""Bytes of one call's answer that are made ready before other calls on the connection have their turn."""
_COPIED_AT_MOST = 1 << 16
"""Of a message of several frames."""
_MOST_CONTROL_BYTES = 1 << 20
"""Of answers to pings and settings that wait, and of refusals of what does not count as a call; a caller who
does not read them is not kept."""
_LARGEST_FRAME = 1 << 20


class Lane:
    """One call's way out.

    Args:
        number: of its stream.
        sent: called when a message has gone out; on any thread, without locks.
        over: called when the end has gone out; likewise.

    Attributes:
        window: bytes that its caller takes of it, more or less than it takes of every call at first.
    """

    __slots__ = ("began", "ended", "number", "over", "queue", "sent", "tail", "window")

    def __init__(self, number: int, sent: Callable[[], None], over: Callable[[], None]) -> None:
        self.number = number
        self.window = 0
        self.sent = sent
        self.over = over
        self.began = False
        self.ended = False
        self.queue: deque[memoryview] = deque()
        self.tail = b""

    def forget(self) -> None:
        """Nobody need be told any more: its call is over, and would be kept by what it is told by."""
        self.sent = self.over = _nothing


class Outgoing:
    """See the module's text.

    Args:
        connection: a socket that does not block.
        wants_room: called, on any thread, when something waits for the system to take more.
        broken: called, on any thread, when nothing can be sent any more.
    """

    def __init__(
        self,
        connection: socket.socket,
        wants_room: Callable[[], None],
        broken: Callable[[], None],
    ) -> None:
        self._socket = connection
        self._wants_room = wants_room
        self._broken = broken
        self._lock = threading.Lock()
        self._window = frames.FIRST_WINDOW
        # Of every call at first. The settings change it for all that are under way, at no cost for each.
        self._first_window = frames.FIRST_WINDOW
        self._wider = False
        self._frame_size = frames.LEAST_MAX_FRAME
        self._backlog: deque[memoryview] = deque()
        self._control_bytes = 0
        self._waiting: dict[int, Lane] = {}
        self._closed = False

    # From any thread.

    def send(
        self,
        lane: Lane,
        parts: Sequence[Bytes] | None,
        tail: bytes = b"",
        head: bytes = b"",
        *,
        stop: bool = False,
    ) -> None:
        """Send a message of these parts, and with `tail`, a block of headers, end the call.

        Args:
            parts: None for no message.
            head: the block of headers that begins the answer, where it is not the usual one.
            stop: at the end, ask the caller to stop sending (RFC 9113, 8.1).
        """
        with self._lock:
            if lane.ended or self._closed:
                return
            lane.ended = bool(tail)
            first = last = b""
            if not lane.began:
                head = head or headers.answer_head()
                if tail and parts is None:
                    # One frame for all there is to say.
                    tail = head + tail
                else:
                    first = frames.headers(0, lane.number, head)
                lane.began = True
            if tail:
                last = _last(lane.number, tail, stop=stop)
            content: Sequence[Bytes] = ()
            size = 0
            if parts is not None:
                size = sum(map(len, parts))
                content = (messages.prefix(size), *parts)
                size += messages.PREFIX_BYTES
            # What carries no message need not fit into a window.
            room = not content or size <= self._room_of(lane)
            if room and not self._backlog and not self._waiting:
                self._window -= size
                lane.window -= size
                self._write(self._framed(lane, first, content, size, last))
                told = [lane.sent] if content else []
                if last:
                    told.append(lane.over)
            else:
                if first:
                    self._write_or_queue(first)
                if content:
                    lane.queue.append(memoryview(b"".join(content)))
                lane.tail = last
                if content or last:
                    self._waiting[lane.number] = lane
                told = self._pump()
        _tell(told)

    def control(self, data: bytes) -> None:
        """Send whole frames that no flow control holds back."""
        with self._lock:
            self._control(data)

    def turn_away(self, number: int, head: bytes, tail: bytes, *, stop: bool) -> None:
        """Answer a call, of which nothing is kept from then on, with these blocks of headers alone."""
        with self._lock:
            self._control(_last(number, head + tail, stop=stop))

    def drop(self, lane: Lane, code: int | None = None) -> None:
        """Send nothing more of a call; with a code, tell the other end."""
        with self._lock:
            lane.ended = True
            lane.queue.clear()
            lane.tail = b""
            self._waiting.pop(lane.number, None)
            if code is not None:
                # Nothing else counts what is left of a call that is over.
                self._control(frames.reset(lane.number, code))

    @property
    def is_empty(self) -> bool:
        """Whether all that was sent has gone out."""
        return not self._backlog and not self._waiting

    # On the polling thread.

    def flush(self) -> bool:
        """The system takes more; whether something still waits for it."""
        with self._lock:
            self._write_backlog()
            told = self._pump()
            waits = bool(self._backlog)
        _tell(told)
        return waits

    def widen(self, lane: Lane | None, more: int) -> None:
        """The other end takes more, of a call or (None) of all the connection; see `go_on`.

        Raises:
            OverflowError: if that is more than a window can be.
        """
        with self._lock:
            if lane is None:
                self._window += more
                window = self._window
            else:
                lane.window += more
                window = lane.window + self._first_window
            self._wider = True
        if window > frames.LARGEST_WINDOW:
            raise OverflowError

    def agree(self, first_window: int | None, frame_size: int | None) -> None:
        """Take the other end's settings over, and say so before anything is sent that follows from them.

        Args:
            first_window: what it takes of every call at first; None if it did not say.
            frame_size: the largest frame that it takes; likewise.
        """
        with self._lock:
            if first_window is not None:
                self._first_window = first_window
                self._wider = True
            if frame_size is not None:
                self._frame_size = min(frame_size, _LARGEST_FRAME)
            self._control(frames.frame(frames.SETTINGS, frames.ACK, 0))

    def go_on(self) -> None:
        """Send what windows had held back, once all has been read that widened them.

        All calls that wait are looked at for that: done for each frame, a caller that widens its windows byte
        by byte would keep the polling thread from everybody else.
        """
        if not self._wider:
            return
        with self._lock:
            self._wider = False
            told = self._pump()
        _tell(told)

    def close(self) -> None:
        """Nothing can be sent any more."""
        with self._lock:
            self._closed = True
            self._backlog.clear()
            self._waiting.clear()

    # The lock is held.

    def _room_of(self, lane: Lane) -> int:
        """Bytes of a call that its caller takes now."""
        return min(self._window, lane.window + self._first_window)

    def _framed(
        self, lane: Lane, first: bytes, content: Sequence[Bytes], size: int, last: bytes
    ) -> list[Bytes]:
        """What is written for a message of `size` bytes, with the frames before and after it."""
        if not size:
            return [first + last]
        if size <= self._frame_size:
            begin = first + frames.head(size, frames.DATA, 0, lane.number)
            return [begin, *content, last] if last else [begin, *content]
        out: list[Bytes] = [first] if first else []
        if size <= _COPIED_AT_MOST:
            # To copy it once is quicker than to look at each part for where a frame ends.
            content = (b"".join(content),)
        left = size
        room = 0
        for part in content:
            view = memoryview(part)
            while view:
                if not room:
                    room = min(left, self._frame_size)
                    left -= room
                    out.append(frames.head(room, frames.DATA, 0, lane.number))
                out.append(view[:room])
                taken = min(room, len(view))
                view = view[taken:]
                room -= taken
        if last:
            out.append(last)
        return out

    def _pump(self) -> list[Callable[[], None]]:
        """Send what waits as far as the windows go; who is to be told of what has gone."""
        told: list[Callable[[], None]] = []
        while self._waiting and not self._backlog and not self._closed:
            moved = False
            for lane in tuple(self._waiting.values()):
                if self._backlog or self._closed:
                    break
                size = min(self._room_of(lane), _AT_ONCE)
                content: list[Bytes] = []
                taken = 0
                while lane.queue and taken < size:
                    view = lane.queue[0]
                    part = view[: size - taken]
                    content.append(part)
                    taken += len(part)
                    if len(part) == len(view):
                        lane.queue.popleft()
                        told.append(lane.sent)
                    else:
                        lane.queue[0] = view[len(part) :]
                last = b"" if lane.queue else lane.tail
                del self._waiting[lane.number]
                if lane.queue:
                    self._waiting[lane.number] = lane  # behind the others
                if last:
                    told.append(lane.over)
                if taken or last:
                    moved = True
                    self._window -= taken
                    lane.window -= taken
                    self._write(self._framed(lane, b"", content, taken, last))
            if not moved:
                break
        return told

    def _control(self, data: bytes) -> None:
        if self._backlog:
            self._control_bytes += len(data)
        self._write_or_queue(data)
        if self._control_bytes > _MOST_CONTROL_BYTES:
            self._end()

    def _write_or_queue(self, data: bytes) -> None:
        if self._backlog:
            self._backlog.append(memoryview(data))
        elif not self._closed:
            self._write((data,))

    def _write(self, parts: Sequence[Bytes]) -> None:
        """Write what nothing waits before; keep a copy of what the system does not take."""
        at = 0
        while at < len(parts):
            some = parts if len(parts) <= _MOST_PARTS else parts[at : at + _MOST_PARTS]
            at += len(some)
            try:
                sent = self._socket.sendmsg(some)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._end()
                return
            if sent < sum(map(len, some)):
                self._backlog.append(_copied([*some, *parts[at:]], sent))
                self._wants_room()
                return

    def _write_backlog(self) -> None:
        while self._backlog:
            view = self._backlog[0]
            try:
                sent = self._socket.send(view)
            except BlockingIOError:
                return
            except OSError:
                self._end()
                return
            if sent < len(view):
                self._backlog[0] = view[sent:]
            else:
                self._backlog.popleft()
        self._control_bytes = 0

    def _end(self) -> None:
        self._closed = True
        self._backlog.clear()
        self._waiting.clear()
        self._broken()


def _nothing() -> None:
    pass


def _last(number: int, block: bytes, *, stop: bool) -> bytes:
    """The frames that end a call."""
    last = frames.headers(frames.END_STREAM, number, block)
    return last + frames.reset(number, frames.NO_ERROR) if stop else last


def _copied(parts: Sequence[Bytes], begin: int) -> memoryview:
    """The bytes of `parts` from `begin` on."""
    kept: list[memoryview] = []
    for part in parts:
        if begin < len(part):
            kept.append(memoryview(part)[begin:])
        begin = max(0, begin - len(part))
    return memoryview(b"".join(kept))


def _tell(told: Iterable[Callable[[], None]]) -> None:
    for tell in told:
        tell()
