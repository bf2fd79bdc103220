"""Sequences of different lengths are answered in one row as they are alone, or they are not joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn_comm.core import InvalidRequest, TensorCodec
from splitlearn_comm.core.packed import Output, Packed
from splitlearn_manager.core.loaders.text_adapter import token_mask
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.runtime.base import ComputesSequences, Joining, RunningModel
from splitlearn_manager.runtime.process import ProcessRuntime
from splitlearn_manager.runtime.sequences import LONGEST, MOST_TOGETHER
from splitlearn_manager.runtime.thread import RunningInThreads, ThreadRuntime
from support.inferences import begun
from support.models import (
    model_config,
    save_mlp,
    tiny_bert,
    tiny_gpt2,
    tiny_mistral,
    tiny_roberta,
    tiny_t5_encoder,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS: dict[str, Callable[[Path], object]] = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "gpt2": tiny_gpt2,
    "t5": tiny_t5_encoder,
}


PADDING = {"roberta": 1}


def saved(save: Callable[[Path], object], directory: Path) -> Path:
    save(directory)
    return directory


def start(path: object, *, optimize: str = "none", **options: object) -> RunningInThreads:
    config = model_config(path, config=options, optimize=optimize)
    return ThreadRuntime(ModelLoader()).start(config, "cpu")


def packed(tensors: Sequence[torch.Tensor]) -> list[Packed]:
    return [TensorCodec(t.dtype).unpack(*TensorCodec(t.dtype).encode(t)) for t in tensors]


def in_one_row(running: RunningModel, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    function = running.compute_function
    parts = packed(tensors)
    if isinstance(function, ComputesSequences):
        return [rows.tensor() for rows in function.compute_sequences(parts)]
    output = begun(function, parts).finish()
    if isinstance(output, Output):  # all have one length
        return list(output.tensor().split([part.rows for part in parts]))
    return [rows.tensor() for rows in output]


def alone(running: RunningModel, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [running.compute_function.compute(t.clone()) for t in tensors]  # type: ignore[misc]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningInThreads]]:
    made = {
        name: start(saved(save, tmp_path_factory.mktemp(name.replace(" ", "_"))), **options)
        for name, save, options in (
            *((name, save, {}) for name, save in KINDS.items()),
            ("pooled", tiny_bert, {"output": "mean_pooled"}),
            ("pooled roberta", tiny_roberta, {"output": "mean_pooled"}),
        )
    }
    yield made
    for running in made.values():
        running.close()


# Ids of 0 and 1 are the padding of one model or another, at the ends of a row and in its middle.
inputs = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(
        lambda shape: st.lists(
            st.lists(st.integers(0, 6), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    ),
    min_size=1,
    max_size=6,
)


@given(kind=st.sampled_from((*KINDS, "pooled", "pooled roberta")), ids=inputs)
@settings(max_examples=120, deadline=None)
def test_sequences_in_one_row_are_answered_as_alone(
    models: dict[str, RunningInThreads], kind: str, ids: list[list[list[int]]]
) -> None:
    """Seen to fail with positions that go on from row to row, with rows that see the one before, with the
    padding of a row counted in its mean, and with answers given out in reverse order."""
    running = models[kind]
    tensors = [torch.tensor(rows).float() for rows in ids]
    pairs = zip(tensors, in_one_row(running, tensors), alone(running, tensors), strict=True)
    for tensor, got, expected in pairs:
        # What a model says of padding means nothing.
        counts = slice(None) if "pooled" in kind else token_mask(tensor, PADDING.get(kind, 0))
        assert got.shape == expected.shape
        torch.testing.assert_close(got[counts], expected[counts], **CLOSE)


@pytest.mark.parametrize("name", [*KINDS, "pooled", "pooled roberta"])
def test_text_models_are_found_to_answer_them(
    models: dict[str, RunningInThreads], name: str
) -> None:
    found = models[name].find_joining()
    assert found.joins
    assert found.lengths, found.note
    assert f"of up to {LONGEST} tokens" in found.note
    assert f"no more than {MOST_TOGETHER}" in found.note


@pytest.mark.parametrize(
    ("save", "options"),
    [
        pytest.param(tiny_mistral, {}, id="looks only so far back"),
        pytest.param(tiny_bert, {"output": "pooler_output"}, id="one answer for a row"),
    ],
)
def test_models_that_answer_otherwise_in_one_row_are_found(
    tmp_path: Path, save: Callable[[Path], object], options: dict[str, object]
) -> None:
    running = start(saved(save, tmp_path), **options)
    found = running.find_joining()
    assert found.joins
    assert not found.lengths
    assert "; those of other lengths are not: " in found.note
    running.join(found)
    assert (running.joins, running.joins_lengths) == (True, False)
    running.close()


def modernbert_with_a_large_value(directory: Path) -> None:
    """Its tokens see 64 on each side; one of its values is far larger than the others, as in many models."""
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ModernBertConfig(
        **sizes,
        intermediate_size=64,
        pad_token_id=0,
        local_attention=128,
        global_attn_every_n_layers=2,
    )
    model = ModernBertModel(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 1.0 if "embeddings" in name else weight.shape[1] ** -0.5
                scale *= 1.6 if "Wqkv" in name else 1.0
                weight.copy_(torch.randn(weight.shape, generator=draw) * scale)
        model.get_parameter("final_norm.weight")[3] *= 40
    model.bfloat16().save_pretrained(directory)  # type: ignore[operator]


def test_a_value_that_is_far_larger_than_the_others_hides_no_difference(tmp_path: Path) -> None:
    """Measured by it alone, the answers to texts of 128 tokens passed for equal."""
    modernbert_with_a_large_value(tmp_path)
    running = start(tmp_path, output="mean_pooled")
    found = running.find_joining()
    assert found.joins
    assert not found.lengths
    running.close()


def test_padding_before_a_text_sees_no_other_text(models: dict[str, RunningInThreads]) -> None:
    """What a model says of padding means nothing; it must not tell what others have asked, either."""
    padded = torch.tensor([[0.0, 0.0, 5.0, 6.0]])
    told = [
        in_one_row(models["gpt2"], [padded, torch.full((1, 9), other)])[0] for other in (7.0, 8.0)
    ]
    assert torch.equal(*told)


def test_what_is_optimized_takes_one_length_at_a_time(tmp_path: Path) -> None:
    running = start(saved(tiny_bert, tmp_path), optimize="freeze")
    found = running.find_joining()
    frozen = running.compute_function.has_stand_in  # type: ignore[attr-defined]
    assert found.lengths is not frozen
    assert ("what it is optimized to takes one length at a time" in found.note) is frozen
    running.close()


def test_other_models_say_nothing_of_lengths(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_mlp(path)
    running = start(path, input_shape=[1, 8])
    assert running.find_joining() == Joining(
        True, "requests of equal shape are joined into batches"
    )
    running.close()


def test_a_sequence_that_is_too_long_and_ids_that_are_none_are_refused(tmp_path: Path) -> None:
    running = start(saved(tiny_bert, tmp_path), max_sequence_length=4)
    short = torch.ones(1, 2)
    with pytest.raises(InvalidRequest, match="the sequence has 5 positions"):
        in_one_row(running, [short, torch.ones(1, 5)])
    with pytest.raises(InvalidRequest, match="ids"):
        in_one_row(running, [short, torch.full((1, 3), 1e6)])
    with pytest.raises(InvalidRequest, match="fraction"):
        in_one_row(running, [short, torch.full((1, 3), 0.5)])
    running.close()


def test_means_of_large_values_in_float16_are_finite(tmp_path: Path) -> None:
    """Of a text with padding, of one without, and of both in one row."""
    model = tiny_bert(tmp_path, max_position_embeddings=64)
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.output.LayerNorm.bias")[0] = 2000
    model.half().save_pretrained(tmp_path)  # type: ignore[operator]
    running = start(tmp_path, output="mean_pooled")
    padded = torch.cat([torch.randint(1, 60, (1, 60)), torch.zeros(1, 4)], 1)
    tensors = [padded, torch.randint(1, 60, (1, 64)).float()]
    for answer in (*in_one_row(running, tensors), *alone(running, tensors)):
        assert answer.isfinite().all()
        assert answer[0, 0] == pytest.approx(2000, rel=1e-2)
    running.close()


def test_a_worker_process_answers_them_as_a_thread_does(tmp_path: Path) -> None:
    directory = saved(tiny_bert, tmp_path)
    config = model_config(directory, runtime="process")
    here, there = start(directory), ProcessRuntime().start(config, "cpu")
    try:
        assert there.find_joining() == here.find_joining()
        there.join(there.find_joining())
        assert there.joins_lengths
        tensors = [torch.randint(1, 20, shape).float() for shape in ((1, 9), (2, 3), (1, 1))]
        for got, expected in zip(
            in_one_row(there, tensors), in_one_row(here, tensors), strict=True
        ):
            assert torch.equal(got, expected)
        with pytest.raises(InvalidRequest, match="ids"):
            in_one_row(there, [torch.ones(1, 2), torch.full((1, 3), 1e6)])
    finally:
        there.close()
        here.close()
