"""The commands under `reconcile`, in the order in which they are listed.

`run` is meant where none is named: `reconcile desired/`.
"""

from __future__ import annotations

import typer

from splitlearn_manager.cli.app import Commands
from splitlearn_manager.cli.directory_commands import once, plan, run, schema, validate
from splitlearn_manager.cli.node_commands import (
    abort,
    events,
    explain,
    golden,
    history,
    promote,
    resume,
    retry,
    status,
    suspend,
)
from splitlearn_manager.cli.wait_commands import apply, wait

COMMANDS = (
    run,
    once,
    plan,
    apply,
    validate,
    status,
    wait,
    events,
    explain,
    history,
    suspend,
    resume,
    retry,
    promote,
    abort,
    golden,
    schema,
)

_HELP = """Serve the PyTorch models that a directory of YAML files declares.

`reconcile DIRECTORY` runs a node. plan, validate and schema need none; the other commands ask the node
that serves the directory."""


def reconcile_app(*, add_completion: bool = False) -> typer.Typer:
    """The command line `reconcile`."""
    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        add_completion=add_completion,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=_HELP,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for command in COMMANDS:
        app.command()(command)
    return app


def program_app() -> typer.Typer:
    """The console script `splitlearn-manager`, with its completion."""
    app = typer.Typer(
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Serves PyTorch models that a directory of YAML files declares.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.add_typer(reconcile_app(), name="reconcile")

    @app.callback(invoke_without_command=True)
    def options(version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
        if version:
            from splitlearn_manager.version import VERSION

            print(f"splitlearn-manager {VERSION}")
            raise typer.Exit

    return app
