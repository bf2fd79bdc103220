"""What all commands share: how a line is read, the arguments that many take, and how mistakes end.

Exit codes: 2 for whatever could not be done; what 0 and 1 mean, each command says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from splitlearn_manager.cli.asking import NodeError
from splitlearn_manager.cli.completion import complete_directory, complete_id, complete_target
from splitlearn_manager.cli.finding import (
    NotFound,
    check_directory,
    directory_or_default,
    looks_like_directory,
)
from splitlearn_manager.cli.render import Output, without_commands
from splitlearn_manager.logs import LogFormat

ERROR = 2
INTERRUPTED = 130

_NO_COMMAND = ("-h", "--help", "--install-completion", "--show-completion")


class Commands(TyperGroup):
    """Takes `reconcile desired/ …` for `reconcile run desired/ …`, and ends mistakes with a sentence."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in _NO_COMMAND:
            word = args[0]
            if not word.startswith("-") and not looks_like_directory(word):
                if not ctx.resilient_parsing:
                    fail(self._unknown(word))
                return super().parse_args(ctx, args)
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except (NodeError, NotFound) as error:
            fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is not None:
                raise
            _give_up_output()
            fail(f"the output cannot be written: {error.strerror or error}")
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    def _unknown(self, word: str) -> str:
        from splitlearn_manager.config.mistakes import suggest

        if os.path.exists(word):
            return f"{word}: expected a command or a directory of YAML files, got a file"
        similar = suggest(word, self.commands)
        hint = f"did you mean `{similar}`?" if similar else f"commands: {', '.join(self.commands)}"
        return f"{word!r} is neither a command nor a directory; {hint}"


Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIRECTORY]",
        help="The directory of YAML files; `desired` here, or that of your only node, if left out.",
        show_default=False,
        autocompletion=complete_directory,
    ),
]
ModelId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The model_id.", show_default=False, autocompletion=complete_id
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ID…] [DIRECTORY]",
        help="Models (all if none is named), and the directory if the last word is one.",
        show_default=False,
        autocompletion=complete_target,
    ),
]
ServerFile = Annotated[
    Path | None,
    typer.Option(
        "--server-config", metavar="FILE", help="Server settings, instead of DIRECTORY/server.yaml."
    ),
]
Format = Annotated[
    Output, typer.Option("-o", "--output", metavar="table|json|yaml", help="Form of the output.")
]
Logs = Annotated[
    LogFormat,
    typer.Option("--log-format", metavar="text|json", help="key=value lines, or JSON."),
]
Seconds = Annotated[
    float, typer.Option("--timeout", min=0.0, metavar="S", help="Longest wait, in seconds.")
]


def _give_up_output() -> None:
    """What could not be written would be tried once more as the process ends, with another exit code."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def fail(message: str, code: int = ERROR) -> NoReturn:
    """Says what is wrong on standard error, and ends with that exit code."""
    sys.stdout.flush()
    for line in message.split("\n"):
        print(without_commands(line), file=sys.stderr)
    raise typer.Exit(code)


def existing(directory: Path | None, command: str) -> Path:
    """The directory that a command means. Raises NotFound if it does not exist."""
    meant = directory_or_default(directory, command)
    check_directory(meant)
    return meant
