"""Translates between the wire's messages and what a client's caller sees; makes no calls."""

from __future__ import annotations

from typing import TypedDict

import torch

from splitlearn_comm.core.codec import TensorCodec, dtype_name
from splitlearn_comm.protocol import compute_pb2


class ServiceDescription(TypedDict):
    """What a server says of itself; `uptime_seconds` is None if it does not say."""

    service_name: str
    version: str
    device: str
    uptime_seconds: float | None
    total_requests: int
    custom_info: dict[str, str]


class MonitoringData(TypedDict):
    """The load of the server's machine; `timestamp` in Unix seconds, GPU values None where there are none."""

    timestamp: float
    cpu_percent: float
    memory_mb: float
    memory_percent: float
    gpu_available: bool
    gpu_utilization: float | None
    gpu_memory_used_mb: float | None
    gpu_memory_total_mb: float | None


def service_description(info: compute_pb2.ServiceInfoResponse) -> ServiceDescription:
    """Return the message as the caller sees it."""
    return ServiceDescription(
        service_name=info.service_name,
        version=info.version,
        device=info.device,
        uptime_seconds=info.uptime_seconds if info.HasField("uptime_seconds") else None,
        total_requests=info.total_requests,
        custom_info=dict(info.custom_info),
    )


def encode_exactly(
    tensor: torch.Tensor, codec: TensorCodec, *, copies: bool = True
) -> tuple[bytes | memoryview, list[int]]:
    """Encode a tensor whose integers, if it has any, must arrive as they are.

    Args:
        copies: False to be given a view, where the tensor's own memory holds those bytes.

    Raises:
        ValueError: if integers would not arrive exactly.
        TypeError: as `TensorCodec.encode`.
    """
    data, shape = codec.encode(tensor) if copies else codec.view(tensor)
    if not tensor.is_floating_point() and not codec.exact:
        raise ValueError(
            f"the tensor has integers, which do not arrive as they are as {codec.wire_dtype}; "
            "send them with another codec"
        )
    changes = not tensor.is_floating_point() and tensor.dtype is not codec.dtype
    if changes and not _holds(tensor.to(codec.dtype), tensor):
        raise ValueError(
            f"the tensor has integers that {dtype_name(codec.dtype)}, the dtype on the wire, "
            "cannot hold exactly"
        )
    return data, shape


def _holds(sent: torch.Tensor, integers: torch.Tensor) -> bool:
    # What comes back the same was not always the same: an infinity may, and the other half of as many bits.
    if sent.is_floating_point():
        if not bool(sent.isfinite().all()):
            return False
    elif sent.dtype.is_signed is not integers.dtype.is_signed:
        signed = sent if sent.dtype.is_signed else integers
        if bool((signed < 0).any()):
            return False
    return torch.equal(sent.to(integers.dtype), integers)


def monitoring_data(load: compute_pb2.MonitoringSnapshot) -> MonitoringData:
    """Return the message as the caller sees it."""

    def optional(field: str) -> float | None:
        return float(getattr(load, field)) if load.HasField(field) else None

    return MonitoringData(
        timestamp=load.timestamp,
        cpu_percent=load.cpu_percent,
        memory_mb=load.memory_mb,
        memory_percent=load.memory_percent,
        gpu_available=load.gpu_available,
        gpu_utilization=optional("gpu_utilization"),
        gpu_memory_used_mb=optional("gpu_memory_used_mb"),
        gpu_memory_total_mb=optional("gpu_memory_total_mb"),
    )
