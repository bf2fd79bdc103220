"""Decides which gRPC status and which text a refused request ends with; the only place that does.

The text is for a person: what is wrong, never a stack trace. It travels in an HTTP header, so it is short.
"""

from __future__ import annotations

import grpc

from splitlearn_comm.core.errors import (
    ComputeError,
    ComputeFailed,
    DeadlinePassed,
    InvalidRequest,
    NotReady,
    Overloaded,
    UnknownTarget,
    Unsupported,
)
from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_comm.core.raised import in_one_line

STATUS_OF: dict[type[ComputeError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownTarget: grpc.StatusCode.NOT_FOUND,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    ComputeFailed: grpc.StatusCode.INTERNAL,
}

# Characters outside ASCII take up to twelve bytes each in a header, and headers end at 8 KiB.
_MAX_DETAILS = 600


def status_of(error: ComputeError) -> grpc.StatusCode:
    """Return the status of an error's type, or of the nearest base that has one."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return STATUS_OF[kind]
    return grpc.StatusCode.INTERNAL


def details_of(error: ComputeError) -> str:
    """Return the error's message, shortened to what fits into a header."""
    text = error.message
    return text if len(text) <= _MAX_DETAILS else text[: _MAX_DETAILS - 1] + "…"


def from_model_error(model_id: str, error: BaseException) -> ComputeError:
    """Turn what a model raised into the error that the caller is told."""
    what = in_one_line(error)
    # Empty while the server has not chosen a model yet.
    who = f"model {model_id!r}" if model_id else "the server"
    if is_out_of_memory(error):
        return Overloaded(f"{who} ran out of memory: {what}", "OutOfMemory")
    return ComputeFailed(f"{who} raised {what}", "ModelRaised")
