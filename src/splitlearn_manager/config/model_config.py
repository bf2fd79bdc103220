"""`ModelConfig`: everything that one model's file says, validated.

It decides which keys and values are legal, and by `spec_hash` and `load_hash` which of two configs
mean the same. It never opens the model's files, never imports torch or the user's code, and never
changes after it was made.

Numbers and text are not converted into one another: `"32"` is no integer, `true` is not 1, and 3.0
is not 3; only an integer will do where any number is asked for. What is wrong is raised as
`ConfigError`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from splitlearn_manager.config.fields import (
    Count,
    Device,
    Flag,
    Integer,
    Megabytes,
    Name,
    Seconds,
    Share,
    Text,
    config_error,
)
from splitlearn_manager.config.loader_options import LoaderOptions
from splitlearn_manager.config.mistakes import Path as KeyPath
from splitlearn_manager.config.mistakes import expectation, printable
from splitlearn_manager.config.model_path import parse_model_path
from splitlearn_manager.config.rollout import Rollout
from splitlearn_manager.config.verify import Verify

IN_PLACE_KEYS = frozenset(
    {
        "priority",
        "pinned",
        "endpoint",
        "weight",
        "batch_size",
        "max_queue",
        "max_queue_delay_ms",
        "load_timeout_s",
        "drain_timeout_s",
        "keep_alive_s",
        "max_memory_mb",
        "update",
        "rollout",
    }
)
"""Keys that apply to a loaded model at once; a change of any other key loads the model anew."""


def _path_as_text(value: object) -> object:
    """`pathlib.Path` is welcome from Python."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_model_path(value: str) -> str:
    try:
        parse_model_path(value)
    except ValueError as error:
        raise expectation(str(error)) from None
    return value


ModelPathText = Annotated[Text, BeforeValidator(_path_as_text), AfterValidator(_check_model_path)]


class ModelConfig(BaseModel):
    """One model that the node serves. Every key of a model's YAML file is an argument here.

    Raises:
        ConfigError: some value does not validate; the message has one line for each.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    model_id: Name
    """The model's identity on this node and on the wire, whatever its file is called."""
    model_path: ModelPathText
    """What to load: a file or directory (relative to this file), `package.module:factory`,
    `package:NAME/dir` (files inside an installed Python package) or `hf:org/name@revision`."""
    model_type: Literal["auto", "pytorch", "huggingface", "custom"] = "auto"
    """Which loader reads it. auto: `package.module:factory` is custom, a directory with a
    config.json is huggingface, anything else is pytorch."""
    device: Device = "auto"
    """Where it runs. auto: a GPU if there is room on one, the fullest in which it fits, so that the
    largest hole stays for large models; else the CPU."""
    batch_size: Count = 32
    """The largest batch that requests are joined into."""
    max_memory_mb: Megabytes | None = None
    """Hard limit of the model's memory in MB (2^20 bytes), checked before and after loading."""
    warmup: Flag = True
    """Run the model once before it serves, so that the first request is not the slow one."""
    priority: Integer = 0
    """Models of a higher priority are loaded first and kept longer."""
    pinned: Flag = False
    """Never evict this model to make room for another."""
    endpoint: Name | None = None
    """A name that several models may share, together with its traffic. Default: the model_id."""
    weight: Share = 1.0
    """This model's share of its endpoint's traffic, relative to the other models' weights."""
    update: Literal["auto", "surge", "recreate"] = "auto"
    """How a change is rolled in. surge: load the new one beside the old one, then switch. recreate:
    unload first. auto: surge if there is room for both, else recreate."""
    runtime: Literal["auto", "thread", "process"] = "auto"
    """thread: inside the server's process. process: in a worker of its own. auto: thread."""
    trusted: Flag = False
    """Allow the files to run code while they are loaded: pickles of any class, a Hugging Face
    repository's own Python code. Only for files whose origin you trust."""
    optimize: Literal["none", "compile", "freeze", "bfloat16", "auto"] = "none"
    """How the model is made faster before it serves. compile: torch.compile, needs a C++ compiler.
    freeze: what depends on weights alone is computed once. bfloat16: weights and forward in bfloat16.
    auto: the fastest of them whose answers agree with the plain model's, else the plain model."""
    optimize_tolerance: Share = 1e-3
    """How far the optimized model's answers may be from the plain model's: for each value
    |optimized - plain| ≤ optimize_tolerance × (1 + |plain|)."""
    max_queue_delay_ms: Share = 0.0
    """The longest that a request waits for others to fill its batch, in milliseconds."""
    max_queue: Count = 1024
    """How many requests may wait; further ones are answered RESOURCE_EXHAUSTED."""
    keep_alive_s: Seconds | None = None
    """Idle seconds after which the model is parked until a request asks for it. null: never."""
    verify: Verify | None = None
    """What a new version must show before it serves."""
    rollout: Rollout | None = None
    """How a new version takes over its traffic step by step."""
    load_timeout_s: Seconds = 600.0
    """Seconds that a load may take."""
    drain_timeout_s: Seconds = 30.0
    """Seconds of draining after which requests that still wait are answered UNAVAILABLE, and those that
    still run are reported. The model is unloaded when the last of these ends, never under it; its
    next version does not wait for that."""
    config: LoaderOptions = LoaderOptions()
    """Options of the loader and of warm-up."""

    _base_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _custom_needs_a_factory(self) -> Self:
        if self.model_type == "custom" and parse_model_path(self.model_path).kind != "factory":
            raise expectation(
                "package.module:factory, because model_type is custom",
                path=("model_path",),
                got=self.model_path,
            )
        return self

    @model_validator(mode="after")
    def _rollout_needs_both(self) -> Self:
        if self.rollout is not None and self.update == "recreate":
            raise expectation(
                "no such key, or another update, because a rollout needs both versions at a time",
                path=("rollout",),
                got="update: recreate",
            )
        return self

    @model_validator(mode="after")
    def _one_dtype(self) -> Self:
        if self.optimize == "bfloat16" and self.config.dtype not in (None, "bfloat16"):
            raise expectation(
                "bfloat16 or no such key, because optimize is bfloat16",
                path=("config", "dtype"),
                got=self.config.dtype,
            )
        return self

    @model_validator(mode="after")
    def _one_factory(self) -> Self:
        parsed = parse_model_path(self.model_path, self.model_type)
        if parsed.kind == "factory" and self.config.factory is not None:
            raise expectation(
                "no such key, because model_path names a factory itself",
                path=("config", "factory"),
                got=self.config.factory,
            )
        return self

    # The last of the validators, for each goes around those above it.
    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise config_error(error, cls, _where_it_belongs) from None

    @property
    def base_dir(self) -> Path | None:
        """The directory that relative paths start from; None: the current working directory."""
        return self._base_dir

    def with_base_dir(self, path: str | os.PathLike[str] | None) -> Self:
        """The same config, with relative paths starting from `path` (made absolute)."""
        copy = self.model_copy()
        copy._base_dir = None if path is None else Path(os.path.abspath(path))
        return copy

    @property
    def weights_dtype(self) -> Literal["float32", "float16", "bfloat16"] | None:
        """What floating-point weights are converted to at load; None: they stay as they are stored."""
        return "bfloat16" if self.optimize == "bfloat16" else self.config.dtype

    @property
    def effective_endpoint(self) -> str:
        """The endpoint whose traffic the model shares: `endpoint`, or else the model_id."""
        return self.endpoint or self.model_id

    @property
    def resolved_model_path(self) -> str:
        """`model_path` with files as absolute paths; factories, `package:` and `hf:` as written."""
        parsed = parse_model_path(self.model_path, self.model_type)
        return self.resolved_path(self.model_path) if parsed.kind == "path" else self.model_path

    @property
    def golden_path(self) -> Path | None:
        """The file of `verify.golden`, absolute; None without one."""
        golden = self.verify.golden if self.verify is not None else None
        return None if golden is None else Path(self.resolved_path(golden))

    def resolved_path(self, path: str) -> str:
        """A path as it stands in the file, absolute."""
        base = self.base_dir or Path.cwd()
        return os.path.abspath(base / os.path.expanduser(path))

    def spec_hash(self) -> str:
        """Hex SHA-256 of what the config means: equal whatever the file's layout or key order."""
        return _digest(self._canonical())

    def load_hash(self) -> str:
        """`spec_hash` of the keys that shape the loaded instance: it differs if a load is due."""
        return _digest({k: v for k, v in self._canonical().items() if k not in IN_PLACE_KEYS})

    def _canonical(self) -> dict[str, JsonValue]:
        # Defaults are left out, so that a later version's new key changes no hash of an old file.
        values: dict[str, JsonValue] = self.model_dump(mode="json", exclude_defaults=True)
        values["model_path"] = self.resolved_model_path
        if self.verify is not None and (golden := self.golden_path) is not None:
            said = self.verify.model_dump(mode="json", exclude_defaults=True)
            values["verify"] = {**said, "golden": str(golden)}
        if self.effective_endpoint == self.model_id:
            values.pop("endpoint", None)
        return values

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """The one model that a YAML file declares; relative paths start from the file's directory.

        Raises:
            ConfigError: one line for each problem, with file, line, column and key.
        """
        from splitlearn_manager.config.yaml_source import read_model

        return read_model(Path(path))

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the config; an existing file keeps its comments and order, and what still holds.

        Raises:
            ConfigError: the existing file has problems of its own, and was left as it is.
            OSError: the file cannot be written.
        """
        from splitlearn_manager.config.yaml_writer import write_model

        write_model(self, Path(path))

    def __eq__(self, other: object) -> bool:
        # base_dir says where the text came from, not what it says.
        if not isinstance(other, ModelConfig):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.model_id, self.model_path))


@dataclass(frozen=True)
class Change:
    """One key that differs: its dotted name (`config.dtype`) and both values, maps whole."""

    key: str
    old: JsonValue
    new: JsonValue

    def __str__(self) -> str:
        return f"{self.key.removeprefix('config.')} {_short(self.old)} → {_short(self.new)}"


def changes(old: ModelConfig, new: ModelConfig) -> tuple[Change, ...]:
    """What differs between two configs, in the order of the keys.

    A model_path that reads the same and leads elsewhere (its file was moved) is a change of
    absolute paths.
    """
    before, after = _flat(old), _flat(new)
    found = [Change(key, before[key], after[key]) for key in before if before[key] != after[key]]
    if old.model_path == new.model_path and old.resolved_model_path != new.resolved_model_path:
        found.append(Change("model_path", old.resolved_model_path, new.resolved_model_path))
    return tuple(found)


def _flat(config: ModelConfig) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = config.model_dump(mode="json", exclude={"config"})
    options = config.config.model_dump(mode="json")
    return values | {f"config.{key}": value for key, value in options.items()}


def _short(value: JsonValue) -> str:
    """A value on one line, text without quotes where it is one word."""
    if value is None:
        return "none"
    if isinstance(value, str) and value and not any(c.isspace() for c in value):
        return printable(value)
    return printable(json.dumps(value, ensure_ascii=False))


def _digest(values: dict[str, JsonValue]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _where_it_belongs(path: KeyPath) -> str | None:
    """For a key that is known elsewhere: where."""
    from splitlearn_manager.config.server_config import ServerConfig

    key = path[-1]
    if len(path) == 1 and key in LoaderOptions.model_fields:
        return "under `config:`"
    if len(path) == 2 and path[0] == "config" and key in ModelConfig.model_fields:
        return "at the top level, not under `config:`"
    if len(path) == 1 and key in ServerConfig.model_fields:
        return "in server.yaml"
    return None
