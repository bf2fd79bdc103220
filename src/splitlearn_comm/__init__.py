"""The communication layer: tensors over gRPC, wire 1.0, both ends.

    client  ──►  protocol  ──►  server  ──►  core.ComputeFunction
    GRPCComputeClient           GRPCComputeServer

`core` is what user code subclasses and what turns tensors into bytes; `server` puts a compute function
(or, through `ComputeBackend`, a whole node of them) on the network; `client` calls either. This layer
knows nothing of the manager, of files or of model ids beyond the string in the request.

The names below are imported on first use, so that importing the package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_comm._exports import lazy_exports

if TYPE_CHECKING:
    from splitlearn_comm.client.async_client import AsyncGRPCComputeClient
    from splitlearn_comm.client.errors import ClientClosed, RemoteComputeError, UnsupportedByServer
    from splitlearn_comm.client.grpc_client import GRPCComputeClient
    from splitlearn_comm.client.retry import ExponentialBackoff, FixedDelay, RetryStrategy
    from splitlearn_comm.core.codec import CompressedTensorCodec, Int8Codec, TensorCodec
    from splitlearn_comm.core.compression import Zlib, Zstd
    from splitlearn_comm.core.compute_function import ComputeFunction
    from splitlearn_comm.core.errors import (
        ComputeError,
        ComputeFailed,
        DeadlinePassed,
        InvalidRequest,
        NotReady,
        Overloaded,
        ServerStartError,
        SplitlearnCommError,
        UnknownTarget,
        Unsupported,
    )
    from splitlearn_comm.core.model_function import ModelComputeFunction
    from splitlearn_comm.server.backend import ComputeBackend, SingleFunctionBackend
    from splitlearn_comm.server.compute_server import GRPCComputeServer
    from splitlearn_comm.server.monitoring import SystemMonitor
    from splitlearn_comm.server.servicer import ComputeServicer

__all__ = [
    "AsyncGRPCComputeClient",
    "ClientClosed",
    "CompressedTensorCodec",
    "ComputeBackend",
    "ComputeError",
    "ComputeFailed",
    "ComputeFunction",
    "ComputeServicer",
    "DeadlinePassed",
    "ExponentialBackoff",
    "FixedDelay",
    "GRPCComputeClient",
    "GRPCComputeServer",
    "Int8Codec",
    "InvalidRequest",
    "ModelComputeFunction",
    "NotReady",
    "Overloaded",
    "RemoteComputeError",
    "RetryStrategy",
    "ServerStartError",
    "SingleFunctionBackend",
    "SplitlearnCommError",
    "SystemMonitor",
    "TensorCodec",
    "UnknownTarget",
    "Unsupported",
    "UnsupportedByServer",
    "Zlib",
    "Zstd",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        name: f"splitlearn_comm.{module}"
        for module, names in {
            "client.async_client": ("AsyncGRPCComputeClient",),
            "client.errors": ("ClientClosed", "RemoteComputeError", "UnsupportedByServer"),
            "client.grpc_client": ("GRPCComputeClient",),
            "client.retry": ("ExponentialBackoff", "FixedDelay", "RetryStrategy"),
            "core.codec": ("CompressedTensorCodec", "Int8Codec", "TensorCodec"),
            "core.compression": ("Zlib", "Zstd"),
            "core.compute_function": ("ComputeFunction",),
            "core.errors": (
                "ComputeError",
                "ComputeFailed",
                "DeadlinePassed",
                "InvalidRequest",
                "NotReady",
                "Overloaded",
                "ServerStartError",
                "SplitlearnCommError",
                "UnknownTarget",
                "Unsupported",
            ),
            "core.model_function": ("ModelComputeFunction",),
            "server.backend": ("ComputeBackend", "SingleFunctionBackend"),
            "server.compute_server": ("GRPCComputeServer",),
            "server.monitoring": ("SystemMonitor",),
            "server.servicer": ("ComputeServicer",),
        }.items()
        for name in names
    },
)
