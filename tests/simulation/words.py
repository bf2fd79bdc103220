"""What the product's values are called in a trace and in a message: short, for people."""

from __future__ import annotations

from collections.abc import Iterable

from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.reconcile.actions import Action, Plan


def action_words(action: Action) -> str:
    mode = f" by {action.mode}" if action.mode else ""
    return f"{action.verb}{mode} {action.model_id} ({action.detail})"


def actions_words(actions: Iterable[Action]) -> str:
    return "; ".join(action_words(action) for action in actions) or "nothing"


def plan_words(made: Plan | None) -> str:
    if made is None:
        return "no plan was made"
    waiting = "; ".join(f"{w.model_id}: {w.reason}, {w.message}" for w in made.waiting)
    return f"planned: {actions_words(made.actions)}; waiting: {waiting or 'nothing'}"


def model_words(model: DesiredModel | None) -> str:
    if model is None:
        return "nothing"
    held = f", held: {model.held}" if model.held is not None else ""
    return f"generation {model.generation} from {model.source}{held}"


def spec_words(spec: ModelSpec | None) -> str:
    return "nothing" if spec is None else f"generation {spec.generation}"
