"""Writes small real checkpoints to disk: plain torch modules, and tiny random transformers models."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.config.model_config import ModelConfig


def mlp(width: int = 8) -> nn.Sequential:
    """The module of the Quick Start, smaller."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width)).eval()


def save_mlp(path: Path, width: int = 8) -> nn.Sequential:
    """Save the whole module; returns it."""
    module = mlp(width)
    torch.save(module, path)
    return module


def model_config(path: object, **keys: object) -> ModelConfig:
    """A ModelConfig with the id `m`."""
    return ModelConfig.model_validate({"model_id": "m", "model_path": str(path), **keys})


class RunsACommand:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def malicious(marker: Path) -> RunsACommand:
    """An object whose unpickling creates the file `marker`."""
    return RunsACommand(f"touch '{marker}'")


def tiny_bert(directory: Path, **keys: object) -> nn.Module:
    """A random BertModel of two layers, with 32 positions and padding id 0."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**{**_encoder_sizes(), "pad_token_id": 0, **keys})
    return save_random(BertModel(config), directory)


def tiny_roberta(directory: Path) -> nn.Module:
    """A random RobertaModel: padding id 1, positions that begin at 2."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        **{
            **_encoder_sizes(),
            "max_position_embeddings": 34,
            "pad_token_id": 1,
            "type_vocab_size": 1,
        }
    )
    return save_random(RobertaModel(config), directory)


def tiny_gpt2(directory: Path, **keys: object) -> nn.Module:
    """A random GPT2LMHeadModel of two layers with 32 positions and padding id 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return save_random(GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **keys})), directory)


def tiny_mistral(directory: Path) -> nn.Module:
    """A random MistralForCausalLM of two layers, whose tokens see eight before them."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {**_encoder_sizes(), "max_position_embeddings": 64}
    config = MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8, pad_token_id=0)
    return save_random(MistralForCausalLM(config), directory)


def tiny_t5_encoder(directory: Path) -> nn.Module:
    """A random T5EncoderModel: relative positions, padding id 0."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    return save_random(T5EncoderModel(config), directory)


def tiny_vit(directory: Path) -> nn.Module:
    """A random ViTModel for images [batch, 3, 16, 16]."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=8)
    return save_random(ViTModel(config), directory)


def _encoder_sizes() -> dict[str, object]:
    return {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }


def save_random(model: nn.Module, directory: Path) -> nn.Module:
    from transformers import PreTrainedModel
    from transformers.utils import logging

    assert isinstance(model, PreTrainedModel)
    torch.manual_seed(1)
    # Larger than the usual initial values, so that a wrong position or mask shows in the answers.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    logging.disable_progress_bar()
    model.eval().save_pretrained(directory)
    return model
