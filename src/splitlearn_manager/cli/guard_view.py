"""What is said where the prune guard holds models: which, why, and the command that confirms it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from splitlearn_manager.cli.finding import program
from splitlearn_manager.cli.render import cross

_SHOWN_IDS = 20


def guard_lines(digest: str, model_ids: Sequence[str], managed: int, directory: Path) -> list[Text]:
    """The lines about a prune guard."""
    shown = ", ".join(model_ids[:_SHOWN_IDS])
    more = len(model_ids) - _SHOWN_IDS
    return [
        cross(
            f"prune guard: no file declares {len(model_ids)} of {managed} models any more. "
            "All of them stay until you confirm that they are to go:"
        ),
        Text(f"    {shown}" + (f" and {more} more" if more > 0 else ""), style="yellow"),
        Text("  if they are to go:   ").append(confirm_command(digest, directory), style="bold"),
        Text("  if not:              put their files back"),
    ]


def confirm_command(digest: str, directory: Path) -> str:
    """The command that confirms exactly this, as it can be typed."""
    return f"{program()} apply {shlex.quote(str(directory))} --confirm-prune {digest}"
