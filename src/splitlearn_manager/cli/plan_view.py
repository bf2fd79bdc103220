"""A plan as people and programs read it: what would be done, what waits, what is held back, the memory.

Pure: from a plan and the desired state that it was made for to lines and data.
"""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from splitlearn_manager.cli.guard_view import guard_lines
from splitlearn_manager.cli.render import columns, cross, meanwhile, problem_data
from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.desired.state import DesiredState
from splitlearn_manager.reconcile.actions import Action, DeviceForecast, Mode, Plan, Verb

_VERB_STYLE = {
    Verb.LOAD: "green",
    Verb.UPDATE: "cyan",
    Verb.ADJUST: "cyan",
    Verb.UNLOAD: "yellow",
    Verb.EVICT: "yellow",
    Verb.CANCEL: "yellow",
}
_MODE_NOTE = {Mode.SURGE: "surge · no downtime", Mode.RECREATE: "recreate · down while it loads"}


def problem_line(problem: Problem, desired: DesiredState) -> Text:
    """A problem, and what happens meanwhile to the models that its file declared."""
    kept = [
        (m.config.model_id, m.generation)
        for m in desired.models.values()
        if m.held and m.source.file == problem.file
    ]
    return cross(str(problem)).append(f"   ({meanwhile(problem.file, kept)})", style="dim")


def plan_lines(
    plan: Plan, desired: DesiredState, directory: Path, *, with_guard: bool = True
) -> list[Text]:
    """A plan as the lines of its table.

    Args:
        directory: for the command that is proposed.
        with_guard: whether it is told here which models the prune guard holds.
    """
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
        lines.append(cross(desired.source_message))
    lines += [problem_line(problem, desired) for problem in desired.problems]
    if with_guard and (guard := desired.prune_guard) is not None:
        lines += guard_lines(guard.digest, guard.model_ids, guard.managed, directory)
    lines += [_forecast_line(device) for device in plan.forecast]
    lines.append(Text(summary(plan, desired)))
    return lines


def summary(plan: Plan, desired: DesiredState) -> str:
    """`1 load, 1 update, 1 invalid`, or that there is nothing to do."""
    counts = [
        f"{n} {verb}"
        for verb in (Verb.LOAD, Verb.UPDATE, Verb.ADJUST, Verb.UNLOAD, Verb.EVICT, Verb.CANCEL)
        if (n := sum(action.verb is verb for action in plan.actions))
    ]
    shown = {action.model_id for action in plan.actions}
    if waiting := sum(w.model_id not in shown for w in plan.waiting):
        counts.append(f"{waiting} waiting")
    if invalid := len({problem.file for problem in desired.problems}):
        counts.append(f"{invalid} invalid")
    if desired.prune_guard is not None:
        counts.append(f"{len(desired.prune_guard.model_ids)} held by the prune guard")
    return ", ".join(counts) or "nothing to do"


def plan_data(plan: Plan, desired: DesiredState) -> dict[str, object]:
    """A plan as data."""
    guard = desired.prune_guard
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
        "prune_guard": {
            "digest": guard.digest,
            "model_ids": list(guard.model_ids),
            "managed": guard.managed,
        }
        if guard is not None
        else None,
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
