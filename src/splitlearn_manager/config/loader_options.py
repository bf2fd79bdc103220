"""`LoaderOptions`: the `config:` map of a model's file, for its loader and its warm-up.

Only `kwargs` and `forward_kwargs` are free-form; any other key that is not listed is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

from splitlearn_manager.config.fields import MAX_INTEGER, Count, Factory, Integer, PlainMap, Text
from splitlearn_manager.config.mistakes import expectation

MAX_RANK = 64


def _check_dimension(value: int) -> int:
    if value != -1 and not 1 <= value <= MAX_INTEGER:
        raise expectation("a size ≥ 1, or -1 for a dimension that may vary")
    return value


def _check_class_name(value: str) -> str:
    if not (value.isidentifier() and value.startswith("AutoModel")):
        raise expectation("the name of a transformers class that begins with AutoModel")
    return value


def _check_not_empty(value: str) -> str:
    if not value.strip():
        raise expectation("text that is not empty")
    return value


Dimension = Annotated[
    Integer,
    AfterValidator(_check_dimension),
    WithJsonSchema({"type": "integer", "anyOf": [{"minimum": 1}, {"const": -1}]}),
]


def _check_rank(value: tuple[int, ...]) -> tuple[int, ...]:
    # Field(min_length=1) would count only the valid items, and complain a second time.
    if not 1 <= len(value) <= MAX_RANK:
        raise expectation(f"a list of 1 to {MAX_RANK} sizes")
    return value


Shape = Annotated[tuple[Dimension, ...], AfterValidator(_check_rank)]


class LoaderOptions(BaseModel):
    """Options of the loader and of warm-up; each one applies only where its meaning does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    input_shape: Shape | None = None
    """Shape of an input, batch included, for warm-up; -1 marks a dimension that may vary. With a -1
    in it, requests whose shape does not fit are refused."""
    input_dtype: Literal["float32", "float16", "bfloat16", "float64", "int32", "int64"] | None = (
        None
    )
    """What the model's input is converted to. Default: found out from the model."""
    output: Annotated[Text, AfterValidator(_check_not_empty)] | None = None
    """Which of the model's outputs is the answer: its name, or `mean_pooled` for the mean over the
    tokens that are not padding."""
    max_sequence_length: Count | None = None
    """Longest sequence that a request may have."""
    kwargs: PlainMap = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    factory: Factory | None = None
    """`package.module:name` of the function or class that builds the module for a file that holds
    only its weights."""
    auto_class: Annotated[Text, AfterValidator(_check_class_name)] | None = None
    """The transformers class that loads the model, such as AutoModelForCausalLM. Default: taken
    from the model's config.json."""
    pad_token_id: Integer | None = None
    """Token id that marks padding. Default: the one in the model's config.json."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Convert the floating-point weights to this type at load. Default: as they are stored."""
    forward_kwargs: PlainMap = Field(default_factory=dict)
    """Further keyword arguments of every call of the model."""

    def __getitem__(self, key: str) -> JsonValue:
        """An option by its name, as from the map in the file; one that is not set is absent."""
        value = self.model_dump(mode="json").get(key)
        if value is None:
            raise KeyError(key)
        return value  # type: ignore[no-any-return]

    def get(self, key: str, default: JsonValue = None) -> JsonValue:
        """An option by its name, or `default` where it is not set."""
        try:
            return self[key]
        except KeyError:
            return default
