"""`Verify`: the `verify:` map of a model's file, what a new version must show before it serves."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from splitlearn_manager.config.fields import Share, Text
from splitlearn_manager.config.mistakes import expectation

GOLDEN_SUFFIXES = (".safetensors", ".npz")


def _check_golden(value: str) -> str:
    if not value.endswith(GOLDEN_SUFFIXES):
        raise expectation(f"a file whose name ends in {' or '.join(GOLDEN_SUFFIXES)}")
    return value


class Verify(BaseModel):
    """Checked after warm-up, with each version once; one that fails is never asked by a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    golden: Annotated[Text, AfterValidator(_check_golden)] | None = None
    """A .safetensors or .npz file with inputs and the answers to them, relative to this file: tensors
    `input.0`, `output.0`, `input.1`, …; `reconcile golden ID` records one."""
    rtol: Share = 1e-3
    """How far an answer may be from the golden one, relative to it: for each value
    |answer - golden| ≤ atol + rtol × |golden|."""
    atol: Share = 1e-4
    """The same, whatever the value."""
    max_difference: Share | None = None
    """How far any value of an answer may be from the answer of the version before to the same input.
    null: it is told, and not limited."""
