"""Records what a model that serves answers, for later versions to be held against."""

from __future__ import annotations

from pathlib import Path

from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.config.verify import GOLDEN_SUFFIXES
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.errors import SplitlearnError


class CannotRecord(SplitlearnError):
    """There is nothing to ask the model, or nowhere to write its answers."""


def record_golden(
    manager: ModelManager, model_id: str, target: Path, inputs_from: Path | None
) -> dict[str, object]:
    """Ask the version that serves, and write the file; what was done, for people and programs.

    Args:
        target: the file, absolute; one that is there is replaced.
        inputs_from: a file with the inputs to ask; None for one like those of warm-up.

    Raises:
        ModelNotFound, ModelUnavailable: the model does not serve.
        InvalidGolden: there are no inputs in `inputs_from`.
        CannotRecord: nothing is known to ask it, it raised, or the file cannot be written.
    """
    # Imported where it is needed, because it brings torch.
    from splitlearn_manager.runtime.verification import read_inputs, record, write_golden

    if target.suffix not in GOLDEN_SUFFIXES:
        raise CannotRecord(f"{target}: its name should end in {' or '.join(GOLDEN_SUFFIXES)}")
    inputs = None if inputs_from is None else read_inputs(inputs_from)
    with manager.lease(model_id) as lease:
        lease.plain = False
        instance = lease.instance
        running = instance.running
        if running is None:
            raise CannotRecord(f"model {model_id!r} is being unloaded; try again")
        if inputs is None:
            example = running.example()
            if example is None:
                raise CannotRecord(
                    f"nothing is known of the inputs of {model_id!r}: give config.input_shape in its "
                    "file, or a file of inputs (--inputs)"
                )
            inputs = (example,)
        try:
            golden = record(running.compute_function, inputs)
        except Exception as error:
            raise CannotRecord(
                f"model {model_id!r} does not answer: {in_one_line(error)}"
            ) from error
        generation = instance.spec.generation
    try:
        write_golden(target, golden)
    except OSError as error:
        raise CannotRecord(f"{target}: {error.strerror or error}") from error
    count = len(inputs)
    answers = "1 answer" if count == 1 else f"{count} answers"
    return {
        "model_id": model_id,
        "file": str(target),
        "inputs": [list(x.shape) for x in golden.inputs],
        "generation": generation,
        "message": f"{answers} of {model_id} (generation {generation}) recorded in {target}",
    }
