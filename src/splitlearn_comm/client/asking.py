"""What a client can ask of a server beside computing: how it is, what it serves, how much it has to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from splitlearn_comm.client.channel import ComputeChannel
from splitlearn_comm.client.errors import RemoteComputeError
from splitlearn_comm.client.messages import (
    MonitoringData,
    ServiceDescription,
    monitoring_data,
    service_description,
)
from splitlearn_comm.protocol import compute_pb2

HEALTHY = "ok"
_log = logging.getLogger(__name__)


class AsksServer:
    """See the module's text.

    Args:
        timeout: seconds for each question, its retries and the waits between them included.
    """

    def __init__(self, channel: ComputeChannel, timeout: float) -> None:
        self.server_address = channel.address
        self.timeout = timeout
        self._channel = channel
        self._last_load: compute_pb2.MonitoringSnapshot | None = None

    def health_check(self) -> bool:
        """Ask once; False if the server cannot be reached or is not healthy."""
        health = self._health()
        return health is not None and health.status == HEALTHY

    def get_service_info(self) -> ServiceDescription | None:
        """Return what the server says of itself, None if it cannot be reached."""
        try:
            info = self._info()
        except RemoteComputeError as error:
            _log.warning("server=%s rpc=GetServiceInfo %s", self.server_address, error)
            return None
        return service_description(info)

    def get_server_monitoring_data(self) -> MonitoringData | None:
        """Return the newest load that came with an answer; without one, ask for it.

        Returns:
            None if the server cannot be reached.
        """
        if self._last_load is not None:
            return monitoring_data(self._last_load)
        try:
            return next(self._loads(timeout_s=self.timeout), None)
        except RemoteComputeError as error:
            _log.warning("server=%s rpc=StreamMonitoring %s", self.server_address, error)
            return None

    def stream_monitoring(self, sampling_interval: float = 1.0) -> Iterator[MonitoringData]:
        """Yield the server's load until the iterator is closed, the client is, or the server stops.

        Args:
            sampling_interval: seconds between two; the server keeps it within 0.1 and 5.

        Raises:
            RemoteComputeError: when the stream breaks.
        """
        return self._loads(sampling_interval)

    def _loads(
        self, sampling_interval: float = 1.0, timeout_s: float | None = None
    ) -> Iterator[MonitoringData]:
        answers = self._channel.stream(
            "StreamMonitoring",
            compute_pb2.MonitoringStreamRequest(sampling_interval=sampling_interval),
            compute_pb2.MonitoringSnapshotResponse,
            timeout_s=timeout_s,
        )
        for answer in answers:
            self._last_load = answer.snapshot
            yield monitoring_data(answer.snapshot)

    def _info(self) -> compute_pb2.ServiceInfoResponse:
        return self._channel.call(
            "GetServiceInfo",
            compute_pb2.ServiceInfoRequest(),
            compute_pb2.ServiceInfoResponse,
            timeout_s=self.timeout,
            retry=True,
        )

    def _health(self) -> compute_pb2.HealthResponse | None:
        try:
            return self._channel.call(
                "HealthCheck",
                compute_pb2.HealthRequest(),
                compute_pb2.HealthResponse,
                timeout_s=self.timeout,
                retry=False,
            )
        except RemoteComputeError as error:
            _log.warning("server=%s rpc=HealthCheck %s", self.server_address, error)
            return None

    def _note_load(
        self, response: compute_pb2.ComputeResponse | compute_pb2.BackwardResponse
    ) -> None:
        if response.HasField("monitoring_data"):
            self._last_load = response.monitoring_data
