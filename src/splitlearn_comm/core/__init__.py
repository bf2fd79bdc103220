"""What user code subclasses and what turns tensors into bytes; knows no gRPC.

errors            why a request gets no answer
codec, packed     tensors ↔ bytes
compression       smaller bytes
shared_memory     bytes beside the call, on one machine
compute_function  the base class of what a server runs
model_function    an nn.Module as a compute function
model_input, training, locks   its parts: what it takes, kept graphs and steps, the weights' lock
out_of_memory     a forward pass for which there was no memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_comm._exports import lazy_exports

if TYPE_CHECKING:
    from splitlearn_comm.core.codec import CompressedTensorCodec, Int8Codec, TensorCodec
    from splitlearn_comm.core.compression import Zlib, Zstd
    from splitlearn_comm.core.compute_function import Computed, ComputeFunction, KeyValues, invoke
    from splitlearn_comm.core.errors import (
        ComputeError,
        ComputeFailed,
        DeadlinePassed,
        InvalidRequest,
        NotReady,
        OutOfMemory,
        Overloaded,
        ServerStartError,
        SplitlearnCommError,
        UnknownTarget,
        Unsupported,
    )
    from splitlearn_comm.core.model_function import ModelComputeFunction
    from splitlearn_comm.core.model_input import InputRule, input_rule

__all__ = [
    "CompressedTensorCodec",
    "ComputeError",
    "ComputeFailed",
    "ComputeFunction",
    "Computed",
    "DeadlinePassed",
    "InputRule",
    "Int8Codec",
    "InvalidRequest",
    "KeyValues",
    "ModelComputeFunction",
    "NotReady",
    "OutOfMemory",
    "Overloaded",
    "ServerStartError",
    "SplitlearnCommError",
    "TensorCodec",
    "UnknownTarget",
    "Unsupported",
    "Zlib",
    "Zstd",
    "input_rule",
    "invoke",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        name: f"{__name__}.{module}"
        for module, names in {
            "codec": ("CompressedTensorCodec", "Int8Codec", "TensorCodec"),
            "compression": ("Zlib", "Zstd"),
            "compute_function": ("ComputeFunction", "Computed", "KeyValues", "invoke"),
            "errors": (
                "ComputeError",
                "ComputeFailed",
                "DeadlinePassed",
                "InvalidRequest",
                "NotReady",
                "OutOfMemory",
                "Overloaded",
                "ServerStartError",
                "SplitlearnCommError",
                "UnknownTarget",
                "Unsupported",
            ),
            "model_function": ("ModelComputeFunction",),
            "model_input": ("InputRule", "input_rule"),
        }.items()
        for name in names
    },
)
