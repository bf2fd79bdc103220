"""What the shell may complete: ids of models, and directories, from the nodes that run.

Asked at every press of the tab key, so it loads next to nothing, waits for no node that is slow, and
says nothing where something is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

_PATIENCE_S = 0.5


def complete_id(args: list[str], incomplete: str) -> list[str]:
    """Ids of models of the node that is meant as long as no directory is named."""
    return [model_id for model_id in _model_ids() if model_id.startswith(incomplete)]


def complete_directory(args: list[str], incomplete: str) -> list[str]:
    """Directories that nodes serve, then those that lie here."""
    from splitlearn_manager.cli.finding import running_nodes

    served = [os.path.join(node.directory, "") for node in running_nodes()]
    found = [path for path in served if path.startswith(incomplete)]
    return list(dict.fromkeys([*found, *_directories(incomplete)]))


def complete_target(args: list[str], incomplete: str) -> list[str]:
    """Ids, then directories."""
    return [*complete_id(args, incomplete), *complete_directory(args, incomplete)]


def _model_ids() -> list[str]:
    from splitlearn_manager.cli.asking import NodeError, ask
    from splitlearn_manager.cli.finding import NotFound, find_node

    try:
        answer = ask(find_node(None).socket, "names", patience_s=_PATIENCE_S)
    except (NodeError, NotFound):
        return []
    ids = answer.get("model_ids")
    return [str(model_id) for model_id in ids] if isinstance(ids, list) else []


def _directories(incomplete: str) -> list[str]:
    parent, start = os.path.split(incomplete)
    try:
        entries = sorted(Path(parent or ".").iterdir())
    except OSError:
        return []
    return [
        f"{os.path.join(parent, entry.name)}{os.sep}"
        for entry in entries
        if entry.name.startswith(start)
        and entry.is_dir()
        and (start.startswith(".") or not entry.name.startswith("."))
    ]
