"""What a node says of its models and of itself, as people read it: the table, one model, the node.

Pure: from the dictionaries of `reconcile.status.StatusBook` and a time to lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.text import Text

from splitlearn_manager.cli.data import Data, mapping, mappings, number, texts
from splitlearn_manager.cli.guard_view import guard_lines
from splitlearn_manager.cli.render import (
    clock_time,
    columns,
    cross,
    duration,
    meanwhile,
    megabytes,
    phase_text,
    problem_text,
    wrapped,
)

_NOTE_INDENT = "      "
# What is left out first where the terminal is narrow.
_DISPENSABLE = ("since", "memory", "sync", "health", "from")
_AS_IT_SHOULD_BE = ("Ready", "Synced", "Healthy")
_SHORT = {
    "PruneGuard": "no file declares it, and the prune guard holds it (see below)",
    "SourceUnavailable": "the directory cannot be read, so it stays as it is (see below)",
}
_WELL = {
    "SourceAvailable": "True",
    "Watching": "True",
    "StateKept": "True",
    "RestartRequired": "False",
}


def models_lines(models: Sequence[Data], now: float, width: int) -> list[Text]:
    """One line a model, with why below it where it is not well."""
    if not models:
        return [Text("  no models")]
    cells = [_cells(model, now) for model in models]
    names = list(cells[0])
    while True:
        heads = {name: Text(name, style="dim") for name in names}
        rows = columns([[row[name] for name in names] for row in (heads, *cells)])
        spare = next((name for name in _DISPENSABLE if name in names), None)
        if max(row.cell_len for row in rows) <= width or spare is None:
            break
        names.remove(spare)
    lines = [rows[0]]
    for row, model in zip(rows[1:], models, strict=True):
        lines.append(row)
        for note in why(model, in_short=True):
            lines += wrapped(note, _NOTE_INDENT, width)
    return lines


def summary_lines(statuses: Sequence[Data]) -> list[Text]:
    """What `run` and `once` say when the first convergence is done: one line a model."""
    rows = []
    for status in statuses:
        phase = str(status["phase"])
        size = status["memory_mb"]
        where = f"{size:,.0f} MB on {status['device']}" if isinstance(size, float) else ""
        why = "" if phase == "Ready" else f"{status['reason']}: {status['message']}"
        rows.append(
            (
                str(status["model_id"]),
                phase_text(phase),
                where,
                f"from {status['source']}",
                why,
            )
        )
    return columns(rows)


def model_lines(model: Data, now: float, width: int) -> list[Text]:
    """All about one model."""
    head = Text(f"{model['model_id']}   ", style="bold")
    for position, key in enumerate(("phase", "sync", "health")):
        head.append(" · " if position else "", style="dim")
        head.append_text(phase_text(model.get(key)))
    lines = [head]
    for note in why(model):
        lines += wrapped(note, "  ", width)
    lines += columns([(Text(key, style="dim"), value) for key, value in _details(model)])
    conditions = [
        (
            str(c["type"]),
            Text(str(c["status"]), style="green" if c["status"] == "True" else "yellow"),
            duration(now - number(c.get("since"))),
            str(c["reason"]),
            str(c["message"]),
        )
        for c in mappings(model.get("conditions"))
    ]
    if conditions:
        lines.append(Text("  conditions", style="dim"))
        lines += columns(conditions, indent="    ")
    events = mappings(model.get("events"))
    if events:
        lines.append(Text("  latest events", style="dim"))
        lines += event_lines(events[-10:], now, with_ids=False, indent="    ")
    return lines


def event_lines(
    events: Sequence[Data],
    now: float,
    *,
    with_ids: bool = True,
    indent: str = "  ",
    at_least: Sequence[int] = (),
) -> list[Text]:
    """One line an event: when, of which model, what. See `columns` for `at_least`."""
    rows = []
    for event in events:
        count = number(event.get("count"))
        again = f"   ({count:.0f} times)" if count > 1 else ""
        row: list[Text | str] = [Text(clock_time(number(event["at"]), now), style="dim")]
        if with_ids:
            row.append(str(event["model_id"]))
        reason = str(event["reason"])
        style = "red" if "Fail" in reason or "Overdue" in reason else ""
        row += [Text(reason, style=style), f"{event['message']}{again}"]
        rows.append(row)
    return columns(rows, indent, at_least)


def node_lines(answer: Data, directory: Path, now: float, width: int) -> list[Text]:
    """The node: what it serves and where, how it sees changes, and all that is wrong with it."""
    node = mapping(answer.get("node"))
    lines = columns([(Text(key, style="dim"), value) for key, value in _node_facts(node, now)])
    if answer.get("loop_alive") is False:
        lines.append(
            cross(
                "the loop has not ended a turn for long: what is above may be outdated; see its log"
            )
        )
    for condition in mappings(node.get("conditions")):
        well = _WELL.get(str(condition["type"]))
        if well is not None and condition["status"] != well:
            lines += _wrapped_cross(f"{condition['reason']}: {condition['message']}", width)
    held = [m for m in mappings(answer.get("models")) if m.get("held")]
    for problem in mappings(node.get("problems")):
        file = problem.get("file")
        kept = [(m.get("model_id"), m.get("generation")) for m in held if m.get("source") == file]
        follows = meanwhile(str(file), kept)
        lines += _wrapped_cross(f"{problem_text(problem)}   ({follows})", width)
    guard = node.get("prune_guard")
    if isinstance(guard, dict):
        ids, managed = texts(guard.get("model_ids")), int(number(guard.get("managed")))
        lines += guard_lines(str(guard.get("digest")), ids, managed, directory)
    return lines


def why(model: Data, *, in_short: bool = False) -> list[Text]:
    """Why a model is not Ready, Synced and Healthy, a line for each reason; none if it is.

    In short, what the lines about the node say of all models is not repeated.
    """
    if tuple(model.get(key) for key in ("phase", "sync", "health")) == _AS_IT_SHOULD_BE:
        return []
    style = "red" if model.get("health") == "Degraded" else "yellow"
    by_type = {
        str(c["type"]): c for c in mappings(model.get("conditions")) if c["status"] != "True"
    }
    # What is not Ready says why; Synced repeats one of the others, or is alone.
    said: dict[str, str] = {}
    for kind in ("Ready", "Accepted", "Synced"):
        if kind in by_type and (kind != "Synced" or not said):
            reason, message = str(by_type[kind]["reason"]), str(by_type[kind]["message"])
            said.setdefault(_SHORT.get(reason, message) if in_short else message, reason)
    return [
        Text(f"{reason}: {message}" if message else reason, style=style)
        for message, reason in said.items()
    ]


def source_of(model: Data) -> str:
    """`FILE:LINE` where the model is declared; where it came from otherwise."""
    if model.get("source"):
        return f"{model['source']}:{model['line']}" if model.get("line") else str(model["source"])
    return "Python API" if model.get("owner") == "api" else "–"


def _cells(model: Data, now: float) -> dict[str, Text]:
    since = model.get("phase_since")
    return {
        "model": Text(str(model["model_id"])),
        "phase": phase_text(model.get("phase")),
        "sync": phase_text(model.get("sync")),
        "health": phase_text(model.get("health")),
        "gen": Text(_generation(model)),
        "memory": Text(_memory(model)),
        "since": Text(duration(now - number(since)) if since else "–"),
        "from": Text(source_of(model)),
    }


def _generation(model: Data) -> str:
    """`4`, or `3 → 4` while an older one than the accepted serves."""
    accepted, serves = model.get("generation"), model.get("observed_generation")
    if accepted is None:
        return "–"
    return f"{serves} → {accepted}" if serves not in (None, accepted) else str(accepted)


def _memory(model: Data) -> str:
    device = f" {model['device']}" if model.get("device") else ""
    if model.get("memory_mb") is not None:
        return megabytes(model["memory_mb"]) + device
    if model.get("reserved_mb"):
        return f"≤ {megabytes(model['reserved_mb'])}{device}"
    return "–"


def _sizes(model: Data) -> Iterable[tuple[str, str]]:
    """What its latest load measured, and what was estimated before."""
    if model.get("weights_mb") is not None:
        weights = f"{megabytes(model['weights_mb'])} of weights"
        activations = (
            f", {megabytes(model['activations_mb'])} of activations for its largest batch"
            if model.get("activations_mb") is not None
            else "; what a forward takes was not measured"
        )
        yield "measured", weights + activations
    if model.get("estimated_mb") is not None:
        yield "estimated", f"{megabytes(model['estimated_mb'])}, before it was loaded"


def _details(model: Data) -> Iterable[tuple[str, str]]:
    accepted, serves = model.get("generation"), model.get("observed_generation")
    serving = f", {serves} serves" if serves not in (None, accepted) else ""
    yield "generation", f"{accepted if accepted is not None else '–'}{serving}"
    yield "declared in", source_of(model)
    yield "memory", _memory(model)
    yield from _sizes(model)
    endpoint = model.get("endpoint") or model["model_id"]
    pinned = ", pinned" if model.get("pinned") else ""
    yield "endpoint", f"{endpoint}, priority {model.get('priority', 0)}{pinned}"
    yield (
        "requests",
        f"{model.get('requests', 0)}, {model.get('errors', 0)} failed, "
        f"{model.get('in_flight', 0)} running",
    )
    if model.get("attempts"):
        yield "failed loads", f"{model['attempts']} of this version"


def _node_facts(node: Data, now: float) -> Iterable[tuple[str, str]]:
    up = now - number(node.get("started_at")) if node.get("started_at") else 0.0
    yield (
        "node",
        f"{node.get('directory')}, process {node.get('process_id')} for {duration(up)}, "
        f"version {node.get('version')}",
    )
    yield "serves", f"gRPC {node.get('grpc')}, HTTP {node.get('http') or 'off'}"
    phases = mapping(node.get("models"))
    counted = ", ".join(f"{n} {phase}" for phase, n in phases.items() if n)
    yield "models", f"{counted or 'none'}; at most {node.get('max_models')} in memory"
    devices = [
        f"{d['device']} {number(d['reserved_mb']):,.0f} of {number(d['budget_mb']):,.0f} MB"
        for d in mappings(node.get("devices"))
    ]
    yield "memory", ", ".join(devices) or "–"
    yield "changes", f"seen by {node.get('watch_mode')}" + _unsettled(node)
    yield "state", f"kept in {node.get('state_dir')}"


def _unsettled(node: Data) -> str:
    return "" if node.get("settled") else "; not settled at the moment"


def _wrapped_cross(message: str, width: int) -> list[Text]:
    first, *others = wrapped(message, "", width - 2)
    return [cross("").append_text(first), *(Text("  ").append_text(line) for line in others)]
