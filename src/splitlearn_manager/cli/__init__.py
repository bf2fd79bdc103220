"""The command line. `python -m splitlearn_manager.reconcile …` and `splitlearn-manager reconcile …`.

Commands that need no node (`plan`, `validate`, `schema`) load no torch.
"""

from __future__ import annotations

import sys


def reconcile_main(args: list[str] | None = None) -> None:
    """Runs `reconcile` with the given arguments, by default the process's own."""
    from splitlearn_manager.cli.reconcile import app

    app(args=args, prog_name="reconcile")


def main() -> None:
    """The console script `splitlearn-manager`."""
    from splitlearn_manager.version import VERSION

    usage = (
        "usage: splitlearn-manager reconcile [COMMAND] DIRECTORY …   (reconcile --help lists all)"
    )
    arguments = sys.argv[1:]
    if arguments[:1] == ["reconcile"]:
        reconcile_main(arguments[1:])
    elif arguments[:1] == ["--version"]:
        print(f"splitlearn-manager {VERSION}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
    else:
        print(f"unknown command {arguments[0]!r}\n{usage}", file=sys.stderr)
        sys.exit(2)
