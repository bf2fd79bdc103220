"""A version is judged by what it answers, before a request can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import (
    AnswersDiffer,
    GoldenMismatch,
    InvalidGolden,
    LoadError,
    NotFinite,
    TerminalLoadError,
    WarmupFailed,
)
from splitlearn_manager.runtime.verification import (
    Golden,
    read_golden,
    read_inputs,
    record,
    verify,
    write_golden,
)
from splitlearn_manager.runtime.verified import Verified

EXAMPLE = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))


def config(directory: Path | None = None, **keys: object) -> ModelConfig:
    made = ModelConfig.model_validate({"model_id": "m", "model_path": "m.pt", **keys})
    return made.with_base_dir(directory)


def linear(scale: float = 1.0) -> ModelComputeFunction:
    torch.manual_seed(0)
    module = nn.Linear(4, 3).eval()
    with torch.no_grad():
        module.weight.mul_(scale)
    return ModelComputeFunction(module)


def judged(
    function: ModelComputeFunction,
    asked: ModelConfig | None = None,
    *,
    before: Verified | None = None,
    joins: bool = True,
) -> Verified:
    answers = before.answers if before is not None else None
    return verify(asked or config(), function, EXAMPLE, joins=joins, before=answers)


class Calls(nn.Module):
    """Knows the rows of each call; answers as it is told."""

    def __init__(self, answer: nn.Module | None = None, fails_from: int = 1 << 30) -> None:
        super().__init__()
        self.answer = answer or nn.Identity()
        self.fails_from = fails_from
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        if x.shape[0] >= self.fails_from:
            raise ValueError("too many rows")
        result: torch.Tensor = self.answer(x)
        return result


def test_batches_of_all_sizes_are_tried() -> None:
    module = Calls()
    verify(config(batch_size=20), ModelComputeFunction(module), EXAMPLE, joins=True, before=None)
    assert module.rows == [1, 2, 4, 8, 16, 20, 1]


@pytest.mark.parametrize(("keys", "joins"), [({"warmup": False}, True), ({}, False)])
def test_batches_are_not_tried_where_there_will_be_none(
    keys: dict[str, object], joins: bool
) -> None:
    module = Calls()
    verify(config(**keys), ModelComputeFunction(module), EXAMPLE, joins=joins, before=None)
    assert module.rows == [1]


def test_a_model_that_fails_on_a_size_of_batch_does_not_serve() -> None:
    module = Calls(fails_from=8)
    with pytest.raises(WarmupFailed, match="failed on a batch of 8: ValueError: too many rows"):
        judged(ModelComputeFunction(module))


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True)


def test_a_model_that_answers_a_batch_with_another_number_of_rows_does_not_serve() -> None:
    with pytest.raises(WarmupFailed, match=r"a batch of 2 with a tensor of shape \[1, 4\]"):
        judged(ModelComputeFunction(Mean()))


class Spoiled(nn.Module):
    """Answers with so many NaN in each row."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, : x.shape[1] - self.count], torch.full_like(x, torch.nan)], 1)[:, :4]


def test_what_is_not_finite_does_not_follow_what_was() -> None:
    before = judged(ModelComputeFunction(nn.Identity()))
    with pytest.raises(NotFinite, match="1 values that are not finite; the version before"):
        judged(ModelComputeFunction(Spoiled(1)), before=before)
    assert judged(ModelComputeFunction(Spoiled(1))).answers is not None
    follows = judged(
        ModelComputeFunction(Spoiled(1)), before=judged(ModelComputeFunction(Spoiled(2)))
    )
    assert follows.answers is not None


def test_nothing_but_nan_never_serves() -> None:
    with pytest.raises(NotFinite, match="no value that is finite"):
        judged(ModelComputeFunction(Spoiled(4)))


def test_the_difference_to_the_version_before_is_told_and_limited_on_demand() -> None:
    before = judged(linear())
    told = judged(linear(1.5), before=before)
    assert "differ from those of the version before by at most 0." in told.notes[0]
    limited = config(verify={"max_difference": 1e-6})
    with pytest.raises(AnswersDiffer, match="max_difference is 1e-06"):
        judged(linear(1.5), limited, before=before)
    same = judged(linear(), limited, before=before)
    assert same.notes == ("answers differ from those of the version before by at most 0",)
    first = judged(linear(), limited)
    assert "not compared" in first.notes[0]
    with pytest.raises(AnswersDiffer, match=r"has shape \[1, 4\], and had \[1, 3\]"):
        judged(ModelComputeFunction(nn.Identity()), limited, before=before)
    assert "has shape" in judged(ModelComputeFunction(nn.Identity()), before=before).notes[0]


@pytest.mark.parametrize("name", ["g.safetensors", "g.npz"])
def test_golden_answers_are_demanded(tmp_path: Path, name: str) -> None:
    inputs = [torch.randn(rows, 4) for rows in (1, 3)]
    write_golden(tmp_path / name, record(linear(), inputs))
    asked = config(tmp_path, verify={"golden": name})
    assert (
        judged(linear(), asked).notes[0].startswith(f"answers all 2 inputs of {name} as expected")
    )
    with pytest.raises(
        GoldenMismatch, match=r"of its answer to input 0 of .* the worst, at \[0, \d\]"
    ):
        judged(linear(1.1), asked)
    loose = config(tmp_path, verify={"golden": name, "rtol": 0.0, "atol": 10.0})
    judged(linear(1.1), loose)
    with pytest.raises(GoldenMismatch, match=r"has shape \[1, 4\]; expected \[1, 3\]"):
        judged(ModelComputeFunction(nn.Identity()), asked)
    with pytest.raises(GoldenMismatch, match=r"does not answer input 0, of shape \[1, 4\]"):
        judged(ModelComputeFunction(nn.Linear(5, 3)), asked, joins=False)


@pytest.mark.parametrize("name", ["g.safetensors", "g.npz"])
def test_golden_answers_that_cannot_be_written_are_an_error_of_the_system(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(FileNotFoundError):
        write_golden(tmp_path / "missing" / name, record(linear(), [torch.randn(1, 4)]))
    assert list(tmp_path.iterdir()) == []


@given(
    off=st.floats(-1, 1, width=32),
    rtol=st.sampled_from([0.0, 1e-3, 0.1]),
    atol=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_golden_tolerance_is_as_documented(off: float, rtol: float, atol: float) -> None:
    """Found by: the tolerance relative to the answer instead of the golden value."""
    import tempfile

    expected = torch.tensor([[0.5, -2.0, 8.0]])
    answer = expected + off
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "g.npz"
        write_golden(path, Golden((torch.zeros(1, 3),), (expected,)))

        class Fixed(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return answer

        asked = config(Path(directory), verify={"golden": "g.npz", "rtol": rtol, "atol": atol})
        apart = (answer.double() - expected.double()).abs()
        within = bool((apart <= atol + rtol * expected.double().abs()).all())
        try:
            verify(asked, ModelComputeFunction(Fixed()), None, joins=False, before=None)
        except GoldenMismatch:
            assert not within
        else:
            assert within


def test_a_golden_nan_is_expected_to_be_nan(tmp_path: Path) -> None:
    inputs = [torch.randn(1, 4)]
    spoiled = ModelComputeFunction(Spoiled(4))
    write_golden(tmp_path / "g.npz", record(spoiled, inputs))
    asked = config(tmp_path, verify={"golden": "g.npz"})
    assert verify(asked, spoiled, None, joins=False, before=None).answers is not None
    with pytest.raises(GoldenMismatch):
        judged(ModelComputeFunction(nn.Identity()), asked)


def test_a_golden_file_that_is_none_is_named(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(InvalidGolden) as caught:
            read_golden(tmp_path / name)
        assert isinstance(caught.value, TerminalLoadError | LoadError)
        return caught.value.message

    assert "No such file" in refused("gone.npz")
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("text.npz", "text.safetensors"):
        assert refused(name).startswith(f"{tmp_path / name}: ")
    np.savez(tmp_path / "half.npz", **{"input.0": np.zeros(2), "input.1": np.zeros(2)})
    assert "as many inputs as outputs; output.0, output.1" in refused("half.npz")
    np.savez(tmp_path / "pickled.npz", input=np.array([object()]))
    assert "pickle" in refused("pickled.npz")
    np.savez(tmp_path / "empty.npz")
    assert "there are none" in refused("empty.npz")
    np.savez(tmp_path / "one.npz", input=np.zeros(2), output=np.ones(2))
    assert torch.equal(read_golden(tmp_path / "one.npz").outputs[0], torch.ones(2).double())


def test_inputs_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = {f"x.{n}": np.full(1, n) for n in (0, 2, 10, 1)}
    np.savez(tmp_path / "in.npz", **names, **{"output.0": np.zeros(1)})
    assert [int(x) for x in read_inputs(tmp_path / "in.npz")] == [0, 1, 2, 10]
    np.savez(tmp_path / "none.npz", **{"output.0": np.zeros(1)})
    with pytest.raises(InvalidGolden, match="there are no inputs"):
        read_inputs(tmp_path / "none.npz")


def test_bfloat16_answers_are_recorded(tmp_path: Path) -> None:
    function = ModelComputeFunction(nn.Linear(4, 2).bfloat16().eval())
    for name in ("g.npz", "g.safetensors"):
        write_golden(tmp_path / name, record(function, [torch.randn(2, 4)]))
        asked = config(tmp_path, verify={"golden": name})
        verify(asked, function, None, joins=False, before=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.npz", "g.safetensors"]
