"""A client and a server of wire 1.0, written from the protocol's description and from nothing else.

    with V1Client(address) as client:
        client.connect()
        output = client.compute(torch.ones(1, 4))

    with V1Server() as server:
        ...  # server.address

They share no logic with `splitlearn_comm` (only the generated message classes), so what they understand is
what the deployed peers understand: float32 always, presence tested with HasField, no metadata, health only
for "ok".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType

import grpc
import numpy as np
import torch

from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc

_LIMIT = 100 * 1024 * 1024
_NOT_RETRIED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def to_wire(tensor: torch.Tensor) -> tuple[bytes, list[int]]:
    """Return little-endian float32 bytes and the shape."""
    array = np.ascontiguousarray(tensor.detach().to(torch.float32).numpy(), dtype="<f4")
    return array.tobytes(), list(tensor.shape)


def from_wire(data: bytes, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor that `to_wire` described."""
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(tuple(shape)).copy())


def pairs_to_wire(pairs: Pairs) -> list[compute_pb2.KVCacheEntry]:
    """Return one entry a layer."""
    entries = []
    for key, value in pairs:
        (key_data, key_shape), (value_data, value_shape) = to_wire(key), to_wire(value)
        entries.append(
            compute_pb2.KVCacheEntry(
                key_data=key_data,
                key_shape=key_shape,
                value_data=value_data,
                value_shape=value_shape,
            )
        )
    return entries


def pairs_from_wire(
    entries: Sequence[compute_pb2.KVCacheEntry],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return the pairs that `pairs_to_wire` described."""
    return tuple(
        (from_wire(e.key_data, e.key_shape), from_wire(e.value_data, e.value_shape))
        for e in entries
    )


class V1Client:
    """The 1.0 client.

    Args:
        address: `host:port`.
        timeout: seconds for each attempt.
        sleep: waits between attempts; the waits are in `waited`.
        metadata: sent with every call (gRPC metadata, not the request's map).

    Attributes:
        log: what `connect` logged.
        waited: the seconds between attempts.
        attempts: attempts of the last call.
    """

    def __init__(
        self,
        address: str,
        timeout: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.timeout = timeout
        self.log: list[str] = []
        self.waited: list[float] = []
        self.attempts = 0
        self._sleep = sleep
        self._metadata = tuple(metadata)
        self._next_request_id = 0
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", _LIMIT),
                ("grpc.max_receive_message_length", _LIMIT),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._stub = compute_pb2_grpc.ComputeServiceStub(self._channel)

    def __enter__(self) -> V1Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        self._channel.close()

    def connect(self) -> bool:
        """Check the server's health; log its version and its uptime, formatted as a float."""
        try:
            health = self._stub.HealthCheck(
                compute_pb2.HealthRequest(), timeout=self.timeout, metadata=self._metadata
            )
        except grpc.RpcError:
            return False
        if health.status != "ok":
            return False
        assert health.HasField("uptime_seconds"), "a 1.0 client formats uptime_seconds"
        self.log.append(f"connected version={health.version} uptime={health.uptime_seconds:.2f}s")
        return True

    def health_check(self) -> bool:
        """True only for status "ok"."""
        try:
            health = self._stub.HealthCheck(
                compute_pb2.HealthRequest(), timeout=self.timeout, metadata=self._metadata
            )
        except grpc.RpcError:
            return False
        return bool(health.status == "ok")

    def get_service_info(self) -> dict[str, object] | None:
        """Read all fields of the answer."""
        try:
            info = self._stub.GetServiceInfo(
                compute_pb2.ServiceInfoRequest(), timeout=self.timeout, metadata=self._metadata
            )
        except grpc.RpcError:
            return None
        return {
            "service_name": info.service_name,
            "version": info.version,
            "device": info.device,
            "uptime_seconds": info.uptime_seconds if info.HasField("uptime_seconds") else None,
            "total_requests": info.total_requests,
            "custom_info": dict(info.custom_info),
        }

    def compute(self, tensor: torch.Tensor, model_id: str | None = None) -> torch.Tensor:
        """Run a model."""
        return self.compute_with_cache(tensor, model_id=model_id)[0]

    def compute_with_cache(
        self,
        tensor: torch.Tensor,
        past_key_values: Pairs | None = None,
        use_cache: bool = False,
        model_id: str | None = None,
        training_mode: bool = False,
        forward_id: str | None = None,
    ) -> tuple[torch.Tensor, Pairs | None, dict[str, object]]:
        """Run a model with a cache, or for training."""
        response = self.raw_compute(
            tensor, past_key_values, use_cache, model_id, training_mode, forward_id
        )
        assert response.HasField("compute_time_ms"), "a 1.0 client reads compute_time_ms"
        assert response.HasField("request_id"), "a 1.0 client matches request_id"
        assert response.request_id == self._next_request_id
        timing: dict[str, object] = {"compute_time_ms": response.compute_time_ms}
        if response.HasField("forward_id"):
            timing["forward_id"] = response.forward_id
        present = pairs_from_wire(response.present_key_values) or None
        return from_wire(response.data, response.shape), present, timing

    def raw_compute(
        self,
        tensor: torch.Tensor,
        past_key_values: Pairs | None = None,
        use_cache: bool = False,
        model_id: str | None = None,
        training_mode: bool = False,
        forward_id: str | None = None,
    ) -> compute_pb2.ComputeResponse:
        """Run a model and return the message itself."""
        data, shape = to_wire(tensor)
        self._next_request_id += 1
        request = compute_pb2.ComputeRequest(
            data=data, shape=shape, request_id=self._next_request_id
        )
        if model_id is not None:
            request.model_id = model_id
        if past_key_values:
            request.past_key_values.extend(pairs_to_wire(past_key_values))
        if use_cache:
            request.use_cache = True
        if training_mode:
            request.training_mode = True
        if forward_id is not None:
            request.forward_id = forward_id
        return self._with_retries(self._stub.Compute, request)

    def compute_backward(
        self,
        grad_output: torch.Tensor,
        forward_id: str,
        model_id: str | None = None,
        learning_rate: float | None = None,
    ) -> torch.Tensor:
        """Carry a gradient back."""
        data, shape = to_wire(grad_output)
        request = compute_pb2.BackwardRequest(
            grad_output_data=data, grad_output_shape=shape, forward_id=forward_id
        )
        if model_id is not None:
            request.model_id = model_id
        if learning_rate is not None:
            request.learning_rate = learning_rate
        response = self._with_retries(self._stub.ComputeBackward, request)
        assert response.forward_id == forward_id
        return from_wire(response.grad_input_data, response.grad_input_shape)

    def stream_monitoring(
        self, sampling_interval: float | None = None
    ) -> Iterator[dict[str, float | bool]]:
        """Yield the fields that every snapshot has."""
        request = compute_pb2.MonitoringStreamRequest()
        if sampling_interval is not None:
            request.sampling_interval = sampling_interval
        call = self._stub.StreamMonitoring(request, metadata=self._metadata)
        try:
            for response in call:
                snapshot = response.snapshot
                yield {
                    "timestamp": snapshot.timestamp,
                    "cpu_percent": snapshot.cpu_percent,
                    "memory_mb": snapshot.memory_mb,
                    "memory_percent": snapshot.memory_percent,
                    "gpu_available": snapshot.gpu_available,
                }
        finally:
            call.cancel()

    def _with_retries(self, rpc: grpc.UnaryUnaryMultiCallable, request: object):  # type: ignore[no-untyped-def, type-arg]
        delay = 1.0
        for self.attempts in (1, 2, 3):
            try:
                return rpc(request, timeout=self.timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                if error.code() in _NOT_RETRIED or self.attempts == 3:
                    raise
            self.waited.append(delay)
            self._sleep(delay)
            delay *= 2
        raise AssertionError("unreachable")


@dataclass
class V1Server:
    """The 1.0 server: it doubles its input, `y = 2x`, and so does its backward with the gradient.

    With `use_cache` it answers one layer whose key and value are the earlier ones and the input, joined
    along the sequence.

    Attributes:
        failures: statuses to fail the next calls with, one each, before it answers again.
        requests: every Compute and Backward message received.
        codec: how tensors become bytes, for servers that were configured for another.
    """

    status: str = "ok"
    failures: list[grpc.StatusCode] = field(default_factory=list)
    requests: list[object] = field(default_factory=list)
    encode: Callable[[torch.Tensor], tuple[bytes, list[int]]] = to_wire
    decode: Callable[[bytes, Sequence[int]], torch.Tensor] = from_wire

    def __enter__(self) -> V1Server:
        self._started = time.monotonic()
        self._kept: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(4),
            options=[
                ("grpc.max_send_message_length", _LIMIT),
                ("grpc.max_receive_message_length", _LIMIT),
            ],
        )
        compute_pb2_grpc.add_ComputeServiceServicer_to_server(_V1Servicer(self), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._server.stop(grace=1.0).wait()


class _V1Servicer(compute_pb2_grpc.ComputeServiceServicer):
    def __init__(self, server: V1Server) -> None:
        self._server = server

    def _begin(self, request: object, context: grpc.ServicerContext) -> None:
        with self._server._lock:
            self._server.requests.append(request)
            failure = self._server.failures.pop(0) if self._server.failures else None
        if failure is not None:
            context.abort(failure, "as the test asked")

    def Compute(
        self, request: compute_pb2.ComputeRequest, context: grpc.ServicerContext
    ) -> compute_pb2.ComputeResponse:
        self._begin(request, context)
        tensor = self._server.decode(request.data, request.shape)
        data, shape = self._server.encode(tensor * 2)
        response = compute_pb2.ComputeResponse(data=data, shape=shape, compute_time_ms=0.25)
        if request.HasField("request_id"):
            response.request_id = request.request_id
        if request.HasField("training_mode") and request.training_mode:
            forward_id = request.forward_id if request.HasField("forward_id") else "chosen-by-1.0"
            self._server._kept.add(forward_id)
            response.forward_id = forward_id
        if request.HasField("use_cache") and request.use_cache:
            past = pairs_from_wire(request.past_key_values)
            new = tensor.reshape(1, 1, -1, 1)
            key, value = past[0] if past else (new[:, :, :0], new[:, :, :0])
            present = [(torch.cat([key, new], 2), torch.cat([value, -new], 2))]
            response.present_key_values.extend(pairs_to_wire(present))
        return response

    def ComputeBackward(
        self, request: compute_pb2.BackwardRequest, context: grpc.ServicerContext
    ) -> compute_pb2.BackwardResponse:
        self._begin(request, context)
        if request.forward_id not in self._server._kept:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such forward")
        self._server._kept.discard(request.forward_id)
        grad = self._server.decode(request.grad_output_data, request.grad_output_shape)
        data, shape = self._server.encode(grad * 2)
        return compute_pb2.BackwardResponse(
            grad_input_data=data,
            grad_input_shape=shape,
            forward_id=request.forward_id,
            backward_time_ms=0.5,
        )

    def HealthCheck(
        self, request: compute_pb2.HealthRequest, context: grpc.ServicerContext
    ) -> compute_pb2.HealthResponse:
        return compute_pb2.HealthResponse(
            status=self._server.status,
            message="",
            version="1.0.0",
            uptime_seconds=time.monotonic() - self._server._started,
        )

    def GetServiceInfo(
        self, request: compute_pb2.ServiceInfoRequest, context: grpc.ServicerContext
    ) -> compute_pb2.ServiceInfoResponse:
        return compute_pb2.ServiceInfoResponse(
            service_name="doubler",
            version="1.0.0",
            device="cpu",
            uptime_seconds=time.monotonic() - self._server._started,
            total_requests=len(self._server.requests),
            custom_info={"factor": "2"},
        )

    def StreamMonitoring(
        self, request: compute_pb2.MonitoringStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[compute_pb2.MonitoringSnapshotResponse]:
        interval = request.sampling_interval if request.HasField("sampling_interval") else 1.0
        while context.is_active() and not self._server._stopping.is_set():
            yield compute_pb2.MonitoringSnapshotResponse(
                snapshot=compute_pb2.MonitoringSnapshot(
                    timestamp=time.time(), cpu_percent=1.0, memory_mb=2.0, memory_percent=3.0
                )
            )
            self._server._stopping.wait(min(max(interval, 0.1), 5.0))
