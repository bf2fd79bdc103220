"""`ServerConfig`: everything that server.yaml says about the node itself, validated.

It decides which keys and values are legal, and which of them apply to a running node (`LIVE_KEYS`).
As strict as `ModelConfig`, and as far from doing anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from splitlearn_manager.config.fields import (
    ConcreteDevice,
    Count,
    Flag,
    Percent,
    Port,
    Quota,
    Seconds,
    Text,
    config_error,
)
from splitlearn_manager.config.mistakes import Path as KeyPath
from splitlearn_manager.config.mistakes import expectation
from splitlearn_manager.config.model_path import is_factory

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
ROUTING_STRATEGIES = ("round_robin", "least_loaded", "random")

LIVE_KEYS = frozenset(
    {
        "max_models",
        "max_memory_percent",
        "memory_quota_mb",
        "routing",
        "log_level",
        "settle_s",
        "resync_s",
        "prune_guard_percent",
        "max_parallel_loads",
        "parallel_forwards",
        "intra_op_threads",
    }
)
"""Keys whose change a running node takes over at once."""


def _upper_case(value: object) -> object:
    upper = value.upper() if isinstance(value, str) else None
    return upper if upper in LOG_LEVELS else value


def _path_as_text(value: object) -> object:
    """`pathlib.Path` is welcome from Python."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_routing(value: str) -> str:
    if value not in ROUTING_STRATEGIES and not is_factory(value):
        raise expectation(
            "round_robin, least_loaded, random or package.module:Class", choices=ROUTING_STRATEGIES
        )
    return value


def _check_host(value: str) -> str:
    if not value or any(c.isspace() or not c.isprintable() for c in value):
        raise expectation("a host name or address")
    return value


LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(_upper_case),
    WithJsonSchema({"enum": [*LOG_LEVELS, *(level.lower() for level in LOG_LEVELS)]}),
]
Routing = Annotated[
    Text,
    AfterValidator(_check_routing),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(ROUTING_STRATEGIES)},
                {"type": "string", "pattern": r"^[^:/\s]+:[^:/\s]+$"},
            ]
        }
    ),
]


class ServerConfig(BaseModel):
    """The node: addresses, limits, the pace of its loop. Each key of server.yaml is an argument.

    Raises:
        ConfigError: some value does not validate; the message has one line for each.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    host: Annotated[Text, AfterValidator(_check_host)] = "127.0.0.1"
    """Address to listen on. 0.0.0.0 listens on all of the machine's addresses."""
    port: Port = 50051
    """Port of the gRPC service; 0 lets the system choose one."""
    unix_socket: Annotated[Text, BeforeValidator(_path_as_text)] | None = None
    """Also listen on a Unix socket at this path, for clients of the same user on this machine (`unix:PATH`);
    relative to this file."""
    max_workers: Count = 10
    """Threads for requests that train a model or use its key/value cache; and the most forwards at a time of
    one model whose requests are not joined into batches."""
    max_models: Count = 5
    """How many models may be in memory at once, those being loaded or unloaded included."""
    metrics_port: Port = 8000
    """Port of /metrics, the health checks and the JSON interface; 0 lets the system choose one."""
    health_check_interval: Seconds = 30.0
    """Seconds between two measurements of the machine's resources."""
    enable_monitoring: Flag = True
    """Whether metrics_port is served at all."""
    log_level: LogLevel = "INFO"
    """The least severe kind of message that is logged."""
    max_memory_percent: Percent = 80.0
    """Share of each device's memory that models may use, unless memory_quota_mb says otherwise."""
    memory_quota_mb: dict[ConcreteDevice, Quota] = Field(default_factory=dict)
    """MB (2^20 bytes) that models may use on a device, by name: `{cpu: 4096, "cuda:0": 20000}`."""
    routing: Routing = "round_robin"
    """How requests are spread over the models of an endpoint: by name, or a class of your own."""
    settle_s: Seconds = 0.25
    """How long a file must stay unchanged before it is acted on, in seconds."""
    resync_s: Seconds = 1.0
    """Seconds between two scans of the desired directory when no event asks for one."""
    prune_guard_percent: Percent = 50.0
    """Share of at least three managed models that must be confirmed to be unloaded at once."""
    max_parallel_loads: Count = 2
    """How many models are loaded at the same time."""
    parallel_forwards: Count | None = None
    """How many forwards run at the same time, over all models. null: as many as there are processors."""
    intra_op_threads: Count | None = None
    """How many threads PyTorch uses within one forward on the CPU. null: the processors, shared among the
    models that are READY; or what the environment variable OMP_NUM_THREADS says."""
    state_dir: Annotated[Text, BeforeValidator(_path_as_text)] | None = None
    """Directory of the node's own, which keeps last good specs across restarts; relative to this file.
    null: one for each desired directory, under `$XDG_STATE_HOME/splitlearn-manager`."""

    _base_dir: Path | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise config_error(error, cls, _where_it_belongs) from None

    @property
    def resolved_state_dir(self) -> Path | None:
        """`state_dir` as an absolute path, relative to the file that it stands in; None without it."""
        return self._resolved(self.state_dir)

    @property
    def resolved_unix_socket(self) -> Path | None:
        """`unix_socket` as an absolute path, relative to the file that it stands in; None without it."""
        return self._resolved(self.unix_socket)

    def _resolved(self, path: str | None) -> Path | None:
        if path is None:
            return None
        base = self._base_dir or Path.cwd()
        return Path(os.path.abspath(base / os.path.expanduser(path)))

    def with_base_dir(self, path: str | os.PathLike[str] | None) -> Self:
        """The same config, with a relative `state_dir` starting from `path`."""
        copy = self.model_copy()
        copy._base_dir = None if path is None else Path(os.path.abspath(path))
        return copy

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> ServerConfig:
        """The server file at `path`.

        Raises:
            ConfigError: one line for each problem, with file, line, column and key.
        """
        from splitlearn_manager.config.yaml_source import read_server

        return read_server(Path(path)).with_base_dir(Path(path).parent)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write the config; an existing file keeps its comments and order, and what still holds.

        Raises:
            ConfigError: the existing file has problems of its own, and was left as it is.
            OSError: the file cannot be written.
        """
        from splitlearn_manager.config.yaml_writer import write_server

        write_server(self, Path(path))

    def __eq__(self, other: object) -> bool:
        # The base directory says where the text came from, not what it says.
        if not isinstance(other, ServerConfig):
            return NotImplemented
        return self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


RESTART_KEYS = frozenset(ServerConfig.model_fields) - LIVE_KEYS
"""Keys whose change waits for the next start of the node."""


def _where_it_belongs(path: KeyPath) -> str | None:
    """For a key that is known elsewhere: where."""
    from splitlearn_manager.config.model_config import ModelConfig

    if len(path) == 1 and path[0] in ModelConfig.model_fields:
        return "in a model's own file"
    return None
