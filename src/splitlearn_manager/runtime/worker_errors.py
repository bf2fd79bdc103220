"""Errors on their way from a worker to the node: what is refused there is refused here, in the same words."""

from __future__ import annotations

from typing import TypeVar

from splitlearn_comm.core.errors import ComputeError, ComputeFailed, OutOfMemory
from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.errors import LoadError, SplitlearnError
from splitlearn_manager.runtime.channel import Message

T = TypeVar("T")


def as_message(error: BaseException) -> Message:
    """An error as JSON has it."""
    if isinstance(error, OutOfMemory):
        return {"type": "OutOfMemory", "message": error.message, "batch": error.batch}
    if isinstance(error, ComputeError | SplitlearnError):
        return {
            "type": _known(type(error)),
            "message": error.message,
            "reason": error.reason,
        }
    return {"type": "", "message": in_one_line(error)}


def raised_in(model_id: str, message: Message, *, loading: bool) -> Exception:
    """The error of a message, to be raised.

    Args:
        loading: what has no type of ours failed a load; else the model raised it on a request.
    """
    kind, text = str(message.get("type", "")), str(message.get("message", ""))
    reason = message.get("reason")
    if kind == "OutOfMemory":
        return OutOfMemory(text, int(message.get("batch", 1)))
    if kind in _COMPUTE:
        return _COMPUTE[kind](text, None if reason is None else str(reason))
    if kind in _MANAGER:
        return _MANAGER[kind](text, reason=None if reason is None else str(reason))
    if loading:
        return LoadError(f"model {model_id!r}: {text}")
    return ComputeFailed(f"model {model_id!r} raised {text}", "ModelRaised")


def _subclasses(of: type[T]) -> dict[str, type[T]]:
    found: dict[str, type[T]] = {of.__name__: of}
    for kind in of.__subclasses__():
        found |= _subclasses(kind)
    return found


# As they are when this is imported: those of the project.
_COMPUTE: dict[str, type[ComputeError]] = _subclasses(ComputeError)
_MANAGER: dict[str, type[SplitlearnError]] = _subclasses(SplitlearnError)


def _known(kind: type) -> str:
    """The name of the nearest of our own types: a subclass that a model's code has made is none."""
    ours = (k.__name__ for k in kind.__mro__ if k in (*_COMPUTE.values(), *_MANAGER.values()))
    return next(ours)
