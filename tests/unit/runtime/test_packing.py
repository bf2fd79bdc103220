"""Layers that run in oneDNN on packed weights: the same answers, and which layers they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.runtime.optimize import frozen as frozen_module
from splitlearn_manager.runtime.optimize.folding import fold
from splitlearn_manager.runtime.optimize.frozen import Frozen
from splitlearn_manager.runtime.optimize.packing import FEWEST_WEIGHTS, Packed, can_pack
from support.optimizable import operators, optimized, take

pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")

WIDE = 128


def packed(module: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The module for inputs of that shape, with oneDNN called wherever it can be."""
    with torch.no_grad():
        exported = torch.export.export(module.eval(), (x,), strict=False)
        return fold(exported.module(), Packed())


def names(form: object) -> list[str]:
    graph = form.graph  # type: ignore[attr-defined]
    return [
        getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"
    ]


def same(module: nn.Module, x: torch.Tensor) -> list[str]:
    """The operators of the packed form, after its answer was found to be the module's."""
    form = packed(module, x)
    assert form is not None
    with torch.inference_mode():
        answer, expected = form(x), module(x)
    # Small values may be sums of large ones, so that the largest says how exact they can be.
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(answer, expected, atol=max(1e-5, 2e-6 * largest), rtol=1e-5)
    return names(form)


ACTIVATIONS = st.sampled_from(
    [nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU(approximate="tanh")]
)


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], len(self.bias))


@settings(deadline=None)
@given(
    inputs=st.integers(WIDE, 200),
    outputs=st.integers(WIDE, 200),
    leading=st.lists(st.integers(1, 12), min_size=1, max_size=2).map(lambda rows: [*rows, 9]),
    bias=st.booleans(),
    spelled=st.booleans(),
    activation=ACTIVATIONS,
    seed=st.integers(0, 9),
)
def test_linear_layers_answer_alike(
    inputs: int,
    outputs: int,
    leading: list[int],
    bias: bool,
    spelled: bool,
    activation: nn.Module,
    seed: int,
) -> None:
    """Seen to fail with an activation taken out although the layer was not told of it."""
    torch.manual_seed(seed)
    layer = Conv1D(inputs, outputs) if spelled else nn.Linear(inputs, outputs, bias=bias)
    found = same(nn.Sequential(layer, activation), torch.randn(*leading, inputs))
    assert "linear" in found
    assert not {"relu", "relu_", "gelu"} & set(found)


@settings(deadline=None)
@given(
    channels=st.sampled_from([(3, 8, 1), (8, 8, 2), (8, 16, 8), (16, 4, 1)]),
    batch=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    activation=ACTIVATIONS,
    seed=st.integers(0, 9),
)
def test_convolutions_answer_alike(
    channels: tuple[int, int, int],
    batch: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    bias: bool,
    activation: nn.Module,
    seed: int,
) -> None:
    """Seen to fail with stride and dilation exchanged."""
    torch.manual_seed(seed)
    inputs, outputs, groups = channels
    first = nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
    )
    second = nn.Conv2d(outputs, 5, 1)
    found = same(nn.Sequential(first, activation, second), torch.randn(batch, inputs, 9, 10))
    assert found.count("convolution") == 2
    assert not {"relu", "relu_"} & set(found)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh")], ids=repr
)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_is_no_number_stays_so(kind: str, activation: nn.Module) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(WIDE, WIDE) if kind == "linear" else nn.Conv2d(8, 8, 3)
    x = torch.randn(*((100, WIDE) if kind == "linear" else (4, 8, 9, 9)))
    module = nn.Sequential(layer, activation)
    form = packed(module, x)
    assert form is not None
    x[1] = float("nan")
    with torch.inference_mode():
        answer, expected = form(x), module(x)
    assert expected[1].isnan().all()
    assert torch.equal(answer.isnan(), expected.isnan())


class Block(nn.Module):
    """Of a ResNet: what the first layer gives is read twice, and written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(self.first(x))
        out = self.second(self.relu(seen))
        out += seen
        answer: torch.Tensor = self.relu(out)
        return answer.flatten(1)


def test_a_block_that_writes_in_place_answers_alike() -> None:
    assert same(Block(), torch.randn(2, 4, 6, 6)).count("convolution") == 2


class Read(nn.Module):
    """What the layer gives is read beside its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDE, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.wide(x)
        return torch.relu(seen) + seen


def test_an_activation_beside_another_reader_stays() -> None:
    assert "relu" in same(Read(), torch.randn(20, WIDE))


class Patches(nn.Module):
    """As a vision transformer takes its image apart: a view that only the plain order allows."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.wide = nn.Linear(8, 2 * FEWEST_WEIGHTS // 8)
        self.writes = writes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.patches(x)
        rows = seen.view(len(x), 8, -1)
        if self.writes:
            rows.mul_(2)
        answer: torch.Tensor = self.wide(rows.transpose(1, 2) + seen.flatten(2).transpose(1, 2))
        return answer


@pytest.mark.parametrize("writes", [False, True])
def test_views_of_what_a_convolution_gives_answer_alike(writes: bool) -> None:
    found = same(Patches(writes), torch.randn(2, 3, 16, 16))
    assert ("convolution" in found) is not writes
    assert "linear" in found


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(WIDE, WIDE).double(),
        nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8)),
    ],
    ids=["small", "double", "none"],
)
def test_a_model_without_such_layers_has_no_packed_form(module: nn.Module) -> None:
    first = next(module.parameters())
    ids = isinstance(module, nn.Sequential) and isinstance(module[0], nn.Embedding)
    x = torch.ones(2, first.shape[1])
    assert packed(module, x.long() if ids else x.to(first.dtype)) is None


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 256), nn.ReLU(), nn.Linear(256, WIDE)).eval()


SHAPE = (-1, 50, WIDE)
WIDE_MB = 2 * WIDE * 256 * 4 / 2**20


def form_of(function: ModelComputeFunction) -> Frozen:
    assert isinstance(function._stand_in, Frozen)
    return function._stand_in


def test_the_faster_form_is_kept_and_packed_weights_are_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(monkeypatch, "packed")
    function, told = optimized(wide(), "freeze", SHAPE)
    form = form_of(function)
    assert len(form._programs) == 2
    assert "linear" in operators(form)
    assert form.extra_mb == pytest.approx(WIDE_MB)  # once for all batches
    assert f"takes {WIDE_MB:,.1f} MB beside the plain weights" in told.notes[0]
    for batch in (1, 2, 30):
        x = torch.rand(batch, 50, WIDE)
        assert torch.allclose(function.compute(x), function.model(x), atol=1e-5)


def test_a_packed_form_that_is_not_faster_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "folded")
    function, _ = optimized(wide(), "freeze", SHAPE)
    assert form_of(function).extra_mb == 0.0


def test_a_packed_form_beyond_the_tolerance_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "packed")
    function, told = optimized(wide(), "freeze", SHAPE, optimize_tolerance=0)
    assert form_of(function).extra_mb == 0.0
    assert "largest difference 0.0e+00" in told.notes[0]


def test_a_packed_form_that_raises_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    take(monkeypatch, "packed")
    monkeypatch.setattr("splitlearn_manager.runtime.optimize.packing.linear", broken)
    function, _ = optimized(wide(), "freeze", SHAPE)
    assert form_of(function).extra_mb == 0.0
    x = torch.rand(3, 50, WIDE)
    assert torch.allclose(function.compute(x), function.model(x), atol=1e-5)


def test_weights_that_onednn_does_not_take_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> torch.Tensor:
        raise RuntimeError("could not create a memory object")

    take(monkeypatch, "packed")
    monkeypatch.setattr(Packed, "linear", refused)
    function, _ = optimized(wide(), "freeze", SHAPE)
    assert form_of(function).extra_mb == 0.0


def test_where_torch_has_no_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "packed")
    monkeypatch.setattr(frozen_module, "can_pack", lambda: False)
    function, _ = optimized(wide(), "freeze", SHAPE)
    assert form_of(function).extra_mb == 0.0


def test_images_and_answers_in_other_orders_answer_alike() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    form = packed(module, x)
    assert form is not None
    with torch.inference_mode():
        other = x.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(form(other), module(x), atol=1e-5)
        rows = nn.Linear(WIDE, WIDE)
        turned = torch.randn(WIDE, 30).t()
        flat = packed(rows, turned)
        assert flat is not None
        assert torch.allclose(
            flat(turned), functional.linear(turned, rows.weight, rows.bias), atol=1e-5
        )
