"""The commands that look at a directory themselves: they serve it, plan for it, or check its files.

`plan`, `validate` and `schema` load no torch and need no node.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from splitlearn_manager.cli.app import (
    ERROR,
    Directory,
    Format,
    Logs,
    ServerFile,
    existing,
    fail,
)
from splitlearn_manager.cli.render import (
    Output,
    columns,
    cross,
    print_data,
    print_lines,
    problem_data,
)
from splitlearn_manager.logs import LogFormat


def run(
    directory: Directory = None,
    server_config: ServerFile = None,
    log_format: Logs = LogFormat.TEXT,
) -> None:
    """Serve the directory until SIGTERM or SIGINT (Ctrl-C).

    Then running requests are answered and the models unloaded; a second signal exits at once.

    Exit code 0: stopped by a signal, 2: it could not start.
    """
    from splitlearn_manager.cli.planning import server_settings
    from splitlearn_manager.cli.terminal import Waiting
    from splitlearn_manager.errors import SplitlearnError

    meant = existing(directory, "run")
    settings = server_settings(meant, server_config)
    with Waiting() as shown:
        shown.say(["PyTorch is being loaded"])
        from splitlearn_manager.cli.run import leave, serve
    try:
        serve(meant, settings, log_format, live=server_config is None)
    except SplitlearnError as error:
        fail(error.message)
    leave(0)


def once(
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
    log_format: Logs = LogFormat.TEXT,
) -> None:
    """Load all models once, report, unload them and exit.

    Exit code 0: all became ready, 1: not all did, 2: error, or a node serves the directory.
    """
    from splitlearn_manager.cli.plan_view import problem_line
    from splitlearn_manager.cli.planning import server_settings
    from splitlearn_manager.cli.status_view import summary_lines
    from splitlearn_manager.cli.terminal import Waiting
    from splitlearn_manager.errors import SplitlearnError

    meant = existing(directory, "once")
    settings = server_settings(meant, server_config)
    with Waiting() as shown:
        shown.say(["PyTorch is being loaded"])
        from splitlearn_manager.cli.run import converge, leave

    try:
        desired, statuses = converge(meant, settings, log_format)
    except SplitlearnError as error:
        fail(error.message)
    if output is Output.TABLE:
        print_lines(
            [*summary_lines(statuses), *(problem_line(p, desired) for p in desired.problems)]
        )
    else:
        models = [dict(s) for s in statuses]
        print_data({"models": models, "problems": problem_data(desired.problems)}, output)
    sys.stdout.flush()
    well = not desired.problems and all(s["phase"] == "Ready" for s in statuses)
    leave(0 if well else 1)


def plan(
    directory: Directory = None, server_config: ServerFile = None, output: Format = Output.TABLE
) -> None:
    """Show what would be done, and do nothing.

    Where a node serves the directory the plan is that of the node, otherwise that of a start.

    Exit code 0: nothing to do, 1: changes, or the prune guard holds models, 2: error (a file is not
    accepted, or the directory cannot be read).
    """
    from splitlearn_manager.cli.finding import node_of
    from splitlearn_manager.cli.plan_view import plan_data, plan_lines
    from splitlearn_manager.cli.planning import preview_beside, preview_of_start, server_settings

    meant = existing(directory, "plan")
    settings = server_settings(meant, server_config)
    node = node_of(meant, server_config)
    if node is not None:
        desired, made = preview_beside(node, settings)
    else:
        desired, made = preview_of_start(meant, settings)
    if output is Output.TABLE:
        print_lines(plan_lines(made, desired, meant))
    else:
        print_data(plan_data(made, desired), output)
    if desired.problems or not desired.source_available:
        raise typer.Exit(ERROR)
    raise typer.Exit(1 if made.actions or desired.prune_guard else 0)


def validate(directory: Directory = None, output: Format = Output.TABLE) -> None:
    """Check every file.

    Exit code 0: all are valid, 2: some are not.
    """
    from splitlearn_manager.cli.planning import preview
    from splitlearn_manager.config.server_config import ServerConfig

    desired, _ = preview(existing(directory, "validate"), ServerConfig())
    if output is Output.TABLE:
        rows = [(m.config.model_id, "valid", str(m.source)) for m in desired.models.values()]
        problems = len(desired.problems)
        print_lines([*columns(rows), *(cross(str(p)) for p in desired.problems)])
        print(f"{len(desired.models)} valid, {problems} problem{'' if problems == 1 else 's'}")
    else:
        data = {"valid": sorted(desired.models), "problems": problem_data(desired.problems)}
        print_data(data, output)
    raise typer.Exit(ERROR if desired.problems else 0)


class SchemaOf(StrEnum):
    """What a schema describes."""

    MODEL = "model"
    SERVER = "server"


def schema(
    of: Annotated[
        SchemaOf, typer.Argument(metavar="[model|server]", help="Model files, or server.yaml.")
    ] = SchemaOf.MODEL,
) -> None:
    """Print the JSON Schema of a file, for editors.

    They complete and check the keys with it.

    Exit code 0: printed.
    """
    from splitlearn_manager.config.schema import model_schema, server_schema

    print_data(model_schema() if of is SchemaOf.MODEL else server_schema(), Output.JSON)
