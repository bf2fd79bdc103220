"""Loads models in the Hugging Face layout through transformers, from local files alone.

The weights are read by `hf_directory`, outside any lock; transformers then builds the model around them,
which takes a moment and is exclusive (see `building`). Nothing is downloaded here: `hub.py` does that before.
A model with weights that the files do not have is refused, since it would answer with random numbers; only
a pooling head that nobody asked for may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from splitlearn_manager.config.loader_options import LoaderOptions
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.loaders.adapters import CallOptions, has_cache
from splitlearn_manager.core.loaders.building import BUILD_GATE, QUIET
from splitlearn_manager.core.loaders.hf_directory import (
    first_line,
    model_class,
    read_config,
    read_weights,
)
from splitlearn_manager.core.loaders.own_memory import StoredTensor, read_tensor
from splitlearn_manager.core.loaders.slots import Destination
from splitlearn_manager.core.loaders.text_adapter import (
    CausalTextAdapter,
    NamedInputAdapter,
    TextAdapter,
    counts_positions_from_ids,
)
from splitlearn_manager.errors import InvalidModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_huggingface(
    directory: Path, config: ModelConfig, destination: Destination | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model of a directory, and notes for people.

    Args:
        destination: where its weights are to be; on the CPU if None. Of which dtype says the config.

    Raises:
        WeightsNotFound, LoadError, InvalidModel, UntrustedCheckpoint: as `hf_directory`.
    """
    options = config.config
    dtype: torch.dtype | None = (
        getattr(torch, config.weights_dtype) if config.weights_dtype else None
    )
    with QUIET:
        hf_config = read_config(directory, trusted=config.trusted)
        cls = model_class(directory, hf_config, options.auto_class, trusted=config.trusted)
        _refuse_two_inputs(hf_config, cls)
    destination = destination or Destination()
    weights = read_weights(directory, _reader(cls, destination, dtype), trusted=config.trusted)
    with BUILD_GATE.exclusive(), QUIET:
        model, info = _build(directory, cls, hf_config, weights, dtype)
    del weights
    if destination.borrower is not None:
        destination.borrower.settle(model)
    notes = _check_complete(directory, model, info, options)
    return _adapter(model, options), notes


def _reader(
    cls: type[PreTrainedModel], destination: Destination, dtype: torch.dtype | None
) -> Callable[[StoredTensor], torch.Tensor]:
    """Gives each tensor of the files its final memory, or that of an equal one of another model."""
    borrower = destination.borrower if cls.__module__.startswith("transformers.models.") else None

    def read(stored: StoredTensor) -> torch.Tensor:
        if borrower is not None:
            floating = dtype is not None and stored.dtype.is_floating_point
            twin = borrower.equal_to(stored, dtype if floating and dtype else stored.dtype)
            if twin is not None:
                return twin
        return read_tensor(stored, dtype)

    return read


def _refuse_two_inputs(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> None:
    if getattr(config, "is_encoder_decoder", False) and not cls.__name__.endswith("EncoderModel"):
        raise InvalidModel(
            f"{cls.__name__} is an encoder and a decoder, which take two inputs; to serve its encoder, "
            "write `auto_class: AutoModelForTextEncoding` under `config:`"
        )


def _build(
    directory: Path,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> tuple[PreTrainedModel, Mapping[str, Iterable[object]]]:
    try:
        built = cls.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype if dtype is not None else "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InvalidModel(
            f"{directory}: transformers cannot build a {cls.__name__} of it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return cast("tuple[PreTrainedModel, Mapping[str, Iterable[object]]]", built)


def _check_complete(
    directory: Path,
    model: PreTrainedModel,
    info: Mapping[str, Iterable[object]],
    options: LoaderOptions,
) -> tuple[str, ...]:
    """Notes about weights; raises InvalidModel if some that the answer depends on are not there."""
    name = type(model).__name__
    unexpected = sorted(map(str, info.get("unexpected_keys", ())))
    missing = sorted(map(str, info.get("missing_keys", ())))
    wrong = [_mismatch(item) for item in info.get("mismatched_keys", ())]
    pooler_unused = model.base_model is model and options.output != "pooler_output"
    needed = wrong + [key for key in missing if not (pooler_unused and "pooler." in key)]
    if needed:
        others = f"; it has others: {_some(unexpected)}" if unexpected else ""
        raise InvalidModel(f"{directory} lacks weights that {name} needs: {_some(needed)}{others}")
    notes = []
    if missing:
        notes.append("the weights have no pooler: pooler_output would be random")
    if unexpected:
        notes.append(f"weights that {name} has no use for: {_some(unexpected)}")
    return tuple(notes)


def _mismatch(item: object) -> str:
    if isinstance(item, tuple) and len(item) == 3:
        name, found, wanted = item
        return f"{name} (has {list(found)}, needs {list(wanted)})"
    return str(item)


def _some(names: list[str]) -> str:
    rest = len(names) - 4
    return ", ".join(names[:4]) + (f" and {rest} more" if rest > 0 else "")


def _adapter(model: PreTrainedModel, options: LoaderOptions) -> nn.Module:
    limits = [n for n in (options.max_sequence_length, _own_limit(model)) if n is not None]
    call = CallOptions(options.output, min(limits, default=None), options.forward_kwargs)
    if model.main_input_name != "input_ids":
        return NamedInputAdapter(
            model,
            call,
            input_name=model.main_input_name,
            input_dtype=model.dtype,
            example_shape=_example_shape(model),
        )
    cls = CausalTextAdapter if _is_causal(model) else TextAdapter
    embeddings = model.get_input_embeddings()
    table = getattr(embeddings, "weight", None)
    return cls(
        model,
        call,
        pad_token_id=_pad_token_id(model.config, options),
        vocab_size=int(table.shape[0]) if isinstance(table, torch.Tensor) else None,
    )


def _own_limit(model: PreTrainedModel) -> int | None:
    """The most positions that the model has; RoBERTa and its kin leave the first few unused."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        return None
    padding = getattr(model.config, "pad_token_id", None)
    if counts_positions_from_ids(model) and isinstance(padding, int):
        return max(1, limit - padding - 1)
    return limit


def _pad_token_id(config: PreTrainedConfig, options: LoaderOptions) -> int | None:
    if options.pad_token_id is not None:
        return options.pad_token_id
    own = getattr(config, "pad_token_id", None)
    return own if isinstance(own, int) and own >= 0 else None


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the model only looks back, and so can go on from a cache.

    The encoders' `forward` takes the same arguments; they are told apart by what transformers offers for
    them: a type that can be a masked language model is a decoder only if its config says so.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    config = model.config
    if not has_cache(model) or getattr(config, "is_encoder_decoder", False):
        return False
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return bool(getattr(config, "is_decoder", False))
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _example_shape(model: PreTrainedModel) -> tuple[int, ...] | None:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    if model.main_input_name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return (1, int(getattr(config, "num_channels", 3)), int(height), int(width))
    return (1, 16000) if model.main_input_name == "input_values" else None
