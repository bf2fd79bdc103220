"""Every refusal of the communication layer is one of these types; gRPC is not known here.

    SplitlearnCommError
    ├── ComputeError            a request that gets no answer; the server turns the type into a status
    │   ├── InvalidRequest      the caller's mistake: bytes, shape, dtype, values        INVALID_ARGUMENT
    │   ├── UnknownTarget       no such model_id or forward_id                           NOT_FOUND
    │   ├── NotReady            loading, draining, nothing ready: try again              UNAVAILABLE
    │   ├── Overloaded          no queue room or no memory at the moment                 RESOURCE_EXHAUSTED
    │   │   └── OutOfMemory     no memory for this very batch
    │   ├── DeadlinePassed      the caller's time is up; the work was not done           DEADLINE_EXCEEDED
    │   ├── Unsupported         this model cannot do what was asked, ever                UNIMPLEMENTED
    │   └── ComputeFailed       the model raised or gave no tensor                       INTERNAL
    └── ServerStartError        the server cannot listen on its address

Clients of version 1.0 send a request again after every status except INVALID_ARGUMENT, NOT_FOUND,
UNIMPLEMENTED, UNAUTHENTICATED and PERMISSION_DENIED, so the choice of type decides whether they do.
The client's own errors are in `splitlearn_comm.client.errors`.
"""

from __future__ import annotations


class SplitlearnCommError(Exception):
    """Base of all errors raised by this package."""


class ComputeError(SplitlearnCommError):
    """A request that gets no answer.

    Args:
        message: one or two sentences for a person: what is wrong, where, and what was expected.
        reason: a stable CamelCase word for logs and metrics; the type's name unless given.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).__name__


class InvalidRequest(ComputeError):
    """The request itself is wrong, and sending it again cannot help."""


class UnknownTarget(ComputeError):
    """No model, endpoint or kept forward of that name."""


class NotReady(ComputeError):
    """The target exists and cannot answer at the moment."""


class Overloaded(ComputeError):
    """There is no room for the request at the moment: a full queue, or memory."""


class OutOfMemory(Overloaded):
    """There was no memory to run the model on this input.

    Args:
        batch: the size of the input's first dimension.
    """

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


class DeadlinePassed(ComputeError):
    """The caller's deadline passed before the work began; it was not done."""


class Unsupported(ComputeError):
    """The model cannot do what was asked, whatever the request looks like."""


class ComputeFailed(ComputeError):
    """The model raised an error, or returned something that is no tensor."""


class ServerStartError(SplitlearnCommError):
    """The server cannot listen on its address."""
