"""What a caller is told of the manager's errors."""

from __future__ import annotations

from splitlearn_comm.core.errors import ComputeError, NotReady, UnknownTarget
from splitlearn_manager.errors import ModelNotFound, SplitlearnError


def refusal_of(error: SplitlearnError) -> ComputeError:
    """The refusal that an error is on the wire."""
    kind = UnknownTarget if isinstance(error, ModelNotFound) else NotReady
    return kind(error.message, error.reason)
