"""Makes calls over one gRPC channel: deadline, retries, and errors as the caller sees them.

A call's time limit covers all its attempts and the waits between them. A retry that could not begin before
the limit is not waited for. This module knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from splitlearn_comm.client.errors import ClientClosed, RemoteComputeError
from splitlearn_comm.client.retry import RetryStrategy
from splitlearn_comm.protocol import compute_pb2

MessageT = TypeVar("MessageT", bound=Message)
Metadata = Sequence[tuple[str, str]]

_SERVICE = compute_pb2.DESCRIPTOR.services_by_name["ComputeService"].full_name


class ComputeChannel:
    """A channel to one server, opened on first use and again after it was closed and `reopen`ed.

    Args:
        address: `host:port` or `unix:PATH`.
        max_message_length: bytes, each way.
        credentials: TLS; plain text without.
        metadata: sent with every call, an authorization for instance.
        retries: asked after each failure.
        sleep: waits the seconds it is given.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        address: str,
        max_message_length: int,
        retries: RetryStrategy,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.max_message_length = max_message_length
        self._retries = retries
        self._credentials = credentials
        self._metadata = tuple(metadata)
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._channel: grpc.Channel | None = None
        self._inherited: grpc.Channel | None = None
        self._owner = os.getpid()

    def call(
        self,
        rpc: str,
        request: Message,
        response_type: type[MessageT],
        *,
        timeout_s: float,
        retry: bool,
    ) -> MessageT:
        """Make a call that has one answer.

        Args:
            rpc: its name.
            request: its message.
            response_type: the type of its answer.
            timeout_s: for all attempts together.
            retry: whether the strategy is asked at all; False for a call that must not be made twice.

        Raises:
            RemoteComputeError: with the last attempt's status.
            ClientClosed: if the channel was closed.
        """
        deadline_s = self._clock() + timeout_s
        attempt = 1
        while True:
            try:
                return self._once(rpc, request, response_type, deadline_s - self._clock())
            except grpc.RpcError as error:
                failure = _failure(rpc, error, attempt)
            if not retry or not self._retries.should_retry(attempt, failure.code()):
                raise failure
            delay_s = self._retries.delay_s(attempt)
            if self._clock() + delay_s >= deadline_s:
                raise failure
            self._sleep(delay_s)
            attempt += 1

    def stream(
        self,
        rpc: str,
        request: Message,
        response_type: type[MessageT],
        *,
        timeout_s: float | None = None,
    ) -> Iterator[MessageT]:
        """Make a call with many answers; closing the iterator ends the call.

        Args:
            rpc, request, response_type: as for `call`.
            timeout_s: for all answers together; None for no limit.

        Raises:
            RemoteComputeError: if the call ends with a status other than OK.
            ClientClosed: if the channel was closed before the call.
        """
        method = self._connection().unary_stream(
            f"/{_SERVICE}/{rpc}", _serialized, response_type.FromString
        )
        with self._unless_closed():
            answers = method(request, timeout=timeout_s, metadata=self._metadata)
        end_call: Callable[[], object] = answers.cancel
        try:
            yield from answers
        except grpc.RpcError as error:
            if self.closed:
                # Ended from this side, by close(): the stream is simply over.
                return
            raise _failure(rpc, error, attempts=1) from error
        finally:
            end_call()

    def open_stream(self, rpc: str, frames: Iterator[bytes]) -> grpc.CallIterator[bytes]:
        """Make a call with many encoded messages each way.

        Raises:
            ClientClosed: if the channel was closed.
        """
        method = self._connection().stream_stream(f"/{_SERVICE}/{rpc}", _as_it_is, _as_it_is)
        with self._unless_closed():
            return method(frames, metadata=self._metadata)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, and `reopen` not since."""
        with self._lock:
            return self._closed

    def reopen(self) -> None:
        """Allow calls again after `close`."""
        with self._lock:
            self._closed = False

    def close(self) -> None:
        """End running calls and drop the connection; calls raise `ClientClosed` from now on."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _once(
        self, rpc: str, request: Message, response_type: type[MessageT], timeout_s: float
    ) -> MessageT:
        method = self._connection().unary_unary(
            f"/{_SERVICE}/{rpc}", _serialized, response_type.FromString
        )
        with self._unless_closed():
            response: MessageT = method(request, timeout=timeout_s, metadata=self._metadata)
            return response

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            # What gRPC raises if another thread closed the channel just now.
            if self.closed:
                raise self._closed_error() from error
            raise

    def _connection(self) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise self._closed_error()
            if self._channel is not None and self._owner != os.getpid():
                # This process was forked, and the connection is its parent's: kept, for to close it is to
                # send something over it.
                self._inherited, self._channel = self._channel, None
            if self._channel is None:
                self._channel = self._open()
                self._owner = os.getpid()
            return self._channel

    def _closed_error(self) -> ClientClosed:
        return ClientClosed(f"the client for {self.address} was closed; connect() opens it again")

    def _open(self) -> grpc.Channel:
        options = (
            ("grpc.max_send_message_length", self.max_message_length),
            ("grpc.max_receive_message_length", self.max_message_length),
            # gRPC's own wait before it connects again grows to two minutes, far beyond the retries here.
            ("grpc.initial_reconnect_backoff_ms", 200),
            # So long an attempt may take: a lost packet, and a TLS handshake with a distant server.
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # A connection of its own: a client must not inherit another one's wait.
            ("grpc.use_local_subchannel_pool", 1),
        )
        if self._credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self._credentials, options=options)


def _failure(rpc: str, error: grpc.RpcError, attempts: int) -> RemoteComputeError:
    # Every error that a call raises is also the call itself, which has the status.
    failure = RemoteComputeError(rpc, error.code(), error.details() or "", attempts)
    failure.__cause__ = error
    return failure


def _as_it_is(frame: bytes) -> bytes:
    return frame


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
