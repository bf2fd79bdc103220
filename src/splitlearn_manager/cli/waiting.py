"""When what `wait` and `apply` wait for is reached, and when it cannot be.

Pure: from what a node says of itself and its models to a verdict. A verdict that something cannot be
reached is given only where nothing is under way that may change it: no try that is due, no file that
has yet to settle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from splitlearn_manager.cli.data import Data, mapping, mappings, texts
from splitlearn_manager.cli.render import problem_text


class Goal(StrEnum):
    """What can be waited for."""

    READY = "ready"
    SYNCED = "synced"
    GONE = "gone"


class Outcome(StrEnum):
    """Where something stands."""

    REACHED = "reached"
    WAITING = "waiting"
    HELD = "held"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Verdict:
    """Where all of it stands: the worst of all models' outcomes, with a line for each that is not there.

    `because` lists what keeps it from being reached, as `MODEL: why`.
    """

    outcome: Outcome
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a node said at one moment.

    Attributes:
        models: the models that are asked about: those that were named, or all.
        named: ids that were named; empty if all models are meant.
    """

    node: Data
    models: Sequence[Data]
    named: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether something in the directory has yet to settle: what is declared may be another soon."""
        return bool(self.node.get("pending"))

    @property
    def missing(self) -> tuple[str, ...]:
        known = {model["model_id"] for model in self.models}
        return tuple(model_id for model_id in self.named if model_id not in known)


def judge(goal: Goal, report: Report) -> Verdict:
    """Where the goal of `wait` stands."""
    if goal is Goal.GONE:
        return _gone(report)
    step = _ready if goal is Goal.READY else _synced
    declared = [model for model in report.models if model.get("owner") != "api" or report.named]
    steps = [step(model, report) for model in declared]
    steps += [(Outcome.IMPOSSIBLE, _why_missing(model_id, report)) for model_id in report.missing]
    return _combined(steps, report)


def judge_apply(report: Report) -> Verdict:
    """Where `apply` stands: everything as declared, as far as the node is to do it.

    A parked model counts as done, since it comes back when it is asked for; so does a suspended one.
    """
    steps = [_applied(model, report) for model in report.models]
    steps += [
        (Outcome.IMPOSSIBLE, problem_text(problem))
        for problem in mappings(report.node.get("problems"))
    ]
    if not report.node.get("source_available", True):
        steps.append((Outcome.IMPOSSIBLE, str(report.node.get("source_message"))))
    return _combined(steps, report)


Step = tuple[Outcome, str]


def _combined(steps: Sequence[Step], report: Report) -> Verdict:
    """The verdict on all: as long as anything moves, the wait goes on."""
    moving = [why for outcome, why in steps if outcome is Outcome.WAITING]
    stuck = [why for outcome, why in steps if outcome is Outcome.IMPOSSIBLE]
    held = [why for outcome, why in steps if outcome is Outcome.HELD]
    if report.pending:
        return Verdict(Outcome.WAITING, (*moving, *stuck, *held))
    if stuck:
        return Verdict(Outcome.IMPOSSIBLE, tuple(stuck))
    if moving:
        return Verdict(Outcome.WAITING, (*moving, *held))
    return Verdict(Outcome.HELD, tuple(held)) if held else Verdict(Outcome.REACHED)


def _ready(model: Data, report: Report) -> Step:
    current = model.get("observed_generation") == model.get("generation")
    if model.get("phase") == "Ready" and current:
        return (Outcome.REACHED, "")
    if model.get("suspended"):
        return (Outcome.IMPOSSIBLE, _say(model, _suspended(model)))
    return _under_way(model)


def _synced(model: Data, report: Report) -> Step:
    if model.get("sync") == "Synced":
        return (Outcome.REACHED, "")
    if not report.node.get("source_available", True):
        return (Outcome.WAITING, _say(model, str(report.node.get("source_message"))))
    if model.get("held"):
        return (Outcome.IMPOSSIBLE, _say(model, str(model["held"])))
    return _under_way(model)


def _applied(model: Data, report: Report) -> Step:
    guarded = _guarded(report.node)
    if model.get("owner") == "api" or model.get("suspended") or model.get("sync") == "Synced":
        return (Outcome.REACHED, "")
    if model["model_id"] in guarded:
        return (Outcome.HELD, _say(model, "the prune guard holds it"))
    if model.get("held"):
        return (Outcome.IMPOSSIBLE, _say(model, str(model["held"])))
    if model.get("phase") == "Evicted":
        return (Outcome.REACHED, "")
    return _under_way(model)


def _gone(report: Report) -> Verdict:
    guarded = _guarded(report.node)
    for model in report.models:
        if model["model_id"] in guarded:
            why = "the prune guard holds it until somebody confirms (see `status`)"
            return Verdict(Outcome.IMPOSSIBLE, (_say(model, why),))
        if model.get("suspended"):
            return Verdict(Outcome.IMPOSSIBLE, (_say(model, _suspended(model)),))
    left = tuple(f"{model['model_id']}: it is {model.get('phase')}" for model in report.models)
    return Verdict(Outcome.WAITING, left) if left else Verdict(Outcome.REACHED)


def _under_way(model: Data) -> Step:
    """A model that is not there: still on its way, or failed for good."""
    if model.get("failed_for_good"):
        return (Outcome.IMPOSSIBLE, _say(model, _reason(model)))
    state = f"it is {model.get('phase')}"
    if model.get("phase") == "Ready":  # in an older generation, or by a file that is not followed
        state = f"generation {model.get('observed_generation')} serves"
    return (Outcome.WAITING, _say(model, state + _colon(_reason(model))))


def _reason(model: Data) -> str:
    said = [str(model[key]) for key in ("reason", "message") if model.get(key)]
    return ": ".join(part for part in said if part != model.get("phase"))


def _say(model: Data, why: str) -> str:
    return f"{model['model_id']}: {why}"


def _suspended(model: Data) -> str:
    return f"it is suspended; `resume {model['model_id']}` lets it go on"


def _colon(text: str) -> str:
    return f" ({text})" if text else ""


def _guarded(node: Data) -> frozenset[str]:
    return frozenset(texts(mapping(node.get("prune_guard")).get("model_ids")))


def _why_missing(model_id: str, report: Report) -> str:
    """It may be declared in a file that is not accepted, or more than once."""
    places = texts(mapping(report.node.get("conflicts")).get(model_id))
    if places:
        return f"{model_id}: it is declared more than once ({' and '.join(places)}); keep one"
    files = sorted({str(p.get("file")) for p in mappings(report.node.get("problems"))})
    maybe = f", unless one of those that are not accepted does: {', '.join(files)}" if files else ""
    return f"{model_id}: no file declares it{maybe}"
