"""Adapters for transformers models: padding, positions, length limits and the key/value cache.

A request is one tensor, so there is no attention mask in it: it is found from the ids. Only the unbroken
runs of the padding token at either end of a row are padding; the same id between others is a token. A row
answers as it would alone, whatever it is padded with and on whichever side.

- The mask is passed only where there is padding, so that a batch without any costs nothing. A compiled or
  exported model is one for all values, so it always gets the mask, and positions.
- A row padded on its left also needs position_ids that begin at its first token, unless the model counts
  positions relatively, or from the ids themselves as RoBERTa and its kin do.
- Sequences of different lengths can be answered in one row, one behind the other, where each sees itself only
  and has its own positions: no work is done for padding, and more for attention, which is little as long as
  they are short. Whether a model answers them as it does alone is found out by running it.
- With a key/value cache nothing can say which of the cached positions were padding. So a batch of several
  rows with padding cannot ask for a cache, and a single row is taken as it is, without padding.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import nn

from splitlearn_comm.core import InvalidRequest
from splitlearn_manager.core.loaders.adapters import (
    MEAN_POOLED,
    Adapter,
    CallOptions,
    check_length,
    choose_output,
    named_outputs,
)
from splitlearn_manager.errors import InvalidModel

KeyValues = Sequence[tuple[torch.Tensor, torch.Tensor]]


def token_mask(ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """True where a token is, False in the runs of padding at either end of a row.

    A row of nothing but padding counts as tokens: attention over nothing has no value.

    Args:
        ids: [batch, seq], integers.
    """
    tokens = ids != pad_token_id
    from_left = tokens.cumsum(1) > 0
    from_right = tokens.flip(1).cumsum(1).flip(1) > 0
    mask = from_left & from_right
    return mask | ~mask.any(1, keepdim=True)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 at each row's first token; those of padding are of no account."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _counted_within(row_of: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[tokens]: how many so far in its row, of those that count, the token itself included."""
    counted = counts.long().cumsum(0)
    first = torch.ones_like(counts, dtype=torch.bool)
    first[1:] = row_of[1:] != row_of[:-1]
    return counted - (counted - counts.long())[first][row_of]


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, seq, hidden] → [batch, hidden]; padding does not count."""
    if mask is None:
        return hidden.mean(1)
    # Filled, not multiplied: what a model computes for padding may be NaN.
    summed = hidden.masked_fill(~mask.unsqueeze(-1), 0).sum(1, dtype=_dtype_of_sums(hidden))
    return (summed / mask.sum(1, keepdim=True)).to(hidden.dtype)


def _means_of_rows(
    hidden: torch.Tensor, row_of: torch.Tensor, mask: torch.Tensor, rows: int
) -> torch.Tensor:
    """[tokens, hidden] → [rows, hidden]: as `mean_over_tokens`, of rows that lie behind one another."""
    kept = hidden.masked_fill(~mask.unsqueeze(-1), 0).to(_dtype_of_sums(hidden))
    summed = kept.new_zeros(rows, hidden.shape[-1]).index_add_(0, row_of, kept)
    counts = torch.bincount(row_of[mask], minlength=rows).unsqueeze(-1)
    return (summed / counts).to(hidden.dtype)


def _dtype_of_sums(hidden: torch.Tensor) -> torch.dtype:
    """As `mean` adds up: a sum of float16 values may be too large for one."""
    return torch.promote_types(hidden.dtype, torch.float32)


def counts_positions_from_ids(model: nn.Module) -> bool:
    """Whether the model, like RoBERTa, derives positions from where the padding id is."""
    name = "create_position_ids_from_input_ids"
    module = sys.modules.get(type(model).__module__)
    return hasattr(module, name) or any(hasattr(type(part), name) for part in model.modules())


class _Cache(Protocol):
    """What is needed of a transformers cache."""

    layers: Sequence[_CacheLayer]


class _CacheLayer(Protocol):
    keys: torch.Tensor
    values: torch.Tensor


class _TokenModel(Adapter):
    """A transformers model that reads token ids, [batch, seq].

    Attributes:
        answers_tokens: whether its answer has a value, or several, for each token.
        longest: the longest sequence that it takes; None for any.

    Args:
        model: a PreTrainedModel whose main input is input_ids.
        pad_token_id: the id that marks padding; None if there is none.
        max_length: longest sequence that the model or its config takes; None for any.
    """

    looks_back = False
    """Whether a token sees those before it only."""

    def __init__(
        self,
        model: nn.Module,
        options: CallOptions,
        *,
        pad_token_id: int | None,
        vocab_size: int | None,
    ) -> None:
        super().__init__(model, _without_pooling(options), torch.int64)
        self.options = options
        self.pad_token_id = pad_token_id
        self.vocab_size = vocab_size
        self.answers_tokens = options.output != MEAN_POOLED
        self.longest = options.max_length
        names = inspect.signature(model.forward).parameters
        from_ids = counts_positions_from_ids(model)
        self._takes_mask = "attention_mask" in names
        self._takes_positions = "position_ids" in names and not from_ids
        self._can_be_told_positions = "position_ids" in names
        self._counts_from_ids = from_ids
        self.example_shapes = ((1, min(8, options.max_length or 8)),)

    def forward_sequences(self, ids: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """The answers to several inputs, of different lengths, in one row.

        Args:
            ids: [tokens], int64: those of all inputs, one behind the other.
            shapes: of the inputs, [rows, seq] each; at least one token in all.

        Returns:
            [tokens, …] if `answers_tokens`, else [rows, …] of all inputs.

        Raises:
            InvalidRequest: a sequence is too long.
        """
        lengths = [length for rows, length in shapes for _ in range(rows)]
        check_length(max(lengths), self.options.max_length)
        row_of = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths), output_size=ids.numel()
        ).to(ids.device)
        mask = self._mask_of_each(ids, shapes)
        arguments: dict[str, object] = {
            "attention_mask": self._attention_within(row_of, mask, ids.device)
        }
        if self._can_be_told_positions:
            arguments["position_ids"] = self._positions_within(ids, row_of, mask)[None]
        returned = self.module(input_ids=ids[None], **arguments, **self._fixed_without_cache())
        if self.answers_tokens:
            output = choose_output(returned, self.options.output)
            if output.dim() < 2 or tuple(output.shape[:2]) != (1, ids.numel()):
                raise InvalidModel("the output is not one of tokens")
            return output[0]
        return _means_of_rows(self._hidden(returned)[0], row_of, mask, len(lengths))

    def _mask_of_each(self, ids: torch.Tensor, shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """[tokens], as `token_mask` of each input."""
        if self.pad_token_id is None or not bool((ids == self.pad_token_id).any()):
            return torch.ones_like(ids, dtype=torch.bool)
        parts = torch.split(ids, [rows * length for rows, length in shapes])
        return torch.cat(
            [
                token_mask(part.view(*shape), self.pad_token_id).flatten()
                for part, shape in zip(parts, shapes, strict=True)
            ]
        )

    def _attention_within(
        self, row_of: torch.Tensor, mask: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """[1, 1, tokens, tokens]: 0 where a token looks at another one, the least value where it does not."""
        seen = (row_of[:, None] == row_of[None, :]) & mask[None, :]
        if self.looks_back:
            seen = seen.tril()
            if not bool(mask.all()):
                # Padding before a row's first token sees nothing there; attention would go to all rows.
                seen |= torch.diag(~seen.any(1))
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        dtype = dtype or torch.float32
        hidden = torch.zeros(seen.shape, dtype=dtype, device=device)
        return hidden.masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    def _positions_within(
        self, ids: torch.Tensor, row_of: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """[tokens]: those that the model gives a token where its row is alone."""
        if self._counts_from_ids and self.pad_token_id is not None:
            tokens = ids != self.pad_token_id
            return _counted_within(row_of, tokens) * tokens + self.pad_token_id
        # Padding before the first token does not count; behind the last one it does.
        counts = mask | (_counted_within(row_of, mask) > 0)
        return (_counted_within(row_of, counts) - 1).clamp(min=0)

    def _fixed_without_cache(self) -> dict[str, object]:
        return {"use_cache": False, **self._fixed()} if self.looks_back else self._fixed()

    def _answer(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        mask = self._mask(x)
        returned = self.module(input_ids=x, **self._mask_arguments(mask), **self._fixed())
        return self._choose(returned, mask)

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 2 or x.shape[1] == 0:
            raise InvalidRequest(
                f"the input has shape {list(x.shape)}; the model takes token ids [batch, seq]"
            )
        check_length(x.shape[1], self.options.max_length)

    def _mask(self, ids: torch.Tensor) -> torch.Tensor | None:
        if self.pad_token_id is None:
            return None
        mask = token_mask(ids, self.pad_token_id)
        if torch.compiler.is_compiling():
            return mask
        return None if bool(mask.all()) else mask

    def _mask_arguments(self, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if mask is None or not self._takes_mask:
            return {}
        arguments = {"attention_mask": mask.long()}
        if not self._takes_positions:
            return arguments
        if torch.compiler.is_compiling():
            usual = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
            arguments["position_ids"] = torch.where(mask[:, 0].all(), usual, positions(mask))
        elif not bool(mask[:, 0].all()):
            arguments["position_ids"] = positions(mask)
        return arguments

    def _fixed(self) -> dict[str, object]:
        return {"return_dict": True, **self.options.forward_kwargs}

    def _choose(self, returned: object, mask: torch.Tensor | None) -> torch.Tensor:
        if self.options.output != MEAN_POOLED:
            return choose_output(returned, self.options.output)
        return mean_over_tokens(self._hidden(returned), mask)

    def _hidden(self, returned: object) -> torch.Tensor:
        outputs = named_outputs(returned)
        if "last_hidden_state" not in outputs:
            raise InvalidModel(
                "config.output is mean_pooled, which needs the output last_hidden_state; "
                f"the model returns {', '.join(outputs)}"
            )
        return outputs["last_hidden_state"]


class TextAdapter(_TokenModel):
    """A model that reads all of its input at once: an encoder, or a decoder without a cache."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ids [batch, seq], int64 → the chosen output."""
        return self._answer(x)


class CausalTextAdapter(_TokenModel):
    """A decoder, which can go on from the keys and values of earlier calls."""

    looks_back = True
    _sizes: set[tuple[int, int]] | None = None

    def forward(
        self,
        x: torch.Tensor,
        past_key_values: KeyValues | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, KeyValues]:
        """Ids [batch, seq], int64; with `use_cache`, `(output, presents)`.

        Args:
            past_key_values: one (key, value) of [batch, heads, seq, head_dim] a layer; `x` then holds
                only the ids that follow.

        Raises:
            InvalidRequest: the sequence is too long, the cache does not fit, or a batch with padding
                asks for a cache.
        """
        if past_key_values is None and not use_cache:
            return self._answer(x)
        self._check(x)
        past_length = self._check_past(x, past_key_values)
        check_length(past_length + x.shape[1], self.options.max_length)
        if x.shape[0] > 1 and past_key_values is None and self._mask(x) is not None:
            raise InvalidRequest(
                "a batch with padding cannot use the key/value cache, which does not say what was "
                "padding: send the rows one by one, or rows of equal length"
            )
        cache = _as_cache(past_key_values)
        returned = self.module(input_ids=x, past_key_values=cache, use_cache=True, **self._fixed())
        output = self._choose(returned, None)
        return (output, _as_key_values(cache)) if use_cache else output

    def _check_past(self, x: torch.Tensor, past: KeyValues | None) -> int:
        """The number of cached positions."""
        if past is None:
            return 0
        layers = self._layer_count()
        if layers is not None and len(past) != layers:
            raise InvalidRequest(f"past_key_values have {len(past)} layers; the model has {layers}")
        shapes = {tuple(tensor.shape) for pair in past for tensor in pair}
        first = past[0][0].shape if past else ()
        if len(first) != 4 or any(s[0] != x.shape[0] or s[2] != first[2] for s in shapes):
            raise InvalidRequest(
                f"past_key_values have the shapes {sorted(map(list, shapes))}; expected "
                f"[{x.shape[0]}, heads, seq, head_dim] with one seq for all layers"
            )
        if (sizes := {(s[1], s[3]) for s in shapes}) != (own := self._own_sizes(x)):
            # The cache of an older version of the model, say.
            raise InvalidRequest(
                f"past_key_values have (heads, head_dim) {sorted(sizes)}; the model has {sorted(own)}"
            )
        return int(first[2])

    def _own_sizes(self, x: torch.Tensor) -> set[tuple[int, int]]:
        """(heads, head_dim) of the model's own caches: found by a forward of one token, once."""
        if self._sizes is None:
            cache = _as_cache(None)
            self.module(input_ids=x[:1, :1], past_key_values=cache, use_cache=True, **self._fixed())
            found = _as_key_values(cache)
            self._sizes = {(t.shape[1], t.shape[3]) for pair in found for t in pair}
        return self._sizes

    def _layer_count(self) -> int | None:
        count = getattr(getattr(self.module, "config", None), "num_hidden_layers", None)
        return count if isinstance(count, int) else None


def _as_cache(past: KeyValues | None) -> _Cache:
    from transformers import DynamicCache

    # Without the model's config, which would drop what a sliding window does not need: the caller sends
    # the whole cache back, and its length is how positions are counted.
    return cast(_Cache, DynamicCache(past) if past is not None else DynamicCache())


def _as_key_values(cache: _Cache) -> KeyValues:
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for pair in pairs for t in pair):
        raise InvalidRequest(
            "this model's cache is not one of keys and values; ask without use_cache"
        )
    return tuple(pairs)


class NamedInputAdapter(Adapter):
    """A transformers model whose main input is something else: pixel_values, input_values …"""

    def __init__(
        self,
        model: nn.Module,
        options: CallOptions,
        *,
        input_name: str,
        input_dtype: torch.dtype,
        example_shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__(model, options, input_dtype)
        self.input_name = input_name
        self.example_shapes = () if example_shape is None else (example_shape,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as the model's main input, in the model's dtype."""
        returned = self.module(
            **{self.input_name: x}, return_dict=True, **self.options.forward_kwargs
        )
        return choose_output(returned, self.options.output)


def _without_pooling(options: CallOptions) -> CallOptions:
    return CallOptions() if options.output == MEAN_POOLED else options
