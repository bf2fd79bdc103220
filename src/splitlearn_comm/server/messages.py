"""Translates between the wire's messages and tensors; decides nothing about models or statuses."""

from __future__ import annotations

import math

import torch

from splitlearn_comm.core import shared_memory
from splitlearn_comm.core.codec import Int8Codec, TensorCodec, dtype_name
from splitlearn_comm.core.compression import COMPRESSIONS
from splitlearn_comm.core.errors import InvalidRequest
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.monitoring import LoadSnapshot

DTYPE_KEY = "dtype"
COMPRESSION_KEY = "compression"
_ANNOUNCED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

EXTENSIONS_KEY = "extensions"
"""In the service's information: what of `extensions` a server knows, separated by spaces."""

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 5.0
DEFAULT_INTERVAL_S = 1.0


def extensions() -> tuple[str, ...]:
    """What requests may announce here beyond wire 1.0."""
    dtypes = (*map(dtype_name, _ANNOUNCED_DTYPES), Int8Codec.wire_dtype)
    return (
        *(f"{DTYPE_KEY}:{name}" for name in dtypes),
        *(f"{COMPRESSION_KEY}:{name}" for name in COMPRESSIONS),
        *((shared_memory.KEY,) if shared_memory.available() else ()),
    )


def codec_for(request: compute_pb2.ComputeRequest, codec: TensorCodec) -> TensorCodec:
    """Return the model's codec, in the dtype and with the compression that the request announces.

    Raises:
        InvalidRequest: if it announces one that the wire does not know.
    """
    if not request.metadata:
        return codec
    # Not by `get`: a map of strings would be given the key.
    if COMPRESSION_KEY in request.metadata:
        name = request.metadata[COMPRESSION_KEY]
        if name not in COMPRESSIONS:
            known = ", ".join(COMPRESSIONS)
            raise InvalidRequest(f'metadata["compression"]: expected one of {known}, got {name!r}')
        codec = codec.with_compression(COMPRESSIONS[name])
    if DTYPE_KEY not in request.metadata:
        return codec
    name = request.metadata[DTYPE_KEY]
    if name == Int8Codec.wire_dtype:
        return codec.with_int8()
    for dtype in _ANNOUNCED_DTYPES:
        if dtype_name(dtype) == name:
            return codec.with_dtype(dtype)
    names = ", ".join((*map(dtype_name, _ANNOUNCED_DTYPES), Int8Codec.wire_dtype))
    raise InvalidRequest(f'metadata["dtype"]: expected one of {names}, got {name!r}')


def snapshot_message(load: LoadSnapshot) -> compute_pb2.MonitoringSnapshot:
    """Return the snapshot's message; GPU fields are absent where there are no values."""
    message = compute_pb2.MonitoringSnapshot(
        timestamp=load.timestamp,
        cpu_percent=load.cpu_percent,
        memory_mb=load.memory_mb,
        memory_percent=load.memory_percent,
        gpu_available=load.gpu is not None,
    )
    if load.gpu is not None:
        message.gpu_memory_used_mb = load.gpu.memory_used_mb
        message.gpu_memory_total_mb = load.gpu.memory_total_mb
        if load.gpu.utilization is not None:
            message.gpu_utilization = load.gpu.utilization
    return message


def interval_s(request: compute_pb2.MonitoringStreamRequest) -> float:
    """Return the seconds between two snapshots, within what the server is willing to do."""
    if not request.HasField("sampling_interval") or math.isnan(request.sampling_interval):
        return DEFAULT_INTERVAL_S
    return min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, float(request.sampling_interval)))
