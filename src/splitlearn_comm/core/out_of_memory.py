"""No memory for a forward pass: how that is known, and what it makes of the request.

That request alone fails, with how large its batch was; everything else on the server goes on.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from types import TracebackType

from splitlearn_comm.core.errors import OutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that there was no memory left, on any device."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On the processor and on Apple's GPUs torch raises a plain RuntimeError, known by its text only.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "backend out of memory" in text
    )


class telling_out_of_memory:  # noqa: N801 - used as a function
    """Runs a model's work, the block of a `with`, on an input of `shape`, whose first dimension is the batch.

    Raises:
        OutOfMemory: in place of whatever said that there was no memory. What the work had allocated so
            far is let go by then, though the error is still being handled.
    """

    __slots__ = ("_model_id", "_shape")

    def __init__(self, model_id: str, shape: Sequence[int]) -> None:
        self._model_id = model_id
        self._shape = shape

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            return
        # The frames of the work hold its tensors for as long as the error is known; their lines stay.
        traceback.clear_frames(trace)
        batch = self._shape[0] if self._shape else 1
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
        raise OutOfMemory(
            f"model {self._model_id!r} ran out of memory on a batch of {batch} "
            f"(shape {[*self._shape]}): {what}",
            batch,
        ) from error
