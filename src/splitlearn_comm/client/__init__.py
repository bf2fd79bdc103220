"""The caller's end: a client for servers of wire 1.0.

grpc_client   GRPCComputeClient: tensors in, tensors out
async_client  AsyncGRPCComputeClient: the same for asyncio
prepared      one request, from the tensor to its answer
requests      many requests over one stream
time_limits   those of them whose time is over
channel       calls: time limit, retries, errors
retry         when to try again
statistics    where the time went
errors        what the caller catches
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_comm._exports import lazy_exports

if TYPE_CHECKING:
    from splitlearn_comm.client.async_client import AsyncGRPCComputeClient
    from splitlearn_comm.client.errors import ClientClosed, RemoteComputeError, UnsupportedByServer
    from splitlearn_comm.client.grpc_client import GRPCComputeClient
    from splitlearn_comm.client.messages import MonitoringData, ServiceDescription
    from splitlearn_comm.client.retry import ExponentialBackoff, FixedDelay, RetryStrategy
    from splitlearn_comm.client.statistics import Statistics, Timing

__all__ = [
    "AsyncGRPCComputeClient",
    "ClientClosed",
    "ExponentialBackoff",
    "FixedDelay",
    "GRPCComputeClient",
    "MonitoringData",
    "RemoteComputeError",
    "RetryStrategy",
    "ServiceDescription",
    "Statistics",
    "Timing",
    "UnsupportedByServer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        name: f"{__name__}.{module}"
        for module, names in {
            "async_client": ("AsyncGRPCComputeClient",),
            "errors": ("ClientClosed", "RemoteComputeError", "UnsupportedByServer"),
            "grpc_client": ("GRPCComputeClient",),
            "messages": ("MonitoringData", "ServiceDescription"),
            "retry": ("ExponentialBackoff", "FixedDelay", "RetryStrategy"),
            "statistics": ("Statistics", "Timing"),
        }.items()
        for name in names
    },
)
