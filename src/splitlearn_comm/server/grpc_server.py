"""Puts a `ComputeServicer` on the network, with room for further services on the same port.

Three kinds of calls get threads of their own, so that none starves another:

    compute   Compute, ComputeBackward                    max_workers threads, max_waiting calls queue; those
                                                          that need no thread are taken over without one
    streams   StreamMonitoring                            max_streams threads, nothing queues
    requests  ComputeStream                               as compute calls, each request of a stream
    control   HealthCheck, GetServiceInfo, and whatever else is registered on the server
              without a pool of its own (see `OnPool`)

A call that finds its kind full is refused at once with RESOURCE_EXHAUSTED, before its message is read, and so
are calls beyond all bounds together. This module never looks into a message.

The server is our own (`splitlearn_comm.http2`). Where encryption or interceptors are asked for it is gRPC's,
which gives each call a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc
from google.protobuf.message import Message

from splitlearn_comm.core.errors import ServerStartError
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.http2.calls import Call, Stream, Wire
from splitlearn_comm.http2.polling import Work
from splitlearn_comm.http2.server import Server
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server.addresses import BoundSocket, bind, bind_socket
from splitlearn_comm.server.pool import BoundedPool
from splitlearn_comm.server.servicer import ComputeServicer
from splitlearn_comm.server.streams import Streams

SERVICE = compute_pb2.DESCRIPTOR.services_by_name["ComputeService"].full_name
DEFAULT_MAX_MESSAGE_LENGTH = 100 * 1024 * 1024
DEFAULT_MAX_WAITING = 1024
DEFAULT_MAX_STREAMS = 16
_CONTROL_WORKERS = 4
_CONTROL_WAITING = 256
# Refusals take no time, so a few may be under way beyond all the other bounds.
_REFUSALS_WAITING = 64
# Once all calls have ended for their callers, handlers only have to return.
_LAST_HANDLERS_S = 1.0

Interceptor: TypeAlias = "grpc.ServerInterceptor[Message, Message]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Message, Message]"
if TYPE_CHECKING:
    # Generic for the type checker only.
    GenericHandler: TypeAlias = grpc.GenericRpcHandler[Message, Message]
else:
    GenericHandler = grpc.GenericRpcHandler


@dataclass(frozen=True)
class OnPool:
    """A handler that runs on a pool of its own: servers look for this attribute."""

    handle: Callable[..., object]
    experimental_thread_pool: ThreadPoolExecutor

    def __call__(self, request: object, context: grpc.ServicerContext) -> object:
        return self.handle(request, context)


@dataclass(frozen=True)
class _TakesOver(OnPool):
    """A handler that takes calls over where the server lets it, see `splitlearn_comm.http2.calls`."""

    begin: Callable[[Bytes, Call], None]


@dataclass(frozen=True)
class _Opens(OnPool):
    """A handler that opens streams where the server lets it, see `splitlearn_comm.http2.calls`."""

    open: Callable[[Wire], Stream]


@dataclass(frozen=True)
class _Full(OnPool):
    """Refuses calls, with this text."""

    full: str


@dataclass(frozen=True)
class _Route:
    """One rpc: its handler, its pool, and what it is called when that is full."""

    handler: Handler
    pool: BoundedPool
    kind: str


class _Routes(GenericHandler):
    """Finds the handler of each call, or the refusal if its pool is full.

    Servers ask it for every call, one at a time, and count the call in the pool before they ask again:
    no call can slip in between.
    """

    def __init__(self, routes: dict[str, _Route], refusals: BoundedPool) -> None:
        self._routes = routes
        self._refusals = refusals

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Return what answers the call; None if it is not one of this service."""
        route = self._routes.get(handler_call_details.method)
        if route is None:
            return None
        return self._refusal(route) if route.pool.full else route.handler

    def _refusal(self, route: _Route) -> Handler:
        text = (
            f"the server has {route.pool.limit} {route.kind} under way, its limit; try again later"
        )

        def refuse(_: object, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

        # As if the request were a stream, because only then gRPC does not read its message first.
        return grpc.stream_unary_rpc_method_handler(_Full(refuse, self._refusals, text))


class NetworkServer:
    """A gRPC server that listens and has not started yet; made by `build_server`.

    Attributes:
        grpc_server: for registering further services and handlers before `start`.
        port: the TCP port that it listens on.
    """

    def __init__(
        self,
        grpc_server: grpc.Server,
        port: int,
        servicer: ComputeServicer,
        streams: Streams,
        pools: Sequence[BoundedPool],
        unix_socket: BoundSocket | None,
    ) -> None:
        self._unix_socket = unix_socket
        self.grpc_server = grpc_server
        self.port = port
        self._servicer = servicer
        self._streams = streams
        self._pools = tuple(pools)

    def start(self) -> None:
        """Begin to answer."""
        self.grpc_server.start()

    def stop(self, grace_s: float = 5.0) -> bool:
        """Refuse new calls, end streams, wait for running calls, cancel what is left.

        May be called more than once and from any thread.

        Args:
            grace_s: seconds that running calls get to finish.

        Returns:
            Whether all handlers have ended. False: a model still runs, whose caller was told.
        """
        self._servicer.end_streams()
        self._streams.stop()
        self.grpc_server.stop(grace_s).wait()
        if self._unix_socket is not None:
            self._unix_socket.remove()
        idle = True
        for pool in self._pools:
            idle = pool.wait_idle(_LAST_HANDLERS_S) and idle
            pool.shutdown(wait=False)
        return idle

    def wait_for_termination(self, timeout_s: float | None = None) -> bool:
        """Wait until the server has stopped; True if `timeout_s` passed first."""
        return bool(self.grpc_server.wait_for_termination(timeout_s))


def build_server(
    servicer: ComputeServicer,
    address: str,
    *,
    max_workers: int = 10,
    max_waiting: int = DEFAULT_MAX_WAITING,
    max_streams: int = DEFAULT_MAX_STREAMS,
    max_message_length: int = DEFAULT_MAX_MESSAGE_LENGTH,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[Interceptor] = (),
    work: Work | None = None,
    unix_socket: Path | None = None,
) -> NetworkServer:
    """Bind a server to `address` and register the compute service on it.

    Handlers registered besides run on the control pool. An interceptor must return the handler it was given,
    unchanged, for the calls it lets pass: a wrapped one loses its pool.

    Args:
        servicer: answers the compute service.
        address: `host:port` (port 0 picks a free one) or `unix:PATH`.
        max_workers: Compute and ComputeBackward calls that run at once.
        max_waiting: such calls that may wait beyond those.
        max_streams: monitoring streams at once; and streams of requests, where these need threads.
        max_message_length: bytes, each way.
        credentials: TLS; plain text without.
        interceptors: as for `grpc.server`.
        unix_socket: also listen there, in plain text, for the user of this process alone.
        work: what the polling thread runs between two looks for calls, where that is possible.

    Raises:
        ServerStartError: if the address cannot be listened on.
    """
    compute = BoundedPool("compute", max_workers, max_waiting)
    streams = BoundedPool("monitoring-stream", max_streams, 0)
    control = BoundedPool("control", _CONTROL_WORKERS, _CONTROL_WAITING)
    refusals = BoundedPool("refusal", 1, _REFUSALS_WAITING)
    is_ours = credentials is None and not interceptors
    # Those that are taken over need no threads.
    compute_streams = compute if is_ours else BoundedPool("compute-stream", max_streams, 0)
    opened = Streams(servicer.begin, compute, max_message_length)
    pools = tuple(dict.fromkeys((compute, compute_streams, streams, control, refusals)))
    most = sum(pool.limit for pool in pools)
    server: grpc.Server
    if is_ours:
        server = Server(control, max_message_length=max_message_length, max_calls=most, work=work)
    else:
        server = _server_of_grpc(control, interceptors, most, max_message_length)
    server.add_generic_rpc_handlers(
        (_Routes(_routes(servicer, opened, compute, compute_streams, streams, control), refusals),)
    )
    try:
        port = bind(server, address, credentials)
        bound = None if unix_socket is None else bind_socket(server, unix_socket)
    except ServerStartError:
        server.stop(None)
        for pool in pools:
            pool.shutdown(wait=False)
        raise
    return NetworkServer(server, port, servicer, opened, pools, bound)


def _server_of_grpc(
    pool: BoundedPool, interceptors: Sequence[Interceptor], most: int, max_message_length: int
) -> grpc.Server:
    return grpc.server(
        pool,
        interceptors=list(interceptors),
        maximum_concurrent_rpcs=most,
        options=(
            ("grpc.max_receive_message_length", max_message_length),
            ("grpc.max_send_message_length", max_message_length),
            # Without this, a second server on the same port starts and takes half of the requests.
            ("grpc.so_reuseport", 0),
        ),
    )


def _routes(
    servicer: ComputeServicer,
    opened: Streams,
    compute: BoundedPool,
    compute_streams: BoundedPool,
    streams: BoundedPool,
    control: BoundedPool,
) -> dict[str, _Route]:
    def unary(
        handle: Callable[..., Message | bytes],
        request: type[Message],
        pool: BoundedPool,
        begin: Callable[[Bytes, Call], None] | None = None,
    ) -> Handler:
        return grpc.unary_unary_rpc_method_handler(
            _TakesOver(handle, pool, begin) if begin is not None else OnPool(handle, pool),
            request_deserializer=request.FromString,
            response_serializer=_serialized,
        )

    stream = grpc.unary_stream_rpc_method_handler(
        OnPool(servicer.StreamMonitoring, streams),
        request_deserializer=compute_pb2.MonitoringStreamRequest.FromString,
        response_serializer=_serialized,
    )
    requests = grpc.stream_stream_rpc_method_handler(
        _Opens(opened.handle, compute_streams, opened.open)
    )
    forward = unary(servicer.Compute, compute_pb2.ComputeRequest, compute, servicer.begin_compute)
    backward = unary(
        servicer.ComputeBackward, compute_pb2.BackwardRequest, compute, servicer.begin_backward
    )
    health = unary(servicer.HealthCheck, compute_pb2.HealthRequest, control)
    info = unary(servicer.GetServiceInfo, compute_pb2.ServiceInfoRequest, control)
    return {
        f"/{SERVICE}/Compute": _Route(forward, compute, "compute calls"),
        f"/{SERVICE}/ComputeBackward": _Route(backward, compute, "compute calls"),
        f"/{SERVICE}/ComputeStream": _Route(requests, compute_streams, "streams"),
        f"/{SERVICE}/HealthCheck": _Route(health, control, "control calls"),
        f"/{SERVICE}/GetServiceInfo": _Route(info, control, "control calls"),
        f"/{SERVICE}/StreamMonitoring": _Route(stream, streams, "monitoring streams"),
    }


def _serialized(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()
