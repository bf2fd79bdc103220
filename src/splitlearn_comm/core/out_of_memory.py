"""No memory for a forward pass: how that is known, and what it makes of the request.

That request alone fails, with how large its batch was; everything else on the server goes on.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def telling_out_of_memory(model_id: str, shape: Sequence[int]) -> Iterator[None]:
    """Runs a model's work on an input of `shape`, whose first dimension is the batch.

    Raises:
        OutOfMemory: in place of whatever said that there was no memory. What the work had allocated so
            far is let go by then, though the error is still being handled.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        # The frames of the work hold its tensors for as long as the error is known; their lines stay.
        traceback.clear_frames(error.__traceback__)
        batch = shape[0] if shape else 1
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
        raise OutOfMemory(
            f"model {model_id!r} ran out of memory on a batch of {batch} "
            f"(shape {[*shape]}): {what}",
            batch,
        ) from error
