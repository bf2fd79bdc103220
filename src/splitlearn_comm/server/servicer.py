"""Answers the rpcs of the wire, whatever the backend is.

A request goes: still wanted? → open the target → still wanted? → decode → run → encode. "Still wanted" means
that the caller is there and its deadline has not passed; otherwise the model is not run. Every refusal
becomes one gRPC status, and the backend is told; what a model raised is logged with its traceback, which the
caller never sees.

A plain forward (no training, no cache) is offered to the backend first (`Inferences`), which may answer it
from a thread of its own, together with others. What it does not take goes the way above, on a thread that
waits.

The servicer keeps no tensors. It remembers which model answered each training forward, so that a backward
that names no model finds it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from splitlearn_comm.core import frames, shared_memory
from splitlearn_comm.core.codec import TensorCodec, checked_shape
from splitlearn_comm.core.compute_function import Computed, invoke, on_cpu
from splitlearn_comm.core.errors import ComputeError, ComputeFailed, DeadlinePassed, InvalidRequest
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.core.messages import decode_cache, encode_cache
from splitlearn_comm.core.out_of_memory import telling_out_of_memory
from splitlearn_comm.core.packed import Output, Rows
from splitlearn_comm.http2.calls import Call as DirectCall
from splitlearn_comm.http2.calls import version_metadata
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.backend import ComputeBackend, Inferences, Opened
from splitlearn_comm.server.forward import NO_DEADLINE_S, Forward, WaitingCall
from splitlearn_comm.server.forwards import ForwardTarget, ForwardTargets
from splitlearn_comm.server.messages import (
    EXTENSIONS_KEY,
    codec_for,
    extensions,
    interval_s,
    snapshot_message,
)
from splitlearn_comm.server.monitoring import LoadMonitor, LoadSnapshot
from splitlearn_comm.server.statuses import details_of, from_model_error, status_of

_log = logging.getLogger(__name__)

_MAX_REMEMBERED_FORWARDS = 4096

# A snapshot in a response may be that old, so that a busy server measures once a second, not per request.
_RESPONSE_SNAPSHOT_AGE_S = 1.0
_MONITORING_DATA = compute_pb2.ComputeResponse.MONITORING_DATA_FIELD_NUMBER

ResponseT = TypeVar("ResponseT")


@dataclass
class Call:
    """One Compute or ComputeBackward while it is answered.

    Attributes:
        model_id: as requested; once the target is open, the model that it turned out to be.
    """

    context: grpc.ServicerContext
    model_id: str

    def remaining_s(self) -> float | None:
        """Seconds until the caller's deadline, None without one."""
        remaining = self.context.time_remaining()
        return None if remaining is None or remaining > NO_DEADLINE_S else float(remaining)

    def check_wanted(self) -> None:
        """Raise `DeadlinePassed` if nobody waits for the answer any more."""
        remaining = self.remaining_s()
        if remaining is not None and remaining <= 0:
            raise DeadlinePassed("the deadline passed before the model ran; nothing was computed")
        if not self.context.is_active():
            raise DeadlinePassed("the caller is gone; nothing was computed", "CallerGone")


class ComputeServicer:
    """The service `splitlearn.comm.ComputeService`.

    Args:
        backend: what is served.
        monitor: gives the machine's load.
        clock: gives the time in seconds, for durations and uptime.
        inferences: takes plain forwards over, if there is something that does.
        max_shared_bytes: the largest tensor that is taken from shared memory.
    """

    def __init__(
        self,
        backend: ComputeBackend,
        monitor: LoadMonitor,
        clock: Callable[[], float] = time.monotonic,
        inferences: Inferences | None = None,
        max_shared_bytes: int = 100 * 1024 * 1024,
    ) -> None:
        self._backend = backend
        self._inferences = inferences
        self._max_shared_bytes = max_shared_bytes
        self._load: tuple[LoadSnapshot | None, bytes] = (None, b"")
        self._monitor = monitor
        self._clock = clock
        self._started_s = clock()
        self._forwards = ForwardTargets(_MAX_REMEMBERED_FORWARDS)
        self._state = threading.Lock()
        self._total_requests = 0
        self._streams: set[threading.Event] = set()
        self._stopping = False

    # -- the rpcs -------------------------------------------------------------------------------------

    def Compute(self, request: compute_pb2.ComputeRequest, context: grpc.ServicerContext) -> bytes:
        """Run a model on one tensor; gives an encoded ComputeResponse."""
        waits = WaitingCall(context)
        self.begin(request, request.data, waits)
        return waits.answer()

    def ComputeBackward(
        self, request: compute_pb2.BackwardRequest, context: grpc.ServicerContext
    ) -> compute_pb2.BackwardResponse:
        """Return d loss / d input of an earlier training forward."""
        self._begun()
        call = Call(context, request.model_id)
        return self._answer(call, lambda: self._backward(request, call))

    def begin_compute(self, message: Bytes, call: DirectCall) -> None:
        """As `Compute`, for an encoded ComputeRequest, and without waiting for the answer."""
        try:
            request, data = frames.read(compute_pb2.ComputeRequest(), message)
        except DecodeError:
            call.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the message is no ComputeRequest")
            return
        self.begin(request, data, call)

    def begin(self, request: compute_pb2.ComputeRequest, data: Bytes, call: DirectCall) -> None:
        """As `Compute`, without waiting for the answer.

        Args:
            request: all but the tensor's bytes are taken from it.
            data: the tensor's bytes.
        """
        started_s = self._begun()
        if shared_memory.KEY in request.metadata:
            try:
                data = self._shared(request, data, call.peer())
            except ComputeError as error:
                call.refuse(*self.refused(request.model_id, error, started_s))
                return
        if not self._taken_over(request, data, call, started_s):
            call.run(lambda request, context: self._computed(request, data, context), request)

    def begin_backward(self, message: Bytes, call: DirectCall) -> None:
        """As `ComputeBackward`, for an encoded BackwardRequest, and without waiting for the answer."""
        try:
            request = compute_pb2.BackwardRequest.FromString(bytes(message))
        except DecodeError:
            call.refuse(grpc.StatusCode.INVALID_ARGUMENT, "the message is no BackwardRequest")
            return
        call.run(self.ComputeBackward, request)

    def HealthCheck(
        self, request: compute_pb2.HealthRequest, context: grpc.ServicerContext
    ) -> compute_pb2.HealthResponse:
        """Say whether requests are served at the moment."""
        health = self._backend.health()
        return compute_pb2.HealthResponse(
            status=health.status,
            message=health.message,
            version=self._backend.version,
            uptime_seconds=self.uptime_s(),
        )

    def GetServiceInfo(
        self, request: compute_pb2.ServiceInfoRequest, context: grpc.ServicerContext
    ) -> compute_pb2.ServiceInfoResponse:
        """Describe the server and what it serves."""
        info = self._backend.service_info()
        return compute_pb2.ServiceInfoResponse(
            service_name=info.service_name,
            version=self._backend.version,
            device=info.device,
            uptime_seconds=self.uptime_s(),
            total_requests=self.total_requests,
            custom_info={**info.custom_info, EXTENSIONS_KEY: " ".join(extensions())},
        )

    def StreamMonitoring(
        self, request: compute_pb2.MonitoringStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[compute_pb2.MonitoringSnapshotResponse]:
        """Send snapshots until the caller goes or the server stops."""
        pause_s = interval_s(request)
        ended = threading.Event()
        if not context.add_callback(ended.set):
            return
        with self._state:
            self._streams.add(ended)
            stopping = self._stopping
        try:
            while not stopping and not ended.is_set():
                load = self._monitor.snapshot(max_age_s=0.0)
                yield compute_pb2.MonitoringSnapshotResponse(snapshot=snapshot_message(load))
                ended.wait(pause_s)
                stopping = self._stopping
        finally:
            with self._state:
                self._streams.discard(ended)
        if stopping:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    # -- for whoever runs the server ------------------------------------------------------------------

    @property
    def total_requests(self) -> int:
        """Compute and ComputeBackward requests so far, refused ones included."""
        with self._state:
            return self._total_requests

    def uptime_s(self) -> float:
        """Seconds since the servicer was made."""
        return self._clock() - self._started_s

    def end_streams(self) -> None:
        """End all monitoring streams, and every one that begins later; for a server that stops."""
        with self._state:
            self._stopping = True
            streams = tuple(self._streams)
        for ended in streams:
            ended.set()

    # -- answering ------------------------------------------------------------------------------------

    def _begun(self) -> float:
        """Count a request; when it began."""
        with self._state:
            self._total_requests += 1
        return self._clock()

    def _shared(self, request: compute_pb2.ComputeRequest, data: Bytes, peer: str) -> Bytes:
        """The tensor's bytes, from where the request says they are."""
        if not peer.startswith("unix:"):
            raise InvalidRequest(
                f'metadata["{shared_memory.KEY}"]: only for calls over a Unix socket, and this one '
                f"came from {peer}"
            )
        if len(data):
            raise InvalidRequest(f'metadata["{shared_memory.KEY}"]: the message has data as well')
        return shared_memory.read(request.metadata[shared_memory.KEY], self._max_shared_bytes)

    def _taken_over(
        self,
        request: compute_pb2.ComputeRequest,
        data: Bytes,
        call: DirectCall,
        started_s: float,
    ) -> bool:
        """Whether the request will be answered, or has been refused, without further ado."""
        if self._inferences is None or not _is_plain(request):
            return False
        inference = Forward(self, call, request, data, started_s)
        try:
            inference.check_wanted()
            checked_shape(request.shape)
            return self._inferences.enter(request.model_id, inference)
        except ComputeError as error:
            inference.refuse(error)
        except Exception as error:
            _log.exception("model_id=%s", request.model_id)
            inference.refuse(from_model_error(request.model_id, error))
        return True

    def _computed(
        self,
        request: compute_pb2.ComputeRequest,
        data: Bytes,
        context: grpc.ServicerContext,
    ) -> bytes:
        call = Call(context, request.model_id)
        return self._answer(call, lambda: self._compute(request, data, call))

    def _answer(self, call: Call, work: Callable[[], ResponseT]) -> ResponseT:
        started_s = self._clock()
        try:
            response = work()
        except ComputeError as error:
            refusal = error
        except BaseException as error:
            # BaseException, because a model that calls sys.exit() would otherwise leave its caller waiting.
            refusal = from_model_error(call.model_id, error)
            _log.exception("model_id=%s status=%s", call.model_id, status_of(refusal).name)
        else:
            self._backend.observe(call.model_id, "OK", self._clock() - started_s)
            return response
        return self._refuse(call, refusal, started_s)

    def _refuse(self, call: Call, refusal: ComputeError, started_s: float) -> NoReturn:
        call.context.abort(*self.refused(call.model_id, refusal, started_s))
        raise AssertionError("abort does not return")

    def refused(
        self, model_id: str, refusal: ComputeError, started_s: float
    ) -> tuple[grpc.StatusCode, str]:
        """Take note of a request that gets no answer; what its caller is told."""
        unnamed = model_id and repr(model_id) not in refusal.message
        if isinstance(refusal, ComputeFailed) and unnamed:
            refusal = from_model_error(model_id, refusal)
        status = status_of(refusal)
        _log.debug("model_id=%s status=%s reason=%s", model_id, status.name, refusal.reason)
        self._backend.observe(model_id, status.name, self._clock() - started_s)
        return status, details_of(refusal)

    def answered(self, model_id: str, started_s: float) -> None:
        """Take note of a request that was answered."""
        self._backend.observe(model_id, "OK", self._clock() - started_s)

    @contextmanager
    def _opened(self, call: Call, model_id: str, forward_id: str | None = None) -> Iterator[Opened]:
        call.check_wanted()
        with self._backend.open(
            model_id, forward_id=forward_id, remaining_s=call.remaining_s()
        ) as opened:
            call.model_id = opened.model_id
            # Opening may have waited for a model to load.
            call.check_wanted()
            yield opened

    def _compute(self, request: compute_pb2.ComputeRequest, data: Bytes, call: Call) -> bytes:
        # Before opening, which may load a model: a request that fits none should not cost that.
        checked_shape(request.shape)
        response = compute_pb2.ComputeResponse()
        with self._opened(call, request.model_id) as opened:
            codec = codec_for(request, opened.codec)
            tensor = codec.decode(data, request.shape)
            past = decode_cache(request.past_key_values, codec)
            started_s = self._clock()
            with telling_out_of_memory(opened.model_id, request.shape):
                if request.training_mode:
                    if past is not None:
                        raise InvalidRequest("training_mode does not go with past_key_values")
                    forward_id = request.forward_id or uuid.uuid4().hex
                    computed = Computed(opened.function.forward_for_training(tensor, forward_id))
                    self._forwards.remember(
                        forward_id, ForwardTarget(request.model_id, opened.model_id)
                    )
                    response.forward_id = forward_id
                else:
                    computed = invoke(opened.function, tensor, past, request.use_cache)
                # Moving to the processor waits for a GPU, whose work is part of the time.
                output = on_cpu(computed.output)
            computed_ms = (self._clock() - started_s) * 1000
            if opened.version:
                call.context.set_trailing_metadata(version_metadata(opened.version))
            if computed.present is not None:
                response.present_key_values.extend(encode_cache(computed.present, codec))
            return b"".join(
                self.encoded(request, response, codec, Output(output).whole(), computed_ms)
            )

    def encoded(
        self,
        request: compute_pb2.ComputeRequest,
        response: compute_pb2.ComputeResponse,
        codec: TensorCodec,
        output: Rows,
        computed_ms: float,
    ) -> tuple[Bytes, ...]:
        """The response's bytes in parts, with what every response has added to `response`."""
        data, shape = output.view(codec)
        if shared_memory.KEY in request.metadata:
            response.shared_bytes = shared_memory.write(request.metadata[shared_memory.KEY], data)
            data = b""
        response.shape.extend(shape)
        response.compute_time_ms = computed_ms
        if request.HasField("request_id"):
            response.request_id = request.request_id
        return frames.parts(data, response.SerializeToString(), self._recent_load_field())

    def _backward(
        self, request: compute_pb2.BackwardRequest, call: Call
    ) -> compute_pb2.BackwardResponse:
        if not request.forward_id:
            raise InvalidRequest("forward_id is empty; it names the forward to differentiate")
        checked_shape(request.grad_output_shape)
        response = compute_pb2.BackwardResponse(forward_id=request.forward_id)
        target = self._forwards.resolve(request.forward_id, request.model_id)
        with self._opened(call, target, request.forward_id) as opened:
            grad_output = opened.codec.decode(request.grad_output_data, request.grad_output_shape)
            started_s = self._clock()
            with telling_out_of_memory(opened.model_id, request.grad_output_shape):
                grad_input = on_cpu(
                    opened.function.backward(
                        request.forward_id,
                        grad_output,
                        request.learning_rate if request.HasField("learning_rate") else None,
                    )
                )
            response.backward_time_ms = (self._clock() - started_s) * 1000
            self._forwards.forget(request.forward_id)
            response.grad_input_data, shape = opened.codec.encode(grad_input)
            response.grad_input_shape.extend(shape)
        response.monitoring_data.CopyFrom(self._recent_load())
        return response

    def _recent_load(self) -> compute_pb2.MonitoringSnapshot:
        return snapshot_message(self._monitor.snapshot(max_age_s=_RESPONSE_SNAPSHOT_AGE_S))

    def _recent_load_field(self) -> bytes:
        """The machine's load as a field of a ComputeResponse; encoded once for each snapshot."""
        load = self._monitor.snapshot(max_age_s=_RESPONSE_SNAPSHOT_AGE_S)
        known, field = self._load
        if known is not load:
            field = frames.nested(_MONITORING_DATA, snapshot_message(load).SerializeToString())
            self._load = (load, field)
        return field


def _is_plain(request: compute_pb2.ComputeRequest) -> bool:
    return not (request.training_mode or request.use_cache or len(request.past_key_values))
