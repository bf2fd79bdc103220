"""The server's end: the servicer of wire 1.0, the seam behind it, and the network before it.

compute_server   GRPCComputeServer: one function on one port
backend          ComputeBackend: what a servicer serves
servicer         the rpcs; messages and statuses translate for it
addresses        where a server listens
grpc_server      threads and bounds; the server itself is `splitlearn_comm.http2`, or gRPC's own
monitoring       the machine's load
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_comm._exports import lazy_exports

if TYPE_CHECKING:
    from splitlearn_comm.server.addresses import join_address
    from splitlearn_comm.server.backend import (
        ComputeBackend,
        Health,
        Opened,
        ServiceInfo,
        SingleFunctionBackend,
    )
    from splitlearn_comm.server.compute_server import GRPCComputeServer
    from splitlearn_comm.server.grpc_server import NetworkServer, build_server
    from splitlearn_comm.server.monitoring import GpuLoad, LoadMonitor, LoadSnapshot, SystemMonitor
    from splitlearn_comm.server.servicer import ComputeServicer

__all__ = [
    "ComputeBackend",
    "ComputeServicer",
    "GRPCComputeServer",
    "GpuLoad",
    "Health",
    "LoadMonitor",
    "LoadSnapshot",
    "NetworkServer",
    "Opened",
    "ServiceInfo",
    "SingleFunctionBackend",
    "SystemMonitor",
    "build_server",
    "join_address",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        name: f"{__name__}.{module}"
        for module, names in {
            "backend": (
                "ComputeBackend",
                "Health",
                "Opened",
                "ServiceInfo",
                "SingleFunctionBackend",
            ),
            "compute_server": ("GRPCComputeServer",),
            "addresses": ("join_address",),
            "grpc_server": ("NetworkServer", "build_server"),
            "monitoring": ("GpuLoad", "LoadMonitor", "LoadSnapshot", "SystemMonitor"),
            "servicer": ("ComputeServicer",),
        }.items()
        for name in names
    },
)
