"""`optimize: freeze`: what is folded, for which shapes it stands, and what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.loaders.adapters import CallOptions
from splitlearn_manager.core.loaders.text_adapter import CausalTextAdapter, TextAdapter
from splitlearn_manager.errors import CannotOptimize
from splitlearn_manager.runtime.optimize.examples import examples
from splitlearn_manager.runtime.optimize.frozen import Frozen
from support.models import model_config
from support.optimizable import SHAPES, built, convolution, mlp, operators, optimized, take


def frozen(module: nn.Module, shape: tuple[int, ...]) -> tuple[ModelComputeFunction, Frozen]:
    function, _ = optimized(module, "freeze", shape)
    assert isinstance(function._stand_in, Frozen)
    return function, function._stand_in


@pytest.fixture(autouse=True)
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it pays is for the clock to say, and none of these tests."""
    take(monkeypatch, "folded")


def test_batch_norms_go_into_the_convolutions_before_them() -> None:
    module = convolution()
    _, form = frozen(module, (-1, 3, 12, 12))
    assert sum("conv2d" in name for name in operators(form)) == 2
    assert not any("norm" in name for name in operators(form))
    folded_mb = (6 * 3 * 9 + 6 + 6 * 3 * 9 + 6) * 4 / 2**20
    assert len(form._programs) == 2
    assert form.extra_mb == pytest.approx(folded_mb)  # once for all batches


def test_a_batch_norm_without_a_convolution_stays() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).eval()
    _, form = frozen(module, (-1, 3, 8, 8))
    assert any("batch_norm" in name for name in operators(form))


class Twice(nn.Module):
    """Uses what the convolution gives beside its norm, which so cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.convolution(x)
        answer: torch.Tensor = self.norm(seen) + seen
        return answer


def test_a_convolution_that_others_read_keeps_its_weights() -> None:
    _function, form = frozen(Twice().eval(), (-1, 3, 8, 8))
    assert any("batch_norm" in name for name in operators(form))
    assert form.extra_mb == 0.0


class Scaled(nn.Module):
    """Of its weights alone it computes a square, and the transpose of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight**2) @ self.weight.t()


def test_what_depends_on_weights_alone_is_computed_once() -> None:
    _function, form = frozen(Scaled().eval(), (-1, 8))
    assert not any("pow" in name for name in operators(form))
    assert form.extra_mb == 8 * 8 * 4 / 2**20  # and views of weights take nothing


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_weights_that_are_not_folded_are_the_plain_modules(kind: str) -> None:
    module = built(kind)
    _, form = frozen(module, SHAPES[kind])
    own = {id(p) for p in module.parameters()}
    assert any(id(w) in own for w in form._programs[0].weights)


def test_weights_moved_afterwards_are_read_where_they_are() -> None:
    """As a worker process moves them, to share them with others."""
    module = mlp()
    _function, form = frozen(module, SHAPES["mlp"])
    for parameter in module.parameters():
        parameter.data = parameter.data * 2
    x = torch.rand(3, 8)
    assert torch.equal(form(x), module(x))


class Stepping(nn.Module):
    """Writes to a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1  # type: ignore[operator]
        answer: torch.Tensor = self.inner(x)
        return answer


def test_a_model_that_writes_to_its_buffers_is_refused() -> None:
    with pytest.raises(CannotOptimize) as caught:
        optimized(Stepping(), "freeze", SHAPES["mlp"])
    assert caught.value.reason == "FreezeFailed"


@pytest.mark.parametrize("how", ["freeze", "compile"])
def test_torchscript_is_refused_as_that(how: str) -> None:
    with pytest.raises(CannotOptimize, match="it is TorchScript, or has a part that is"):
        optimized(torch.jit.script(mlp()), how, SHAPES["mlp"])


class BySize(nn.Module):
    """Another answer for each of several sizes: what a trace would take from its example alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.inner(x)
        if x.shape[0] == 1:
            return answer * 2
        if x.shape[0] > 5:
            return answer * 3
        return answer * x.shape[0]


def test_sizes_that_the_program_does_not_stand_for_are_the_plain_modules() -> None:
    module = BySize().eval()
    function, _ = frozen(module, SHAPES["mlp"])
    for batch in (0, 1, 2, 3, 4, 5, 6, 8, 40):
        x = torch.rand(batch, 8)
        assert torch.equal(function.compute(x), module(x)), batch  # type: ignore[arg-type]


def test_inputs_that_are_not_contiguous_are_answered() -> None:
    module = mlp()
    function, _ = frozen(module, SHAPES["mlp"])
    x = torch.rand(8, 3).t()
    assert torch.equal(function.compute(x), module(x))  # type: ignore[arg-type]


def test_what_the_plain_model_refuses_is_refused_in_its_words() -> None:
    function, _ = frozen(mlp(), (-1, 8))
    function._rule = type(function._rule)(torch.float32)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function.compute(torch.rand(2, 9))


@pytest.mark.parametrize("causal", [False, True])
def test_text_models_answer_alike_with_padding_on_either_side(causal: bool) -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if causal:
        gpt2 = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=32)
        adapter = CausalTextAdapter(
            GPT2LMHeadModel(gpt2).eval(), CallOptions(None, 32, {}), pad_token_id=0, vocab_size=30
        )
    else:
        bert = BertConfig(
            num_hidden_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=30,
            max_position_embeddings=32,
        )
        adapter = TextAdapter(  # type: ignore[assignment]
            BertModel(bert).eval(), CallOptions(None, 32, {}), pad_token_id=0, vocab_size=30
        )
    adapter.eval()
    function, form = frozen(adapter, (-1, -1))
    assert [program._shape[0] for program in form._programs] == [8, 1]
    ids = torch.randint(1, 30, (3, 9)).float()
    ids[0, 5:] = 0
    ids[1, :3] = 0
    for x in (ids, ids[:1], ids[2:], ids[:, 1:]):
        function.stand_in(form)
        answer = function.compute(x)
        function.stand_in(None)
        assert torch.allclose(answer, function.compute(x), atol=1e-5)  # type: ignore[arg-type]


def test_values_that_the_model_refuses_do_not_change_what_answers_others_of_their_shape() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8)).eval()
    function = ModelComputeFunction(module, input_shape=(-1, -1), input_dtype=torch.int64)
    config = model_config("m.pt", batch_size=8, config={"input_shape": [-1, -1]})
    form = Frozen(function, 1e-3)
    form.prepare(function, examples(function, config, (1, 8), 1.0))
    wrong, right = torch.full((2, 5), 99), torch.full((2, 5), 3)
    with pytest.raises(IndexError):
        form(wrong)
    assert torch.allclose(form(right), module(right), atol=1e-6)
    assert form._by_shape[2, 5] is form._programs[0].folded


def test_a_new_shape_costs_one_forward() -> None:
    module = mlp()
    _function, form = frozen(module, SHAPES["mlp"])
    calls: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return linear(x, *rest)

    for program in form._programs:
        for node in program.folded.graph.nodes:
            if node.target is linear:
                node.target = counted
        program.folded.recompile()
    form(torch.rand(5, 8))
    assert calls == [(5, 8), (5, 16)]
