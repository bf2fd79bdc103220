"""The commands that ask a running node, or tell it what to do: each asks, and shows the answer.

Exit codes: 0; 2 if no node could be asked, if there is no such model, or if the node refused.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from splitlearn_manager.cli.app import (
    Directory,
    Format,
    ModelId,
    ServerFile,
    Targets,
    fail,
)
from splitlearn_manager.cli.data import mappings, texts
from splitlearn_manager.cli.finding import RunningNode, find_node, split_targets
from splitlearn_manager.cli.render import Output, json_text, print_data, print_lines, show, width

_POLL_S = 60.0
# As wide as nearly all reasons.
_REASON = len("WeightsNotFound")


def status(
    targets: Targets = None, server_config: ServerFile = None, output: Format = Output.TABLE
) -> None:
    """Show where each model stands, and the node.

    With ids, all about those models.

    Exit code 0: shown, 2: no node, or no such model.
    """
    from splitlearn_manager.cli.status_view import model_lines, models_lines, node_lines

    ids, directory = split_targets(targets or [])
    node = find_node(directory, server_config)
    asked = {"models": list(ids)} if ids else {"brief": output is Output.TABLE}
    answer = node.ask("status", **asked)
    models = models_in(answer)
    now, room = time.time(), width()
    if output is not Output.TABLE:
        print_data({"models": models, "node": answer.get("node")}, output)
    elif ids:
        for position, model in enumerate(models):
            gap = [Text()] if position else []
            print_lines([*gap, *model_lines(model, now, room)])
    else:
        lines = models_lines(models, now, room)
        print_lines([*lines, Text(), *node_lines(answer, node.directory, now, room)])
    known = {model["model_id"] for model in models}
    if missing := [model_id for model_id in ids if model_id not in known]:
        fail(unknown_model(node, missing[0]))


def events(
    targets: Targets = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what happens from now on.")
    ] = False,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Show what has happened, to all models or to some; -f goes on.

    With -f each event is shown as it happens (as JSON: one a line), until Ctrl-C.

    Exit code 0: shown, 2: no node, no such model, or the node ended.
    """
    ids, directory = split_targets(targets or [])
    node = find_node(directory, server_config)
    known = set(texts(node.ask("names").get("model_ids")))
    only = ids[0] if len(ids) == 1 else None
    answer = node.ask("events", after=0, model_id=only)
    found = _those(answer, ids)
    seen = {str(event["model_id"]) for event in found}
    if missing := [model_id for model_id in ids if model_id not in known | seen]:
        fail(unknown_model(node, missing[0]))
    if not follow and output is not Output.TABLE:
        print_data({"events": found}, output)
        return
    # What comes later is aligned with what is there.
    widths = (len("12:00:00"), max((len(name) for name in ids or known | seen), default=0), _REASON)
    _show_events(found, output, widths if follow else ())
    if not follow and not found:
        print("nothing has happened yet")
    while follow:
        answer = node.ask("events", after=answer["next"], model_id=only, wait_s=_POLL_S)
        _show_events(_those(answer, ids), output, widths)


def explain(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Say why a model is in its phase, and what would help.

    It says what was tried and what the model waits for as well.

    Exit code 0: shown, 2: no node, or no such model.
    """
    from splitlearn_manager.cli.story_view import explain_lines

    answer = find_node(directory, server_config).ask("explain", model_id=model_id)
    show(explain_lines(answer, width()), answer, output)


def history(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Show which versions of a model were accepted, and what became of them.

    Exit code 0: shown, 2: no node, or no such model.
    """
    from splitlearn_manager.cli.story_view import history_lines

    answer = find_node(directory, server_config).ask("history", model_id=model_id)
    show(history_lines(mappings(answer.get("history")), time.time()), answer, output)


def suspend(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Keep a model as it is until `resume`, whatever happens to its file.

    Exit code 0: told, 2: no node, no such model, or refused.
    """
    _tell(find_node(directory, server_config), "suspend", model_id, output)


def resume(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Let a suspended model follow its file again.

    Exit code 0: told, 2: no node, no such model, or refused.
    """
    _tell(find_node(directory, server_config), "resume", model_id, output)


def retry(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Try a failed load again at once.

    Exit code 0: told, 2: no node, no such model, or refused.
    """
    _tell(find_node(directory, server_config), "retry", model_id, output)


def promote(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Let a version that is being rolled out take over at once.

    Exit code 0: told, 2: no node, no such model, or nothing is being rolled out.
    """
    _tell(find_node(directory, server_config), "promote", model_id, output)


def abort(
    model_id: ModelId,
    directory: Directory = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Take back a version that is being rolled out.

    Exit code 0: told, 2: no node, no such model, or nothing is being rolled out.
    """
    _tell(find_node(directory, server_config), "abort", model_id, output)


def golden(
    model_id: ModelId,
    directory: Directory = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "-f", "--file", help="Where to; MODEL_ID.golden.safetensors in DIR unless given."
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "-i", "--inputs", help="A .safetensors or .npz file with the inputs to ask the model."
        ),
    ] = None,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Record answers of the version that serves, for `verify:` to hold later versions against.

    Without inputs of your own the model is asked one like those that it was warmed up with.

    Exit code 0: recorded, 2: no node, no such model, or it could not be recorded.
    """
    node = find_node(directory, server_config)
    target = file or node.directory / f"{model_id}.golden.safetensors"
    answer = node.ask(
        "golden",
        model_id=model_id,
        file=str(target.absolute()),
        inputs=None if inputs is None else str(inputs.absolute()),
    )
    if output is not Output.TABLE:
        print_data(answer, output)
        return
    print(answer.get("message"))
    print("\n".join(_how_to_name(target, node, model_id)))


def _how_to_name(target: Path, node: RunningNode, model_id: str) -> Sequence[str]:
    """The lines of the model's file that name a golden file: relative to it, if it lies in the directory."""
    path, root = os.path.abspath(target), os.path.abspath(node.directory)
    models = models_in(node.ask("status", models=[model_id]))
    source = str(models[0].get("source") or "") if models else ""
    if os.path.commonpath([path, root]) != root:
        return ("in the model's file:", "verify:", f"  golden: {path}")
    relative = os.path.relpath(path, os.path.dirname(os.path.join(root, source)))
    return ("in the model's file, relative to it:", "verify:", f"  golden: {relative}")


def models_in(answer: dict[str, object]) -> list[dict[str, object]]:
    """The models of an answer to `status`."""
    return [dict(model) for model in mappings(answer.get("models"))]


def unknown_model(node: RunningNode, model_id: str) -> str:
    """Says in the node's words that there is no such model."""
    from splitlearn_manager.cli.asking import Refused

    try:
        found = node.ask("explain", model_id=model_id)
    except Refused as refused:
        return str(refused)
    # It is declared, and nothing of it was accepted yet.
    return "; ".join([str(found.get("headline")), *texts(found.get("would_help"))])


def _tell(node: RunningNode, command: str, model_id: str, output: Output) -> None:
    answer = node.ask(command, model_id=model_id)
    if output is Output.TABLE:
        print(answer.get("message"))
    else:
        print_data(answer, output)


def _show_events(found: list[dict[str, object]], output: Output, at_least: Sequence[int]) -> None:
    import sys

    from splitlearn_manager.cli.status_view import event_lines

    if output is Output.TABLE:
        print_lines(event_lines(found, time.time(), at_least=at_least))
    elif output is Output.JSON:
        for event in found:
            print(json_text(event))
    else:
        for event in found:
            print("---")
            print_data(event, output)
    sys.stdout.flush()


def _those(answer: dict[str, object], ids: tuple[str, ...]) -> list[dict[str, object]]:
    events = [dict(event) for event in mappings(answer.get("events"))]
    return [event for event in events if not ids or event["model_id"] in ids]
