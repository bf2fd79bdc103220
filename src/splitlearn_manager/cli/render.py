"""Plans and statuses as people and programs read them: a table, JSON or YAML.

Tables are aligned; colour is used on a terminal only. Nothing here looks anything up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from io import StringIO

from rich.console import Console
from rich.text import Text

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.state import DesiredState
from splitlearn_manager.reconcile.actions import Action, DeviceForecast, Mode, Plan, Verb


class Output(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


_VERB_STYLE = {
    Verb.LOAD: "green",
    Verb.UPDATE: "cyan",
    Verb.ADJUST: "cyan",
    Verb.UNLOAD: "yellow",
    Verb.EVICT: "yellow",
}
_MODE_NOTE = {Mode.SURGE: "surge · no downtime", Mode.RECREATE: "recreate · down while it loads"}


def print_data(data: object, output: Output) -> None:
    """Prints data as JSON or YAML."""
    if output is Output.JSON:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    text = StringIO()
    yaml.dump(data, text)
    sys.stdout.write(text.getvalue())


def console() -> Console:
    """Standard output; colours on a terminal, plain lines of any length otherwise."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(highlight=False, soft_wrap=True, width=width)


def columns(rows: Sequence[Sequence[Text | str]], indent: str = "  ") -> list[Text]:
    """Rows as aligned lines, three spaces between columns."""
    cells = [[c if isinstance(c, Text) else Text(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    lines = []
    for row in cells:
        line = Text(indent)
        for cell, width in zip(row, widths, strict=True):
            line.append_text(cell)
            line.append(" " * (width - len(cell) + 3))
        line.rstrip()
        lines.append(line)
    return lines


def problem_line(problem: Problem, desired: DesiredState) -> Text:
    """A problem, and what happens meanwhile to the models that its file declared."""
    line = Text("✗ ", style="bold red").append(str(problem), style="default not bold")
    kept = sorted(
        f"{m.config.model_id}: generation {m.generation} stays"
        for m in desired.models.values()
        if m.held and m.source.file == problem.file
    )
    if kept:
        line.append(f"   ({', '.join(kept)})", style="dim")
    return line


def plan_lines(plan: Plan, desired: DesiredState) -> list[Text]:
    """A plan as the lines of its table."""
    lines = columns([_action_row(action) for action in plan.actions])
    shown = {action.model_id for action in plan.actions}
    lines += columns(
        [
            (waiting.model_id, Text("wait", style="dim"), f"{waiting.reason}: {waiting.message}")
            for waiting in plan.waiting
            if waiting.model_id not in shown
        ]
    )
    if not desired.source_available or desired.source_message:
        lines.append(Text("✗ ", style="bold red").append(desired.source_message))
    lines += [problem_line(problem, desired) for problem in desired.problems]
    lines += [_forecast_line(device) for device in plan.forecast]
    lines.append(Text(summary(plan, desired)))
    return lines


def summary(plan: Plan, desired: DesiredState) -> str:
    """`1 load, 1 update, 1 invalid`, or that there is nothing to do."""
    counts = [
        f"{n} {verb}"
        for verb in (Verb.LOAD, Verb.UPDATE, Verb.ADJUST, Verb.UNLOAD, Verb.EVICT)
        if (n := sum(action.verb is verb for action in plan.actions))
    ]
    shown = {action.model_id for action in plan.actions}
    if waiting := sum(w.model_id not in shown for w in plan.waiting):
        counts.append(f"{waiting} waiting")
    if invalid := len({problem.file for problem in desired.problems}):
        counts.append(f"{invalid} invalid")
    return ", ".join(counts) or "nothing to do"


def plan_data(plan: Plan, desired: DesiredState) -> dict[str, object]:
    """A plan as data."""
    return {
        "actions": [
            {
                "verb": str(action.verb),
                "model_id": action.model_id,
                "detail": action.detail,
                "reason": action.reason,
                "mode": str(action.mode) if action.mode else None,
                "device": action.device,
                "mb": round(action.mb, 1),
                "after": list(action.after),
                "source": action.source,
            }
            for action in plan.actions
        ],
        "waiting": [
            {"model_id": w.model_id, "reason": w.reason, "message": w.message} for w in plan.waiting
        ],
        "problems": problem_data(desired.problems),
        "source_available": desired.source_available,
        "source_message": desired.source_message,
        "devices": [
            {
                "device": d.device,
                "now_mb": round(d.now_mb, 1),
                "peak_mb": round(d.peak_mb, 1),
                "after_mb": round(d.after_mb, 1),
                "budget_mb": round(d.budget_mb, 1),
            }
            for d in plan.forecast
        ],
    }


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


def status_lines(statuses: Sequence[Mapping[str, object]]) -> list[Text]:
    """One line a model: where it stands, what it takes, where it comes from."""
    rows = []
    for status in statuses:
        phase = str(status["phase"])
        style = {"Ready": "green", "Failed": "red"}.get(phase, "yellow")
        size = status["memory_mb"]
        where = f"{size:,.0f} MB on {status['device']}" if isinstance(size, float) else ""
        why = "" if phase == "Ready" else f"{status['reason']}: {status['message']}"
        rows.append(
            (
                str(status["model_id"]),
                Text(phase, style=style),
                where,
                f"from {status['source']}",
                why,
            )
        )
    return columns(rows)


def _action_row(action: Action) -> tuple[str, Text, str, str]:
    verb = Text(str(action.verb), style=_VERB_STYLE[action.verb])
    note = ""
    if action.mode is not None:
        note = _MODE_NOTE[action.mode]
    elif action.verb is Verb.ADJUST:
        note = "in place · no reload"
    elif action.source:
        note = f"from {action.source}"
    if action.after:
        note += f", after {', '.join(action.after)}"
    return (action.model_id, verb, action.detail, note)


def _forecast_line(device: DeviceForecast) -> Text:
    now, after, peak = (f"{v:,.0f}" for v in (device.now_mb, device.after_mb, device.peak_mb))
    way = f"{now} → peak {peak} → {after}" if {now, peak} != {after} else now
    return Text(f"  {device.device}  {way} of {device.budget_mb:,.0f} MB", style="dim")
