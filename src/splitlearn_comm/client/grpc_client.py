"""`GRPCComputeClient`: runs tensors through a model on a server of wire 1.0, ours or an older one.

It encodes, calls, decodes and keeps timings. Which model runs is the server's choice unless the caller names
one. Calls that leave something behind on the server, training forwards and backwards, are made exactly once:
their answer may be lost after they were carried out, and a step must not be taken twice. All other calls are
made again as the retry strategy says, within one time limit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import NoReturn

import grpc
import torch

from splitlearn_comm.client.asking import HEALTHY, AsksServer
from splitlearn_comm.client.carriage import Carriage
from splitlearn_comm.client.channel import ComputeChannel
from splitlearn_comm.client.errors import RemoteComputeError
from splitlearn_comm.client.messages import encode_exactly
from splitlearn_comm.client.prepared import Prepared
from splitlearn_comm.client.requests import RequestStream
from splitlearn_comm.client.retry import ExponentialBackoff, RetryStrategy
from splitlearn_comm.client.statistics import CallStatistics, Statistics, Timing, timing
from splitlearn_comm.core import frames
from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.compute_function import KeyValues
from splitlearn_comm.core.messages import decode_cache, encode_cache
from splitlearn_comm.protocol import compute_pb2

DEFAULT_MAX_MESSAGE_LENGTH = 100 * 1024 * 1024
_log = logging.getLogger(__name__)


class GRPCComputeClient(AsksServer):
    """A client of one server; safe to use from several threads, and as a context manager.

    Args:
        server_address: `host:port` or `unix:PATH`.
        timeout: seconds for each call, its retries and the waits between them included.
        max_message_length: bytes, each way.
        retry_strategy: three attempts, 1 s and 2 s apart, unless given.
        codec: how tensors travel; plain float32 unless given. Must be the server's for the model.
        announce_dtype: tell the server the codec's dtype and compression in each request, so that it need
            not be configured for them. Only for servers that know this extension.
        shared_memory: send tensors of 64 KiB or more through files in shared memory instead of the
            connection. Only for a server of the same user on this machine, at a `unix:PATH`.
        credentials: TLS; plain text without.
        metadata: sent with every call, `[("authorization", "Bearer …")]` for instance.
        sleep: waits the seconds it is given, between attempts.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        server_address: str,
        timeout: float = 30.0,
        max_message_length: int = DEFAULT_MAX_MESSAGE_LENGTH,
        retry_strategy: RetryStrategy | None = None,
        codec: TensorCodec | None = None,
        *,
        announce_dtype: bool = False,
        shared_memory: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retries = retry_strategy or ExponentialBackoff()
        channel = ComputeChannel(
            server_address,
            max_message_length,
            self._retries,
            credentials=credentials,
            metadata=metadata,
            sleep=sleep,
            clock=clock,
        )
        super().__init__(channel, timeout)
        self._codec = codec or TensorCodec()
        if shared_memory and not server_address.startswith("unix:"):
            raise ValueError(
                f"shared_memory: only at a Unix socket (unix:PATH), not at {server_address!r}"
            )
        self._carriage = Carriage(
            self._codec,
            announces=announce_dtype,
            shared=shared_memory,
            known=lambda: self._info().custom_info,
        )
        self._clock = clock
        self._statistics = CallStatistics()
        self._stream: RequestStream | None = None
        self._stream_lock = threading.Lock()

    # -- connection -----------------------------------------------------------------------------------

    def connect(self) -> bool:
        """Ask the server once whether it is healthy, and log its version and uptime.

        Optional, as any call connects. After `close()` it opens the client again.

        Returns:
            False if the server cannot be reached or is not healthy; the log says which.
        """
        self._channel.reopen()
        health = self._health()
        if health is None:
            return False
        if health.status != HEALTHY:
            _log.warning(
                "server=%s status=%s message=%s", self.server_address, health.status, health.message
            )
            return False
        _log.info(
            "server=%s connected version=%s uptime_s=%.1f",
            self.server_address,
            health.version,
            health.uptime_seconds,
        )
        return True

    def close(self) -> None:
        """Drop the connection; running calls and streams end. May be called more than once."""
        with self._stream_lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        self._channel.close()
        self._carriage.close()

    def __del__(self) -> None:
        # The stream's threads would keep it and the connection. Whoever collects garbage may hold any lock.
        stream: RequestStream | None = self.__dict__.get("_stream")
        if stream is not None:
            stream.no_more()

    def __reduce__(self) -> NoReturn:
        # A copy would end the stream of the client that it was made of, when it is dropped.
        raise TypeError("a client cannot be copied or pickled; make another one where it is needed")

    def __enter__(self) -> GRPCComputeClient:
        self.connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- computing ------------------------------------------------------------------------------------

    def compute(self, tensor: torch.Tensor, model_id: str | None = None) -> torch.Tensor:
        """Run a model.

        Args:
            tensor: any device; sent in the codec's dtype, token ids too.
            model_id: None lets the server choose.

        Returns:
            A CPU tensor in the codec's dtype.

        Raises:
            RemoteComputeError: with the gRPC status, after the retries.
            ValueError: if integers in `tensor` cannot be sent exactly in the codec's dtype.
        """
        return self.compute_with_timing(tensor, model_id)[0]

    def compute_async(
        self, tensor: torch.Tensor, model_id: str | None = None, *, timeout: float | None = None
    ) -> Future[torch.Tensor]:
        """Run a model, and go on meanwhile.

        Many such requests at a time share one stream, where the server has streams; that costs both sides
        about half of what as many calls of `compute` cost. Nothing is retried, and a future that is
        cancelled withdraws its request.

        Args:
            tensor: as for `compute`.
            model_id: None lets the server choose.
            timeout: seconds for this request; the client's unless given.

        Returns:
            A future of what `compute` returns. It raises RemoteComputeError with the gRPC status.

        Raises:
            ValueError: if integers in `tensor` cannot be sent exactly in the codec's dtype.
            ClientClosed: if the client was closed.
        """
        prepared = self._prepared(tensor, model_id, timeout)
        try:
            return self._ask(prepared, once=True)
        except BaseException:
            prepared.give_up()
            raise

    def compute_many(
        self, tensors: Iterable[torch.Tensor], model_id: str | None = None, in_flight: int = 32
    ) -> Iterator[torch.Tensor]:
        """Run a model on many tensors, so many at a time, and give the answers in the tensors' order.

        What fails for a passing reason is tried again at once if the retry strategy allows a second attempt,
        and from then on as `compute` does, within the time limit of each.

        Args:
            tensors: taken from as answers are taken; one may be written to again once the next is asked for.
            model_id: None lets the server choose.
            in_flight: requests that are under way at most.

        Raises:
            RemoteComputeError: with the gRPC status of the first tensor that was not answered; later ones
                are withdrawn.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight: expected at least 1, got {in_flight}")
        waiting: deque[Prepared] = deque()
        try:
            for tensor in tensors:
                waiting.append(self._prepared(tensor, model_id))
                self._ask(waiting[-1])
                if len(waiting) >= in_flight:
                    yield self._taken(waiting.popleft())
            while waiting:
                yield self._taken(waiting.popleft())
        finally:
            for prepared in waiting:
                prepared.give_up()

    def _taken(self, prepared: Prepared) -> torch.Tensor:
        assert prepared.asked is not None
        try:
            try:
                return prepared.asked.result()
            except RemoteComputeError as error:
                too_late = self._clock() >= prepared.until_s
                if too_late or not self._retries.should_retry(1, error.code()):
                    raise
            prepared.renew()
            response = self._call(prepared, retry=True)
            output = prepared.load.unload(response, response.data)
            self._note_answer(prepared, response)
            return output
        finally:
            prepared.give_up()

    def _prepared(
        self, tensor: torch.Tensor, model_id: str | None, timeout: float | None = None
    ) -> Prepared:
        started_s = self._clock()
        self._carriage.check_server()
        timeout_s = self.timeout if timeout is None else timeout
        return Prepared(self._carriage.load(tensor), model_id or "", started_s, timeout_s)

    def _ask(self, prepared: Prepared, *, once: bool = False) -> Future[torch.Tensor]:
        """Ask over the stream. If there is no answer the request may be asked again, unless it is `once`."""
        stream = self._requests()
        message = frames.parts(prepared.load.data, prepared.message.SerializeToString())
        asked = stream.ask(
            message,
            prepared.until_s - self._clock(),
            lambda: self._call(prepared, retry=False).SerializeToString(),
        )
        answer: Future[torch.Tensor] = Future()
        prepared.asked = answer

        def answered(asked: Future[tuple[compute_pb2.ComputeResponse, frames.Bytes]]) -> None:
            if asked.cancelled() or not answer.set_running_or_notify_cancel():
                return
            try:
                try:
                    response, received = asked.result()
                    output = prepared.load.unload(response, received)
                    self._note_answer(prepared, response)
                except BaseException as error:
                    if once:
                        prepared.load.give_up()
                    answer.set_exception(error)
                else:
                    answer.set_result(output)
            except KeyboardInterrupt:
                raise
            except BaseException:
                # Of a callback; a future logs exceptions only, and this thread is there for others, too.
                _log.exception("server=%s a callback of a future failed", self.server_address)

        def over(answer: Future[torch.Tensor]) -> None:
            if answer.cancelled():
                stream.withdraw(asked)
                if once:
                    prepared.load.give_up()

        answer.add_done_callback(over)
        asked.add_done_callback(answered)
        return answer

    def _call(self, prepared: Prepared, *, retry: bool) -> compute_pb2.ComputeResponse:
        return self._channel.call(
            "Compute",
            prepared.whole(),
            compute_pb2.ComputeResponse,
            timeout_s=max(0.0, prepared.until_s - self._clock()),
            retry=retry,
        )

    def _note_answer(self, prepared: Prepared, response: compute_pb2.ComputeResponse) -> None:
        self._note_load(response)
        self._recorded(prepared.started_s, response.compute_time_ms)

    def _requests(self) -> RequestStream:
        with self._stream_lock:
            if self._stream is None or not self._stream.own:
                # In a process that was forked: the threads of its parent's are not here.
                self._stream = RequestStream(self._channel)
            return self._stream

    def compute_with_timing(
        self, tensor: torch.Tensor, model_id: str | None = None
    ) -> tuple[torch.Tensor, Timing]:
        """Run a model; also return where the time went. Otherwise as `compute`."""
        output, _, spent = self.compute_with_cache(tensor, model_id=model_id)
        return output, spent

    def compute_with_cache(
        self,
        tensor: torch.Tensor,
        past_key_values: KeyValues | None = None,
        use_cache: bool = False,
        model_id: str | None = None,
        training_mode: bool = False,
        forward_id: str | None = None,
    ) -> tuple[torch.Tensor, KeyValues | None, Timing]:
        """Run a model with its key/value cache, or keep the forward for a backward.

        Args:
            tensor: as for `compute`.
            past_key_values: what an earlier call returned as `present`.
            use_cache: ask for the cache after this call.
            model_id: None lets the server choose.
            training_mode: keep the forward on the server for one `compute_backward`. Such a call is never
                retried.
            forward_id: the name to keep it under; None lets the server choose, see `timing["forward_id"]`.

        Returns:
            `(output, present, timing)`; `present` is one (key, value) pair a layer, or None if it was not
            asked for or the model has no cache.
        """
        started_s = self._clock()
        self._carriage.check_server()
        past = encode_cache(past_key_values or (), self._codec)
        load = self._carriage.load(tensor)
        try:
            request = compute_pb2.ComputeRequest(
                data=bytes(load.data),
                shape=load.shape,
                model_id=model_id or "",
                metadata=load.metadata,
                past_key_values=past,
            )
            if training_mode:
                request.training_mode = True
            if forward_id is not None:
                request.forward_id = forward_id
            if use_cache:
                request.use_cache = True
            response = self._channel.call(
                "Compute",
                request,
                compute_pb2.ComputeResponse,
                timeout_s=self.timeout,
                retry=not training_mode,
            )
            output = load.unload(response, response.data)
        finally:
            load.give_up()
        present = decode_cache(response.present_key_values, self._codec)
        self._note_load(response)
        spent = self._recorded(started_s, response.compute_time_ms)
        if training_mode and response.HasField("forward_id"):
            spent["forward_id"] = response.forward_id
        return output, present, spent

    def compute_backward(
        self,
        grad_output: torch.Tensor,
        forward_id: str,
        model_id: str | None = None,
        learning_rate: float | None = None,
    ) -> torch.Tensor:
        """Carry a gradient back through a training forward; possible once, and never retried.

        Args:
            grad_output: d loss / d output, in the output's shape.
            forward_id: as given to, or by, `compute_with_cache(..., training_mode=True)`.
            model_id: None lets the server find the model by the forward.
            learning_rate: also take one step of gradient descent on the server's model.

        Returns:
            d loss / d input, in the input's shape.

        Raises:
            RemoteComputeError: NOT_FOUND if the forward was used, dropped or never made.
        """
        started_s = self._clock()
        data, shape = encode_exactly(grad_output, self._codec)
        request = compute_pb2.BackwardRequest(
            grad_output_data=bytes(data), grad_output_shape=shape, forward_id=forward_id
        )
        if model_id is not None:
            request.model_id = model_id
        if learning_rate is not None:
            request.learning_rate = learning_rate
        response = self._channel.call(
            "ComputeBackward",
            request,
            compute_pb2.BackwardResponse,
            timeout_s=self.timeout,
            retry=False,
        )
        grad_input = self._codec.decode(response.grad_input_data, response.grad_input_shape)
        self._note_load(response)
        self._recorded(started_s, response.backward_time_ms)
        return grad_input

    def get_statistics(self) -> Statistics:
        """Return the number of answered calls and their mean times in milliseconds."""
        return self._statistics.summary()

    def _recorded(self, started_s: float, compute_time_ms: float) -> Timing:
        spent = timing(self._clock() - started_s, compute_time_ms)
        self._statistics.record(spent)
        return spent
