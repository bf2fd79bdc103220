"""Many requests at a time over one ComputeStream; each has a future of its own.

The stream is opened by the first request, and again by the next one after it broke. What a server of version
1.0 answers to it (UNIMPLEMENTED) is remembered: from then on requests are made one by one, on a few threads.
Nothing is sent twice: a request whose stream broke fails, and whoever made it decides. One whose time is over
fails, whether the server says so or nothing at all.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
from google.protobuf.message import DecodeError

from splitlearn_comm.client.channel import ComputeChannel
from splitlearn_comm.client.errors import RemoteComputeError
from splitlearn_comm.client.time_limits import TimeLimits
from splitlearn_comm.core import frames
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.protocol import compute_pb2

_RPC = "ComputeStream"
_STATUSES = {status.value[0]: status for status in grpc.StatusCode}
_THREADS_WITHOUT_STREAMS = 8


class Asked(Future[tuple[compute_pb2.ComputeResponse, Bytes]]):
    """The answer to a request: the response, and the bytes of its tensor, which are missing in it.

    Attributes:
        frame: what is sent; empty once it is on its way.
        call: makes the request by itself, where the server has no streams.
        until_s: when its time is over, on `time.monotonic`.

    Args:
        waiting: all that no thread has taken; it is one of them from now on.
    """

    def __init__(
        self,
        frame: bytes,
        number: int,
        until_s: float,
        call: Callable[[], bytes],
        waiting: dict[int, Asked],
    ) -> None:
        super().__init__()
        self.frame = frame
        self.number = number
        self.until_s = until_s
        self.call = call
        self._waiting = waiting
        self._turn = threading.Lock()
        waiting[number] = self

    def take(self) -> bool:
        """Whether the calling thread, of all that may end it, is the one that does; never once withdrawn."""
        if not self._turn.acquire(blocking=False):
            return False
        self._waiting.pop(self.number, None)
        return self.set_running_or_notify_cancel()

    def fail(self, failure: RemoteComputeError) -> None:
        """There is no answer, unless another thread has one already."""
        if self.take():
            self.set_exception(failure)


class RequestStream:
    """See the module's text. Safe to use from several threads."""

    def __init__(self, channel: ComputeChannel) -> None:
        self._channel = channel
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._numbers = 0
        self._open: _Open | None = None
        self._has_streams = True
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: dict[int, Asked] = {}
        self._limits = TimeLimits(lambda: list(self._waiting.values()), self._late)

    @property
    def own(self) -> bool:
        """Whether this process has made it."""
        return self._owner == os.getpid()

    def ask(self, request: tuple[Bytes, ...], timeout_s: float, call: Callable[[], bytes]) -> Asked:
        """Send a request.

        Args:
            request: an encoded ComputeRequest, in parts.
            timeout_s: how long the answer may take.
            call: as for `Asked`; gives an encoded ComputeResponse.
        """
        until_s = time.monotonic() + timeout_s
        with self._lock:
            self._numbers += 1
            number = self._numbers
        rest = compute_pb2.StreamedRequest(id=number, timeout_s=timeout_s).SerializeToString()
        frame = b"".join(frames.enclosed(request, rest))
        asked = Asked(frame, number, until_s, call, self._waiting)
        limit = self._channel.max_message_length
        if self._has_streams and 0 <= limit < len(asked.frame):
            # gRPC would end the stream, with the requests of all others in it.
            text = f"the request has {len(asked.frame)} bytes; the most that is sent is {limit}"
            asked.fail(RemoteComputeError("Compute", grpc.StatusCode.RESOURCE_EXHAUSTED, text))
            return asked
        try:
            opened, failure = self._begin(asked)
            self._limits.watch(until_s)
        except BaseException:
            self.withdraw(asked)
            raise
        if opened is not None and failure is not None:
            # It has ended already, and nobody else will tell of this request.
            self._broke(opened, [asked], failure)
        return asked

    def _begin(self, asked: Asked) -> tuple[_Open | None, RemoteComputeError | None]:
        """Send it; by which stream, and why that has ended if it has."""
        with self._lock:
            if not self._has_streams:
                self._alone(asked)
                return None, None
            opened = self._open
            if opened is None or opened.send(asked) is not None:
                opened = self._open = _Open(self._channel, self._broke)
                return opened, opened.send(asked)
            return opened, None

    def withdraw(self, asked: Asked) -> None:
        """Nobody waits for it any more. Takes no lock: a generator that is collected as garbage does this."""
        self._waiting.pop(asked.number, None)
        asked.cancel()
        self._forget(asked)

    def no_more(self) -> None:
        """Nobody asks any more: what was asked is answered, then the stream ends. Takes no lock."""
        opened = self._open
        if opened is not None:
            opened.no_more()

    def close(self) -> None:
        """End the stream; what has no answer fails."""
        with self._lock:
            opened, self._open = self._open, None
            threads, self._threads = self._threads, None
        if opened is not None:
            opened.close()
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        # Nobody else tells of those that no thread has begun with.
        for asked in list(self._waiting.values()):
            asked.fail(RemoteComputeError(_RPC, grpc.StatusCode.CANCELLED, "the client was closed"))
        self._limits.look()

    def _broke(self, opened: _Open, left: list[Asked], failure: RemoteComputeError) -> None:
        """The stream has ended, and these have no answer."""
        with self._lock:
            if self._open is opened:
                self._open = None
            if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                # The server has read none of them.
                self._has_streams = False
                for asked in left:
                    self._alone(asked)
                return
        for asked in left:
            asked.fail(failure)
        self._limits.look()

    def _late(self, asked: Asked) -> None:
        # One that is asked by itself, and has begun, has its own time limit.
        self._waiting.pop(asked.number, None)
        self._forget(asked)
        text = "the time limit has passed without an answer"
        asked.fail(RemoteComputeError("Compute", grpc.StatusCode.DEADLINE_EXCEEDED, text))

    def _forget(self, asked: Asked) -> None:
        """The server need not answer it."""
        opened = self._open
        if opened is not None:
            opened.withdraw(asked)

    def _alone(self, asked: Asked) -> None:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS_WITHOUT_STREAMS, "compute-request")
        self._threads.submit(_call, asked)


def _call(asked: Asked) -> None:
    if not asked.take():
        return
    try:
        asked.set_result(frames.read(compute_pb2.ComputeResponse(), asked.call()))
    except BaseException as error:
        asked.set_exception(error)


class _Open:
    """One call. Its requests are sent by a thread of gRPC's; another one here takes the answers."""

    def __init__(
        self,
        channel: ComputeChannel,
        broke: Callable[[_Open, list[Asked], RemoteComputeError], None],
    ) -> None:
        self._broke = broke
        self._failure: RemoteComputeError | None = None
        self._lock = threading.Lock()
        self._unanswered: dict[int, Asked] = {}
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = channel.open_stream(_RPC, self._sending())
        threading.Thread(target=self._receive, name="compute-stream", daemon=True).start()

    def send(self, asked: Asked) -> RemoteComputeError | None:
        """Send a request; if the call has ended, why."""
        with self._lock:
            if self._failure is None:
                self._unanswered[asked.number] = asked
                self._unsent.put(asked.frame)
                # It is sent once; the answer's future may be kept for long, and it keeps this one.
                asked.frame = b""
            return self._failure

    def withdraw(self, asked: Asked) -> None:
        # Without the lock, as the other. One that is just being sent may be withdrawn before the server has
        # it, which then answers it for nobody.
        if self._unanswered.pop(asked.number, None) is None:
            return
        self._unsent.put(compute_pb2.StreamedRequest(id=asked.number).SerializeToString())

    def no_more(self) -> None:
        self._unsent.put(None)

    def close(self) -> None:
        self.no_more()
        end_call: Callable[[], object] = self._call.cancel
        end_call()

    def _sending(self) -> Iterator[bytes]:
        while (frame := self._unsent.get()) is not None:
            yield frame

    def _receive(self) -> None:
        status, details = grpc.StatusCode.UNAVAILABLE, "the server has ended the stream"
        try:
            for frame in self._call:
                self._answered(frame)
        except grpc.RpcError as error:
            status, details = error.code(), error.details() or ""
        except DecodeError as error:
            status, details = (
                grpc.StatusCode.INTERNAL,
                f"what the server has sent is no answer: {error}",
            )
            end_call: Callable[[], object] = self._call.cancel
            end_call()
        finally:
            self._unsent.put(None)
            failure = RemoteComputeError(_RPC, status, details, 1)
            with self._lock:
                self._failure = failure
                left = list(self._unanswered.values())
                self._unanswered.clear()
            self._broke(self, left, failure)

    def _answered(self, frame: bytes) -> None:
        answer, response, data = _read(frame)
        with self._lock:
            asked = self._unanswered.pop(answer.id, None)
        if asked is None or not asked.take():
            return
        if answer.HasField("refusal"):
            status = _STATUSES.get(answer.refusal.code, grpc.StatusCode.UNKNOWN)
            asked.set_exception(RemoteComputeError("Compute", status, answer.refusal.message, 1))
        else:
            asked.set_result((response, data))


def _read(
    frame: bytes,
) -> tuple[compute_pb2.StreamedResponse, compute_pb2.ComputeResponse, Bytes]:
    taken = frames.take_apart(frame)
    if taken is None:
        answer = compute_pb2.StreamedResponse.FromString(frame)
        return answer, answer.response, answer.response.data
    inner, rest = taken
    answer = compute_pb2.StreamedResponse.FromString(rest)
    response, data = frames.read(compute_pb2.ComputeResponse(), inner)
    return answer, response, data
