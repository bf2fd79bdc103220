"""The seam between the network and what computes: one servicer serves one function or a whole node.

The servicer asks a `ComputeBackend` to open the target of each request and holds it for as long as the
model runs; everything about which model that is, whether it is ready, and what memory it takes is the
backend's. A backend refuses with the types of `splitlearn_comm.core.errors` and knows no gRPC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.compute_function import ComputeFunction
from splitlearn_comm.core.errors import ComputeError
from splitlearn_comm.core.packed import Packed, Rows

HEALTHY = "ok"


@dataclass(frozen=True)
class Opened:
    """The target of one request.

    Attributes:
        model_id: the model that was chosen; a later backward with the forward's id comes back to it.
        function: what runs.
        codec: how this model's tensors travel, unless the request announces a dtype.
        version: what callers are told of which version of the model answers; empty for nothing.
    """

    model_id: str
    function: ComputeFunction
    codec: TensorCodec
    version: str = ""


@dataclass(frozen=True)
class Health:
    """What HealthCheck answers; clients take any status but "ok" as not healthy."""

    status: str = HEALTHY
    message: str = ""


@dataclass(frozen=True)
class ServiceInfo:
    """What GetServiceInfo answers, apart from version, uptime and request count."""

    service_name: str
    device: str
    custom_info: Mapping[str, str] = field(default_factory=dict)


class ComputeBackend(Protocol):
    """What a `ComputeServicer` serves. All methods are called from several threads at once."""

    @property
    def version(self) -> str:
        """The version that clients are told."""

    def open(
        self,
        model_id: str,
        *,
        forward_id: str | None = None,
        remaining_s: float | None = None,
    ) -> AbstractContextManager[Opened]:
        """Find the target of a request and hold it while the context lasts.

        Args:
            model_id: as the request names it, a model or an endpoint; empty to let the backend choose.
                For a backward it is the id that the forward's `Opened` had, wherever the servicer
                still knows it.
            forward_id: given for a backward. With an empty `model_id`, nobody knows which model
                keeps that forward: a backend with more than one raises `UnknownTarget`.
            remaining_s: seconds until the caller's deadline, None without one; the longest to wait.

        Raises:
            ComputeError: one of its types, when entered.
        """

    def health(self) -> Health:
        """Say whether requests are served at the moment; must not wait."""

    def service_info(self) -> ServiceInfo:
        """Describe the service; must not wait."""

    def observe(self, model_id: str, status: str, duration_s: float) -> None:
        """Told once for each Compute and ComputeBackward, after it.

        Args:
            model_id: of the model that was opened, or what the request named if none was.
            status: the name of the gRPC status, "OK" for an answer.
            duration_s: from the start of the handler to its end.
        """


class Inference(Protocol):
    """A request for a plain forward, on its way: unpacked, run and answered, or refused, once.

    Attributes:
        until_s: when its caller stops waiting, on `time.monotonic`; None if never.
    """

    until_s: float | None

    def unpack(self, codec: TensorCodec) -> Packed:
        """The tensor's bytes, given how the model's tensors travel; to be asked for once.

        Raises:
            InvalidRequest: its bytes are none of that shape.
        """

    def check_wanted(self) -> None:
        """Raise `DeadlinePassed` if nobody waits for the answer any more."""

    def answer(self, model_id: str, output: Rows, computed_ms: float, version: str = "") -> None:
        """Send what the model answered, and which version of it did. Never raises."""

    def refuse(self, error: ComputeError, model_id: str = "") -> None:
        """End the request without an answer. Never raises."""


class Inferences(Protocol):
    """Takes plain forwards over, to answer them later and together."""

    def enter(self, model_id: str, inference: Inference) -> bool:
        """Take one over, without waiting. False: it has to be waited for, see `ComputeBackend.open`.

        Raises:
            ComputeError: one of its types; the request has not been taken then.
        """


class SingleFunctionBackend:
    """Serves one function under every model_id, as servers of version 1.0 do.

    Args:
        function: what answers all requests.
        codec: how tensors travel; plain float32 unless given.
        version: what clients are told.
    """

    def __init__(
        self, function: ComputeFunction, codec: TensorCodec | None = None, version: str = "1.0"
    ) -> None:
        self._function = function
        self._codec = codec or TensorCodec()
        self._version = version
        self._name = str(function.get_info().get("name", type(function).__name__))

    @property
    def version(self) -> str:
        """The version that clients are told."""
        return self._version

    @contextmanager
    def open(
        self,
        model_id: str,
        *,
        forward_id: str | None = None,
        remaining_s: float | None = None,
    ) -> Iterator[Opened]:
        """Open the one function, whatever `model_id` is."""
        yield Opened(self._name, self._function, self._codec)

    def health(self) -> Health:
        """Healthy as long as the server runs."""
        return Health()

    def service_info(self) -> ServiceInfo:
        """Describe the function by its own `get_info`."""
        info = self._function.get_info()
        return ServiceInfo(
            service_name=str(info.get("name", self._name)),
            device=str(info.get("device", "cpu")),
            custom_info={str(key): str(value) for key, value in info.items()},
        )

    def observe(self, model_id: str, status: str, duration_s: float) -> None:
        """Keeps no record."""
