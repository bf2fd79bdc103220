"""A plain forward on its way through a backend that answers from threads of its own, see `Inference`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.errors import ComputeError, DeadlinePassed
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.core.packed import Packed, Rows
from splitlearn_comm.http2.calls import Call, version_metadata
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.messages import codec_for
from splitlearn_comm.server.statuses import from_model_error

NO_DEADLINE_S = 365 * 24 * 3600.0
"""gRPC says "no deadline" by a time that is years away."""


class Answers(Protocol):
    """What the servicer adds to an answer, and takes note of."""

    def encoded(
        self,
        request: compute_pb2.ComputeRequest,
        response: compute_pb2.ComputeResponse,
        codec: TensorCodec,
        output: Rows,
        computed_ms: float,
    ) -> tuple[Bytes, ...]:
        """The response's bytes in parts."""

    def answered(self, model_id: str, started_s: float) -> None:
        """The request was answered."""

    def refused(
        self, model_id: str, refusal: ComputeError, started_s: float
    ) -> tuple[grpc.StatusCode, str]:
        """The request gets no answer; what its caller is told."""


class Forward:
    """A plain forward that the backend has been offered, see `Inference`."""

    __slots__ = ("_call", "_codec", "_data", "_request", "_servicer", "_started_s", "until_s")

    def __init__(
        self,
        servicer: Answers,
        call: Call,
        request: compute_pb2.ComputeRequest,
        data: Bytes,
        started_s: float,
    ) -> None:
        self._servicer = servicer
        self._call = call
        self._request = request
        self._data: Bytes | None = data
        self._codec: TensorCodec | None = None
        self._started_s = started_s
        remaining_s = call.remaining_s()
        self.until_s = None if remaining_s > NO_DEADLINE_S else time.monotonic() + remaining_s

    def unpack(self, codec: TensorCodec) -> Packed:
        """The request's tensor, to be asked for once, given how the model's tensors travel."""
        self._codec = codec_for(self._request, codec)
        data, self._data = self._data, None
        assert data is not None
        return self._codec.unpack(data, self._request.shape)

    def check_wanted(self) -> None:
        """Raise `DeadlinePassed` if nobody waits for the answer any more."""
        if self.until_s is not None and time.monotonic() >= self.until_s:
            raise DeadlinePassed("the deadline passed before the model ran; nothing was computed")
        if not self._call.active():
            raise DeadlinePassed("the caller is gone; nothing was computed", "CallerGone")

    def answer(self, model_id: str, output: Rows, computed_ms: float, version: str = "") -> None:
        """Send the model's output. What cannot be sent is told as an error of the model."""
        assert self._codec is not None
        try:
            response = self._servicer.encoded(
                self._request, compute_pb2.ComputeResponse(), self._codec, output, computed_ms
            )
        except Exception as error:
            self.refuse(from_model_error(model_id, error), model_id)
            return
        if version:
            self._call.name_version(version)
        self._call.send(*response)
        self._servicer.answered(model_id, self._started_s)

    def refuse(self, error: ComputeError, model_id: str = "") -> None:
        """End the request without an answer."""
        who = model_id or self._request.model_id
        self._call.refuse(*self._servicer.refused(who, error, self._started_s))


class WaitingCall:
    """A call of gRPC's whose thread waits for the answer, as one that is answered from any thread."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self._ended = threading.Event()
        self._response: bytes | None = None
        self._refusal: tuple[grpc.StatusCode, str] | None = None

    def remaining_s(self) -> float:
        remaining = self._context.time_remaining()
        return float("inf") if remaining is None else float(remaining)

    def active(self) -> bool:
        return bool(self._context.is_active())

    def peer(self) -> str:
        return str(self._context.peer())

    def name_version(self, version: str) -> None:
        self._context.set_trailing_metadata(version_metadata(version))

    def send(self, *response: Bytes) -> None:
        self._response = b"".join(response)
        self._ended.set()

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        self._refusal = status, details
        self._ended.set()

    def run(self, handle: Callable[..., object], request: object) -> None:
        response = handle(request, self._context)
        assert isinstance(response, bytes)
        self.send(response)

    def answer(self) -> bytes:
        """Wait for the answer, and give it; a refusal ends the call."""
        self._ended.wait()
        if self._refusal is not None:
            self._context.abort(*self._refusal)
        assert self._response is not None
        return self._response
