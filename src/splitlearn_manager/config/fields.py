"""The kinds of value that keys have, shared by the model file and the server file.

Each is a strict pydantic type with its limits. The upper limits only keep absurd numbers away from
code that would overflow on them (a wait of 1e300 seconds, say); nobody should ever meet one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    Strict,
    ValidationError,
    WithJsonSchema,
)

from splitlearn_manager.config.mistakes import Hint, Path, expectation, explain
from splitlearn_manager.config.model_path import is_factory
from splitlearn_manager.errors import ConfigError

MAX_INTEGER = 2**31 - 1
MAX_SECONDS = 1e9
MAX_MEGABYTES = 2**40

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict(), Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)]
Count = Annotated[int, Strict(), Field(ge=1, le=MAX_INTEGER)]
Port = Annotated[int, Strict(), Field(ge=0, le=65535)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]
Percent = Annotated[float, Strict(), Field(gt=0, le=100, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, le=1e9, allow_inf_nan=False)]
Megabytes = Annotated[int, Strict(), Field(ge=1, le=MAX_MEGABYTES)]
Quota = Annotated[float, Strict(), Field(gt=0, le=MAX_MEGABYTES, allow_inf_nan=False)]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
CONCRETE_DEVICE_PATTERN = r"^(cpu|cuda(:(0|[1-9][0-9]{0,3}))?|mps)$"
DEVICE_PATTERN = CONCRETE_DEVICE_PATTERN.replace("^(", "^(auto|")


def _check_name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value):
        raise expectation(
            'up to 128 letters, digits, ".", "_" and "-" that begin with a letter or digit'
        )
    return value


def _check_device(value: str) -> str:
    if not re.fullmatch(DEVICE_PATTERN, value):
        raise expectation(
            "auto, cpu, cuda, cuda:N or mps", choices=("auto", "cpu", "cuda", "cuda:0", "mps")
        )
    return value


def _check_concrete_device(value: str) -> str:
    if not re.fullmatch(CONCRETE_DEVICE_PATTERN, value):
        raise expectation("cpu, cuda, cuda:N or mps", choices=("cpu", "cuda", "cuda:0", "mps"))
    return value


def _check_factory(value: str) -> str:
    if not is_factory(value):
        raise expectation("package.module:name")
    return value


Name = Annotated[
    Text,
    AfterValidator(_check_name),
    WithJsonSchema({"type": "string", "pattern": NAME_PATTERN}),
]
Device = Annotated[
    Text,
    AfterValidator(_check_device),
    WithJsonSchema({"type": "string", "pattern": DEVICE_PATTERN, "examples": ["auto", "cpu"]}),
]
ConcreteDevice = Annotated[
    Text,
    AfterValidator(_check_concrete_device),
    WithJsonSchema({"type": "string", "pattern": CONCRETE_DEVICE_PATTERN}),
]
Factory = Annotated[
    Text,
    AfterValidator(_check_factory),
    WithJsonSchema({"type": "string", "pattern": r"^[^:/\s]+:[^:/\s]+$"}),
]


def check_plain(value: object) -> object:
    """Accept a map of what JSON can hold, tuples as lists; name the place of anything else."""
    return _plain(value, ())


def _plain(value: object, path: Path) -> object:
    match value:
        case str():
            if not _is_unicode(value):
                raise expectation("text that is valid Unicode", path=path)
            return value
        case None | bool() | int() | float():
            return value
        case list() | tuple():
            return [_plain(item, (*path, index)) for index, item in enumerate(value)]
        case Mapping():
            return {_plain_key(k, path): _plain(item, (*path, k)) for k, item in value.items()}
    raise expectation("text, a number, true, false, null, a list or a map", path=path)


def _plain_key(key: object, path: Path) -> str:
    if not isinstance(key, str) or not _is_unicode(key):
        raise expectation("keys that are text", path=path)
    return key


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


PlainMap = Annotated[dict[str, JsonValue], BeforeValidator(check_plain)]


def config_error(error: ValidationError, model: type[BaseModel], hint: Hint) -> ConfigError:
    """pydantic's error as ours; `problems` holds a `Mistake` for each value that is wrong."""
    mistakes = explain(error, model, hint)
    lines = "\n".join(str(mistake) for mistake in mistakes)
    return ConfigError(lines, problems=mistakes)
