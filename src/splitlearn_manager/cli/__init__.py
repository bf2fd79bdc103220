"""The command line. `python -m splitlearn_manager.reconcile …` and `splitlearn-manager reconcile …`.

Only `run` and `once` load torch.
"""

from __future__ import annotations

import io
import os
import sys

_COMPLETION = ("--install-completion", "--show-completion")


def reconcile_main(args: list[str] | None = None) -> None:
    """Runs `reconcile` with the given arguments, by default the process's own."""
    from splitlearn_manager.cli.reconcile import reconcile_app

    _print_anything()
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] and arguments[0] in _COMPLETION:
        # What a shell completes is the console script: `python -m …` is Python's to complete.
        _program(arguments)
    reconcile_app()(args=arguments, prog_name="reconcile")


def main() -> None:
    """The console script `splitlearn-manager`."""
    _print_anything()
    arguments = sys.argv[1:]
    if arguments[:1] == ["reconcile"] and arguments[1:2] and arguments[1] in _COMPLETION:
        arguments = arguments[1:]
    _program(arguments)


def _print_anything() -> None:
    """What the locale has no character for is escaped: an arrow, or a name that is not UTF-8, must not end a
    command in the middle, with an exit code that means something else. What was closed goes nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _program(arguments: list[str]) -> None:
    from splitlearn_manager.cli.reconcile import program_app

    program_app()(args=arguments, prog_name="splitlearn-manager")
