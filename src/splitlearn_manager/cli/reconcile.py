"""The commands under `reconcile`. `run` is meant where none is named: `reconcile desired/`.

Exit codes: `plan` 0 nothing to do, 1 changes, 2 error; `validate` 0, 2; `once` 0 all ready, 1 not,
2 error; `run` 0 stopped by a signal, 2 could not start.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.core import TyperGroup

from splitlearn_manager.cli.render import (
    Output,
    columns,
    console,
    plan_data,
    plan_lines,
    print_data,
    problem_data,
    problem_line,
    status_lines,
)
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.errors import ConfigError, SplitlearnError
from splitlearn_manager.logs import LogFormat, configure

if TYPE_CHECKING:
    from splitlearn_manager.desired.state import DesiredState
    from splitlearn_manager.reconcile.actions import Plan
    from splitlearn_manager.reconcile.observation import Observation

_ERROR = 2


class _RunByDefault(TyperGroup):
    """Takes `reconcile desired/ …` for `reconcile run desired/ …`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        helps = {"-h", "--help", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in helps:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves the PyTorch models that a directory of YAML files declares.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Directory = Annotated[Path, typer.Argument(help="The directory of YAML files.", show_default=False)]
ServerFile = Annotated[
    Path | None,
    typer.Option("--server-config", help="Server settings, instead of DIRECTORY/server.yaml."),
]
Format = Annotated[Output, typer.Option("-o", "--output", help="Form of the output.")]
Logs = Annotated[LogFormat, typer.Option("--log-format", help="key=value lines, or JSON.")]


def fail(message: str) -> NoReturn:
    """Says what is wrong on standard error, and ends with the code for errors."""
    print(message, file=sys.stderr)
    raise typer.Exit(_ERROR)


def server_settings(directory: Path, server_file: Path | None) -> ServerConfig:
    """The server settings that apply; ends with an error if they do not validate."""
    path = server_file or directory / "server.yaml"
    if server_file is None and not path.exists():
        return ServerConfig()
    try:
        return ServerConfig.from_yaml(path)
    except (ConfigError, OSError) as error:
        fail(str(error))


def check_directory(directory: Path) -> None:
    if not directory.exists():
        fail(f"{directory}: there is no such directory")
    if not directory.is_dir():
        fail(f"{directory}: expected a directory of YAML files, got a file")


@app.command()
def run(
    directory: Directory, server_config: ServerFile = None, log_format: Logs = LogFormat.TEXT
) -> None:
    """Serve the directory until stopped (SIGTERM, SIGINT); a second signal exits at once."""
    from splitlearn_manager.cli.run import leave, serve

    check_directory(directory)
    settings = server_settings(directory, server_config)
    configure(settings.log_level, log_format)
    try:
        serve(directory, settings, live=server_config is None)
    except SplitlearnError as error:
        fail(error.message)
    leave(0)


@app.command()
def once(
    directory: Directory,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
    log_format: Logs = LogFormat.TEXT,
) -> None:
    """Load all models once, report, unload them and exit: 0 if all became ready."""
    from splitlearn_manager.cli.run import converge, leave

    check_directory(directory)
    settings = server_settings(directory, server_config)
    configure(settings.log_level, log_format)
    desired, statuses = converge(directory, settings)
    if output is Output.TABLE:
        out = console()
        for line in (
            *status_lines(statuses),
            *(problem_line(p, desired) for p in desired.problems),
        ):
            out.print(line)
    else:
        print_data(
            {"models": [dict(s) for s in statuses], "problems": problem_data(desired.problems)},
            output,
        )
    well = not desired.problems and all(s["phase"] == "Ready" for s in statuses)
    leave(0 if well else 1)


@app.command("plan")
def show_plan(
    directory: Directory, server_config: ServerFile = None, output: Format = Output.TABLE
) -> None:
    """Show what would be done, and do nothing. Exit code 0: nothing, 1: changes, 2: error.

    Where a node serves the directory, it is asked what runs; otherwise the plan is that of a first start.
    """
    check_directory(directory)
    node = _running_node(directory)
    desired, made = _preview(directory, server_settings(directory, server_config), node)
    if output is Output.TABLE:
        out = console()
        for line in plan_lines(made, desired):
            out.print(line)
    else:
        print_data(plan_data(made, desired), output)
    if desired.problems or not desired.source_available:
        raise typer.Exit(_ERROR)
    raise typer.Exit(1 if made.actions else 0)


@app.command()
def validate(directory: Directory, output: Format = Output.TABLE) -> None:
    """Check every file. Exit code 0: all valid, 2: some are not."""
    check_directory(directory)
    desired, _ = _preview(directory, ServerConfig())
    if output is Output.TABLE:
        out = console()
        rows = [(m.config.model_id, "valid", str(m.source)) for m in desired.models.values()]
        for line in (*columns(rows), *(problem_line(p, desired) for p in desired.problems)):
            out.print(line)
        out.print(f"{len(desired.models)} valid, {len(desired.problems)} problems")
    else:
        print_data(
            {"valid": sorted(desired.models), "problems": problem_data(desired.problems)}, output
        )
    raise typer.Exit(_ERROR if desired.problems else 0)


class SchemaOf(StrEnum):
    """What a schema describes."""

    MODEL = "model"
    SERVER = "server"


@app.command()
def schema(
    of: Annotated[SchemaOf, typer.Argument(help="Model files, or server.yaml.")] = SchemaOf.MODEL,
) -> None:
    """Print the JSON Schema of a file, for editors that complete and check."""
    from splitlearn_manager.config.schema import model_schema, server_schema

    print_data(model_schema() if of is SchemaOf.MODEL else server_schema(), Output.JSON)


def _running_node(directory: Path) -> Observation | None:
    """What the node that serves the directory says of itself; None if there is none."""
    from splitlearn_manager.reconcile.observation import from_json
    from splitlearn_manager.server.control import NodeNotRunning, ask
    from splitlearn_manager.server.state_dir import socket_of, state_dir_for

    try:
        return from_json(ask(socket_of(state_dir_for(directory)), "observe"))
    except NodeNotRunning:
        return None
    except (OSError, ValueError) as error:
        fail(f"the node that serves {directory} does not answer: {error}")


def _preview(
    directory: Path, settings: ServerConfig, node: Observation | None = None
) -> tuple[DesiredState, Plan]:
    from splitlearn_manager.core.clock import SystemClock
    from splitlearn_manager.core.model_manager import ModelManager
    from splitlearn_manager.core.resource_manager import ResourceManager
    from splitlearn_manager.desired.source import DesiredSource
    from splitlearn_manager.reconcile.reconciler import Reconciler

    manager = ModelManager(
        max_models=settings.max_models,
        resources=ResourceManager(settings.max_memory_percent, settings.memory_quota_mb),
    )
    source = DesiredSource(directory, settle_s=settings.settle_s)
    loop = Reconciler(
        source, manager, SystemClock(), max_parallel_loads=settings.max_parallel_loads
    )
    return loop.preview(settings.settle_s, node)
