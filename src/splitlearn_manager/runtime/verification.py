"""What a version must show before it serves: batches of all sizes, finite answers, golden ones, likeness.

    golden inputs, or one like those of warm-up ─► the new version ─► finite? as golden? like the one before?

The judgement is of answers alone, so that it is the same wherever the model runs. It is made once for a
version; the answers are kept as long as the version serves, for the next one to be compared with.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from splitlearn_comm.core.compute_function import ComputeFunction, invoke, on_cpu
from splitlearn_comm.core.errors import ComputeFailed, OutOfMemory
from splitlearn_comm.core.raised import in_one_line
from splitlearn_manager.config.files import write_atomically
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.verify import Verify
from splitlearn_manager.errors import (
    AnswersDiffer,
    GoldenMismatch,
    InvalidGolden,
    NotFinite,
    WarmupFailed,
    WorkerDied,
)
from splitlearn_manager.runtime.verified import Answers, Verified

MOST_KEPT_VALUES = 1 << 22
"""Answers of more values than that are not kept for the next version to be compared with."""

Compute: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Golden:
    """Inputs, and the answers to them; as many of each.

    Attributes:
        inputs: CPU tensors of any shape and dtype.
        outputs: CPU tensors, of the model's dtype where they were recorded.
    """

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


def verify(
    config: ModelConfig,
    function: ComputeFunction,
    example: torch.Tensor | None,
    *,
    joins: bool,
    before: Answers | None,
    largest_rows: int | None = None,
) -> Verified:
    """Ask a model that has been loaded and warmed up, and judge its answers.

    Args:
        example: an input like those that it has answered in warm-up; None if there is none.
        joins: whether requests are joined: then batches of all sizes are tried.
        before: answers of the version that served last.
        largest_rows: the largest batch; the config's batch_size unless given.

    Raises:
        InvalidGolden: the golden file is none, or is unreadable.
        GoldenMismatch: an answer is not the golden one, or there is none.
        NotFinite: answers are not finite, and those of the version before were, or no value is finite.
        AnswersDiffer: from the version before by more than `verify.max_difference`.
        WarmupFailed: the model raised on a batch.
        WorkerDied: its worker process has ended.
    """
    rules = config.verify or Verify()
    model_id = config.model_id
    notes: list[str] = []
    inputs: tuple[torch.Tensor, ...] = () if example is None else (example,)
    golden: Golden | None = None
    if (path := config.golden_path) is not None:
        golden = read_golden(path)
        inputs = golden.inputs
    compute = _asking(function)
    if example is not None and joins and config.warmup:
        _try_batches(model_id, compute, example, largest_rows or config.batch_size)
    outputs = tuple(_answer(model_id, compute, x, at) for at, x in enumerate(inputs))
    if golden is not None:
        _check_golden(model_id, rules, outputs, golden.outputs)
        within = f"rtol {rules.rtol:g}, atol {rules.atol:g}"
        notes.append(f"answers all {len(outputs)} inputs of {rules.golden} as expected ({within})")
    if not outputs:
        return Verified(None, tuple(notes))
    answers = Answers(_digest(inputs), outputs, all(map(_is_finite, outputs)))
    _check_finite(model_id, answers, before, is_golden=golden is not None)
    if before is not None and before.asked == answers.asked:
        notes.append(_compared(model_id, rules, before.outputs, outputs))
    elif rules.max_difference is not None:
        why = "other inputs were asked" if before is not None else "none has served since the start"
        notes.append(f"not compared with a version before it: {why}")
    kept = answers if sum(o.numel() for o in outputs) <= MOST_KEPT_VALUES else None
    return Verified(kept, tuple(notes))


def record(function: ComputeFunction, inputs: Sequence[torch.Tensor]) -> Golden:
    """What a model answers to the inputs. Raises what the model raises."""
    compute = _asking(function)
    return Golden(tuple(inputs), tuple(compute(x) for x in inputs))


# The file.


def read_golden(path: Path) -> Golden:
    """The file's inputs and answers.

    Raises:
        InvalidGolden: there is no such file, or it is none; the message names it and says why.
    """
    tensors = _read(path)
    numbers = sorted({name.rpartition(".")[2] for name in tensors}, key=_as_number)
    if "input" in tensors and "output" in tensors and len(tensors) == 2:
        return Golden((tensors["input"],), (tensors["output"],))
    expected = {f"{kind}.{number}" for kind in ("input", "output") for number in numbers}
    if not tensors or expected != set(tensors):
        odd = sorted(set(tensors) ^ expected)
        raise InvalidGolden(
            f"{path}: expected tensors input.0, output.0, input.1, …, as many inputs as outputs; "
            + (f"{', '.join(odd[:4])} has no counterpart" if odd else "there are none")
        )
    return Golden(
        tuple(tensors[f"input.{n}"] for n in numbers),
        tuple(tensors[f"output.{n}"] for n in numbers),
    )


def read_inputs(path: Path) -> tuple[torch.Tensor, ...]:
    """The tensors of a file whose names do not begin with `output`, in the order of their names.

    Raises:
        InvalidGolden: there is no such file, or nothing in it.
    """
    tensors = _read(path)
    names = sorted((n for n in tensors if not n.startswith("output")), key=_natural)
    if not names:
        raise InvalidGolden(f"{path}: there are no inputs in it")
    return tuple(tensors[name] for name in names)


def write_golden(path: Path, golden: Golden) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    named = {f"input.{n}": t for n, t in enumerate(golden.inputs)}
    named |= {f"output.{n}": t for n, t in enumerate(golden.outputs)}
    if path.suffix == ".npz":
        file = BytesIO()
        np.savez(file, **{n: _for_numpy(t) for n, t in named.items()})  # type: ignore[arg-type]
        data = file.getvalue()
    else:
        # Not `save_file`, whose errors do not say what the system's do.
        from safetensors.torch import save

        data = save({n: t.contiguous() for n, t in named.items()})
    write_atomically(path, data)


def _for_numpy(tensor: torch.Tensor) -> np.ndarray:
    # numpy has no bfloat16.
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        from safetensors.torch import load_file

        return load_file(str(path))
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InvalidGolden(
            f"{path}: {what.strip().splitlines()[0] if what else 'unreadable'}"
        ) from error
    except Exception as error:
        # safetensors has an error of its own, which is a plain Exception's subclass.
        raise InvalidGolden(f"{path}: {error}") from error


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (1 << 62, text)


def _natural(name: str) -> tuple[str, int, str]:
    stem, _, number = name.rpartition(".")
    return (stem, *_as_number(number)) if stem else (name, 0, "")


# The judgement.


def _asking(function: ComputeFunction) -> Compute:
    def compute(x: torch.Tensor) -> torch.Tensor:
        # A copy each way: a model may write into its input, and give back memory that it goes on using.
        return on_cpu(invoke(function, x.clone()).output).clone()

    return compute


def _answer(model_id: str, compute: Compute, x: torch.Tensor, at: int) -> torch.Tensor:
    try:
        return compute(x)
    except Exception as error:
        _raise_if_died(model_id, error)
        raise GoldenMismatch(
            f"model {model_id!r}: it does not answer input {at}, of shape {list(x.shape)}: "
            f"{in_one_line(error)}"
        ) from error


def _try_batches(model_id: str, compute: Compute, example: torch.Tensor, most: int) -> None:
    """As many rows as batches may have: powers of two, and the most."""
    for rows in _sizes(most):
        batch = example[:1].expand(rows, *example.shape[1:])
        try:
            output = compute(batch)
        except OutOfMemory:
            # That is dealt with when it comes to it, by smaller batches.
            return
        except Exception as error:
            _raise_if_died(model_id, error)
            raise WarmupFailed(
                f"model {model_id!r} failed on a batch of {rows}: {in_one_line(error)}"
            ) from error
        if not output.dim() or output.shape[0] != rows:
            raise WarmupFailed(
                f"model {model_id!r} answered a batch of {rows} with a tensor of shape "
                f"{list(output.shape)}"
            )


def _sizes(most: int) -> Iterator[int]:
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _check_golden(
    model_id: str,
    rules: Verify,
    outputs: Sequence[torch.Tensor],
    golden: Sequence[torch.Tensor],
) -> None:
    for at, (output, expected) in enumerate(zip(outputs, golden, strict=True)):
        if output.shape != expected.shape:
            raise GoldenMismatch(
                f"model {model_id!r}: its answer to input {at} of {rules.golden} has shape "
                f"{list(output.shape)}; expected {list(expected.shape)}"
            )
        mine, theirs = output.double(), expected.double()
        close = torch.isclose(mine, theirs, rtol=rules.rtol, atol=rules.atol, equal_nan=True)
        if not bool(close.all()):
            off = (mine - theirs).abs().masked_fill(close, 0.0).nan_to_num(nan=float("inf"))
            worst = int(off.argmax())
            place = [int(i) for i in np.unravel_index(worst, tuple(off.shape))] if off.dim() else []
            raise GoldenMismatch(
                f"model {model_id!r}: {int((~close).sum())} of {close.numel()} values of its answer to "
                f"input {at} of {rules.golden} are not as expected, within rtol {rules.rtol:g} and atol "
                f"{rules.atol:g}; the worst, at {place}, is {mine.reshape(-1)[worst].item():.6g} "
                f"instead of {theirs.reshape(-1)[worst].item():.6g}"
            )


def _check_finite(
    model_id: str, answers: Answers, before: Answers | None, *, is_golden: bool
) -> None:
    if answers.finite or is_golden:
        return
    if not any(bool(output.isfinite().any()) for output in answers.outputs):
        raise NotFinite(f"model {model_id!r} answers with no value that is finite")
    if before is not None and before.finite:
        count = sum(int((~output.isfinite()).sum()) for output in answers.outputs)
        raise NotFinite(
            f"model {model_id!r} answers with {count} values that are not finite; the version before it "
            "did not"
        )


def _compared(
    model_id: str, rules: Verify, before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]
) -> str:
    limit = rules.max_difference
    worst = 0.0
    for at, (old, new) in enumerate(zip(before, now, strict=True)):
        if old.shape != new.shape:
            what = (
                f"the answer to input {at} has shape {list(new.shape)}, and had {list(old.shape)} in the "
                "version before"
            )
            if limit is not None:
                raise AnswersDiffer(f"model {model_id!r}: {what}")
            return what
        if old.numel():
            apart = (new.double() - old.double()).abs()
            same = (
                (new == old) | (new.isnan() & old.isnan())
                if new.is_floating_point()
                else new == old
            )
            apart = apart.masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
            worst = max(worst, float(apart.max()))
    what = f"answers differ from those of the version before by at most {worst:.3g}"
    if limit is not None and worst > limit:
        raise AnswersDiffer(f"model {model_id!r}: {what}; max_difference is {limit:g}")
    return what


def _is_finite(output: torch.Tensor) -> bool:
    return not output.is_floating_point() or bool(output.isfinite().all())


def _raise_if_died(model_id: str, error: Exception) -> None:
    if isinstance(error, ComputeFailed) and error.reason == "WorkerDied":
        raise WorkerDied(
            f"model {model_id!r}: its worker process died while it was verified: {error.message}"
        ) from error


def _digest(inputs: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for x in inputs:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
