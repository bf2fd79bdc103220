"""What all output shares: its forms, aligned columns, times and sizes as people read them.

Tables are aligned; colour is used on a terminal only, and not where NO_COLOR is set. Nothing here
looks anything up.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from io import StringIO
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from splitlearn_manager.config.yaml_source import Problem

ANY_WIDTH = 10_000
"""The width of what is not a terminal: no line is ever broken for it."""


_COMMANDS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, line separators, and what changes the direction of the text around it."""


class Output(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


PHASE_STYLES = {
    "Ready": "green",
    "Loading": "cyan",
    "Updating": "cyan",
    "Failed": "red",
    "Pending": "yellow",
    "Terminating": "yellow",
    "Evicted": "dim",
    "Synced": "green",
    "OutOfSync": "yellow",
    "Unknown": "yellow",
    "Healthy": "green",
    "Progressing": "cyan",
    "Degraded": "red",
    "Missing": "yellow",
    "Suspended": "dim",
}


def show(lines: Iterable[Text], data: Mapping[str, object], output: Output) -> None:
    """Prints one thing in the form that was asked for: lines for people, or data."""
    if output is Output.TABLE:
        print_lines(lines)
    else:
        print_data(data, output)


def print_data(data: object, output: Output) -> None:
    """Prints data as JSON or YAML."""
    if output is Output.JSON:
        print(json_text(data, indent=2))
        return
    text = _yaml_text(data, allow_unicode=True)
    sys.stdout.write(text if _is_printable(text) else _yaml_text(data, allow_unicode=False))


def json_text(data: object, indent: int | None = None) -> str:
    """Data as JSON that standard output has the characters for."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    return text if _is_printable(text) else json.dumps(data, indent=indent)


def _yaml_text(data: object, *, allow_unicode: bool) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = allow_unicode
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def _is_printable(text: str) -> bool:
    """Whether standard output has all the characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def print_lines(lines: Iterable[Text]) -> None:
    """Prints lines. What would move the cursor, break a line or turn it round is shown by a sign instead:
    the names of files, and what a model's code says, are not ours."""
    out = console()
    for line in lines:
        if _COMMANDS.search(line.plain):
            line.plain = without_commands(line.plain)
        out.print(line)


def without_commands(text: str) -> str:
    """A text with a sign in place of each character that is a command to a terminal; as long as before."""
    return _COMMANDS.sub(_sign_for, text)


def _sign_for(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def console() -> Console:
    """Standard output; colours on a terminal, plain lines of any length otherwise."""
    width = None if sys.stdout.isatty() else ANY_WIDTH
    return Console(highlight=False, soft_wrap=True, width=width)


def width() -> int:
    return console().width


def columns(
    rows: Sequence[Sequence[Text | str]], indent: str = "  ", at_least: Sequence[int] = ()
) -> list[Text]:
    """Rows as aligned lines, three spaces between columns.

    Args:
        at_least: least widths of the first columns, to align with what was printed before.
    """
    cells = [[c if isinstance(c, Text) else Text(c) for c in row] for row in rows]
    widths = [max(row[i].cell_len for row in cells) for i in range(len(cells[0]))] if cells else []
    widths = [max(pair) for pair in zip_longest(widths, at_least[: len(widths)], fillvalue=0)]
    lines = []
    for row in cells:
        line = Text(indent)
        for cell, width in zip(row, widths, strict=True):
            line.append_text(cell)
            line.append(" " * (width - cell.cell_len + 3))
        line.rstrip()
        lines.append(line)
    return lines


def wrapped(text: Text | str, indent: str, at_most: int) -> list[Text]:
    """A text as lines of a width, all indented; the first words of a line are never cut."""
    text = text if isinstance(text, Text) else Text(text)
    room = max(20, at_most - len(indent))
    lines = text.wrap(Console(width=room), room)
    for line in lines:
        line.rstrip()
    return [Text(indent).append_text(line) for line in lines]


def phase_text(word: object) -> Text:
    """A phase, a sync or a health status in its colour."""
    return Text(str(word or "–"), style=PHASE_STYLES.get(str(word), ""))


def cross(message: str) -> Text:
    """A line about something that is wrong."""
    return Text("✗ ", style="bold red").append(message, style="default not bold")


def duration(seconds: float) -> str:
    """`8s`, `3m`, `2h`, `5d`: how long, in its largest unit."""
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size * (2 if unit == "m" else 1):
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def clock_time(at: float, now: float) -> str:
    """Time of day, with the date unless it was today."""
    when, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    form = "%H:%M:%S" if when.date() == today.date() else "%Y-%m-%d %H:%M:%S"
    return when.strftime(form)


def megabytes(value: object) -> str:
    return f"{value:,.0f} MB" if isinstance(value, int | float) else "–"


def problem_data(problems: Sequence[Problem]) -> list[dict[str, object]]:
    """Problems as data."""
    return [
        {
            "file": p.file,
            "line": p.line,
            "column": p.column,
            "key": p.key,
            "message": p.message,
        }
        for p in problems
    ]


def meanwhile(file: str, kept: Iterable[tuple[object, object]]) -> str:
    """What happens while a file has a problem: its models' ids and the generations that stay, or none."""
    if file == "server.yaml":
        return "the settings in force stay"
    stays = ", ".join(f"{model_id}: generation {generation} stays" for model_id, generation in kept)
    return stays or "left out until it is corrected"


def problem_text(problem: Mapping[str, object]) -> str:
    """`FILE:LINE:COLUMN  KEY: MESSAGE` of a problem that came as data."""
    place = ":".join(str(problem[part]) for part in ("file", "line", "column") if problem.get(part))
    key = f"{problem['key']}: " if problem.get("key") else ""
    return f"{place}  {key}{problem.get('message', '')}"
