"""Every refusal of the manager is one of these types, with a stable reason and a message for people.

    SplitlearnError
    ├── ConfigError            InvalidConfig        a file or a value that does not validate
    ├── LoadError              LoadFailed           the load failed; trying again may help
    │   ├── WeightsNotFound                         nothing is at model_path (yet)
    │   ├── WeightsChanged                          the files changed while they were read
    │   ├── LoadTimeout                             load_timeout_s passed
    │   ├── WarmupFailed                            the model raised when it was tried
    │   ├── RolloutSuperseded                       another version is wanted by now, or none
    │   ├── WorkerDied                              the process that it was to run in, or ran in, has ended
    │   └── TerminalLoadError                       only a change of the file or the weights helps
    │       ├── InvalidModel                        the files are no model this loader can read
    │       ├── UntrustedCheckpoint                 loading would run code from the file
    │       ├── OverMemoryLimit                     larger than its own max_memory_mb
    │       ├── InvalidGolden                       the file of `verify.golden` is none
    │       ├── GoldenMismatch                      it does not answer as that file says
    │       ├── NotFinite                           it answers with infinities or NaN
    │       ├── AnswersDiffer                       from the version before, by more than max_difference
    │       ├── RolloutFailed                       it did worse than the old version when it was tried
    │       ├── RolloutAborted                      somebody took it back
    │       ├── CannotOptimize                      not this model, or not on this machine
    │       └── OptimizedAnswersDiffer              by more than its own optimize_tolerance
    ├── AdmissionError                              no room on this node at the moment
    │   ├── InsufficientMemory                  the budget has too little left
    │   ├── MemoryPressure                      the budget has, but others use the memory
    │   └── MaxModels
    ├── ModelNotFound                               no model of that id
    ├── ModelUnavailable                            it exists, and cannot serve at the moment
    ├── OperationInProgress                         another operation on that model has not ended
    └── ServerError            ServerFailed         the node itself cannot start (a port, a directory)

`reason` is CamelCase and stable: conditions, events, metrics and gRPC statuses carry it.
A terminal failure is a type, not a flag: `isinstance(error, TerminalLoadError)`.
"""

from __future__ import annotations

from typing import ClassVar


class SplitlearnError(Exception):
    """Base of all errors raised by the manager.

    Args:
        message: one or two sentences for a person: what is wrong, where, and what would help. What is
            not Unicode in it (of a path, most likely) is escaped, so that it can be sent and kept anywhere.
        reason: overrides the class's reason where one class stands for several.
    """

    default_reason: ClassVar[str] = ""

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        if not message.isascii():
            message = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(message)
        self.message = message
        # A class's own word for itself, not one that it inherits: a subclass is another reason.
        self.reason = reason or type(self).__dict__.get("default_reason") or type(self).__name__


class ConfigError(SplitlearnError):
    """A configuration that does not validate; `problems` holds one line for each mistake."""

    default_reason = "InvalidConfig"

    def __init__(self, message: str, *, problems: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class LoadError(SplitlearnError):
    """A load failed in a way that a later try may not."""

    default_reason = "LoadFailed"


class WeightsNotFound(LoadError):
    """Nothing is at `model_path`."""


class WeightsChanged(LoadError):
    """The files behind `model_path` changed while they were being read."""


class LoadTimeout(LoadError):
    """The load took longer than `load_timeout_s`."""


class WarmupFailed(LoadError):
    """The model raised, or gave no tensor, when it was run before serving."""


class WorkerDied(LoadError):
    """The worker process of the model has ended, while it loaded or while it served."""


class TerminalLoadError(LoadError):
    """A load that fails the same way until the file or the weights change."""


class InvalidModel(TerminalLoadError):
    """The files behind `model_path` are not a model that the loader can read."""


class UntrustedCheckpoint(TerminalLoadError):
    """Loading the checkpoint would run code that it carries."""


class OverMemoryLimit(TerminalLoadError):
    """The model needs more than its own `max_memory_mb`."""


class CannotOptimize(TerminalLoadError):
    """What `optimize` asks for cannot be done with this model, or not on this machine."""


class OptimizedAnswersDiffer(TerminalLoadError):
    """The optimized model's answers differ from the plain one's by more than `optimize_tolerance`."""


class InvalidGolden(TerminalLoadError):
    """The file of `verify.golden` cannot be read, or has not the tensors that it should have."""


class GoldenMismatch(TerminalLoadError):
    """The model does not answer as the file of `verify.golden` says."""


class NotFinite(TerminalLoadError):
    """The model answers with values that are not finite, and the version before it did not."""


class AnswersDiffer(TerminalLoadError):
    """The model's answers differ from the version before by more than `verify.max_difference`."""


class RolloutFailed(TerminalLoadError):
    """The version did worse than the old one when it was tried beside it."""


class RolloutAborted(TerminalLoadError):
    """Somebody took the version back while it was tried beside the old one."""


class RolloutSuperseded(LoadError):
    """The version was taken back because another one is wanted, or none."""


class AdmissionError(SplitlearnError):
    """There is no room for the model at the moment."""


class InsufficientMemory(AdmissionError):
    """The device's budget has too little left, and nothing may be evicted for it."""


class MemoryPressure(AdmissionError):
    """The device has less than its budget, because others use its memory."""


class MaxModels(AdmissionError):
    """`max_models` instances are resident, and none may be evicted for this one."""


class ModelNotFound(SplitlearnError):
    """No model or endpoint of that name."""


class ModelUnavailable(SplitlearnError):
    """The model exists and cannot serve at the moment (loading, draining, failed)."""


class OperationInProgress(SplitlearnError):
    """Another operation on the same model has not ended."""


class ServerError(SplitlearnError):
    """The node cannot start."""

    default_reason = "ServerFailed"
