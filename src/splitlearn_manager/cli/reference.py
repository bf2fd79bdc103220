"""docs/cli.md, from the command line itself: `python -m splitlearn_manager.cli.reference docs/cli.md`.

Usage, arguments, options and exit codes are those that `--help` shows. Between them stand the examples
that the page has already; `make docs` records them anew, with a real node.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import typer
import typer.core

from splitlearn_manager.cli.reconcile import COMMANDS, reconcile_app

_INTRODUCTION = """\
# The command line

`splitlearn-manager reconcile`, or `python -m splitlearn_manager.reconcile`, followed by one of the commands
below. Without one, `run` is meant: `splitlearn-manager reconcile desired/` runs a node.

*This page is made from the command line itself by `make docs`.*

{contents}

## What all of them share

**The directory.** Every command takes the desired directory as its last argument. If it is left out,
`desired` in the working directory is meant, else the directory of the one node that you run. A word that
contains a slash or names an existing directory is taken for the directory, any other for a model's id.

**The node.** `status`, `wait`, `events`, `explain`, `history`, `suspend`, `resume`, `retry`, `promote`,
`abort`, `golden` and `apply` ask the node that serves the directory, over a Unix socket in its state
directory. Only the user who runs the node may use it. If `state_dir` is set in a file that is given with
`--server-config`, give it to these commands as well in case they do not find the node. `plan` asks the
node if there is one. `validate` and `schema` need none.

**Output.** `-o table` (for people, the default), `-o json` or `-o yaml`. Colour and moving lines are for
terminals only; `NO_COLOR` turns colour off. In a pipe every line is plain and whole, however long. `run`
and `once` log to standard error, as `key=value` or with `--log-format json` as one JSON object a line.

**Exit codes.** {exit_codes}

**Completion.** `splitlearn-manager --install-completion` teaches your shell the commands, the ids of the
models of the running node, and directories; `--show-completion` shows what it would install.
"""

_EXIT_CODES = """\
2 stands for whatever could not be done, with one sentence on standard error; 130 for Ctrl-C. Beside these:

| command | 0 | 1 |
|---|---|---|
"""


def page(examples: Mapping[str, str]) -> str:
    """The page, with an example for each command that has one."""
    app = typer.main.get_command(reconcile_app())
    context = typer.Context(app, info_name="reconcile")
    names = [command.__name__ for command in COMMANDS]
    sections = [_section(name, context, examples.get(name, "")) for name in names]
    contents = " · ".join(f"[{name}](#{name})" for name in names)
    exit_codes = _EXIT_CODES + "\n".join(_exit_row(command) for command in COMMANDS)
    introduction = _INTRODUCTION.format(contents=contents, exit_codes=exit_codes)
    return introduction + "".join(sections)


def examples_of(text: str) -> dict[str, str]:
    """The examples of a page, by command."""
    found: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        _, fence, example = body.partition("```console\n")
        if fence:
            found[name] = example[: example.index("```")]
    return found


def _section(name: str, context: typer.Context, example: str) -> str:
    command = context.command.commands[name]  # type: ignore[attr-defined]
    shown = [param for param in command.params if param.name != "help"]
    arguments = [str(p.metavar) for p in shown if p.param_type_name == "argument"]
    usage = " ".join(["reconcile", name, *arguments, "[OPTIONS]"])
    paragraphs = [f"\n## {name}\n", *(f"{p}\n" for p in _paragraphs(command.help or ""))]
    paragraphs.append(f"```\n{usage}\n```\n")
    rows = "".join(f"| `{_cell(_typed(p))}` | {_cell(_meaning(p))} |\n" for p in shown)
    paragraphs.append(f"| argument | meaning |\n|---|---|\n{rows}")
    if example:
        paragraphs.append(f"```console\n{example}```\n")
    return "\n".join(paragraphs)


def _typed(param: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    """What is typed: `-o, --output FORM`, or the name of an argument."""
    if param.param_type_name == "argument":
        return str(param.metavar)
    value = f" {param.metavar}" if param.metavar else ""
    return ", ".join(param.opts) + value


def _meaning(param: typer.core.TyperOption | typer.core.TyperArgument) -> str:
    default = param.default
    if default is None or default is False or param.required:
        return param.help or ""
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{param.help} Default: `{text}`."


def _exit_row(command: object) -> str:
    """`| NAME | what 0 means | what 1 means |`, from the last paragraph of the command's text."""
    last = _paragraphs(inspect.getdoc(command) or "")[-1]
    zero = re.search(r"\b0: (.*?)(?:, 1:|, 2:|\.$)", last)
    one = re.search(r"\b1: (.*?)(?:, 2:|\.$)", last)
    name = getattr(command, "__name__", "")
    return f"| `{name}` | {zero[1] if zero else ''} | {one[1] if one else ''} |"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Rewrites the page that is named, and keeps its examples."""
    path = Path(sys.argv[1])
    examples = examples_of(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(page(examples), encoding="utf-8")


if __name__ == "__main__":
    main()
