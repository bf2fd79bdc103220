"""`wait` and `apply`: they ask the node again whenever something has changed, until the goal is reached.

When it is reached, and when it cannot be, is decided in `waiting`. Both first have the node look at its
directory, so that what was written before the command was typed counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Annotated

import typer

from splitlearn_manager.cli.app import (
    ERROR,
    Directory,
    Format,
    Seconds,
    ServerFile,
    Targets,
    fail,
)
from splitlearn_manager.cli.data import mapping, number, texts
from splitlearn_manager.cli.finding import RunningNode, find_node, split_targets
from splitlearn_manager.cli.node_commands import models_in, unknown_model
from splitlearn_manager.cli.render import Output, print_data, print_lines
from splitlearn_manager.cli.waiting import Goal, Outcome, Report, Verdict, judge, judge_apply

NOT_REACHED = 1

_LONGEST_ASK_S = 30.0
# A verdict that ends the wait without success must hold for so long.
_CONFIRM_S = 0.3
_SHOWN = 8


def wait(
    targets: Targets = None,
    goal: Annotated[
        Goal,
        typer.Option(
            "--for",
            metavar="ready|synced|gone",
            help="ready: the accepted generation serves; synced: it is what the files say; "
            "gone: no such model exists any more.",
        ),
    ] = Goal.READY,
    timeout: Seconds = 600.0,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Wait until models are ready, synced or gone.

    Those that are named are meant, or all.

    Exit code 0: reached, 1: timed out, 2: it cannot be reached (failed for good, no such model, held
    back, the node ended), or there is no node.
    """
    ids, directory = split_targets(targets or [])
    if goal is Goal.GONE and not ids:
        fail("--for gone: expected the ids of the models that are to go")
    node = find_node(directory, server_config)
    found = _until(node, ids, lambda report: judge(goal, report), timeout)
    _report_wait(found, node, goal, timeout, output)


def apply(
    directory: Directory = None,
    confirm_prune: Annotated[
        str | None,
        typer.Option(
            "--confirm-prune",
            metavar="DIGEST",
            help="Let those models go that the prune guard holds; the digest names exactly these.",
        ),
    ] = None,
    timeout: Seconds = 600.0,
    server_config: ServerFile = None,
    output: Format = Output.TABLE,
) -> None:
    """Have the node look at once, and wait until all is as the files say.

    First the plan is shown that the node carries out.

    Exit code 0: all is as the files say, 1: not in time, or the prune guard holds models, 2: error (a
    file is not accepted, a load failed for good, there is no node).
    """
    from splitlearn_manager.cli.plan_view import plan_data, plan_lines
    from splitlearn_manager.cli.planning import last_good_settings, preview_beside

    node = find_node(directory, server_config)
    if confirm_prune is not None:
        guard = mapping(_until(node, (), _guard_is_known, timeout).report.node.get("prune_guard"))
        if guard.get("digest") != confirm_prune:
            node.ask("confirm_prune", digest=confirm_prune)  # it says why not
    settings = last_good_settings(node, server_config)
    desired, made = preview_beside(node, settings, confirm_prune or "")
    if output is Output.TABLE:
        print_lines(plan_lines(made, desired, node.directory, with_guard=False))
        sys.stdout.flush()
    if confirm_prune is not None:
        answer = node.ask("confirm_prune", digest=confirm_prune)
        if output is Output.TABLE:
            print(answer.get("message"), flush=True)
    found = _until(node, (), judge_apply, timeout)
    _report_apply(found, node, timeout, output, plan_data(made, desired))


@dataclass(frozen=True)
class _Found:
    """How a wait ended; `timed_out` if the verdict still was to wait."""

    verdict: Verdict
    report: Report

    @property
    def timed_out(self) -> bool:
        return self.verdict.outcome is Outcome.WAITING


def _until(
    node: RunningNode, ids: tuple[str, ...], judged: Callable[[Report], Verdict], timeout_s: float
) -> _Found:
    """Asks until the verdict is no longer to wait, or the time is over."""
    from splitlearn_manager.cli.terminal import Waiting

    end = monotonic() + timeout_s
    node.ask("look", wait_s=max(1.0, timeout_s))
    doubted: Outcome | None = None
    with Waiting() as shown:
        while True:
            answer = node.ask("status", brief=True, **({"models": list(ids)} if ids else {}))
            report = Report(mapping(answer.get("node")), models_in(answer), ids)
            verdict = judged(report)
            final = verdict.outcome is Outcome.REACHED or verdict.outcome is doubted
            left_s = end - monotonic()
            if verdict.outcome is not Outcome.WAITING and final:
                return _Found(verdict, report)
            if left_s <= 0:
                return _Found(verdict, report)
            waits = verdict.outcome is Outcome.WAITING
            doubted = None if waits else verdict.outcome
            shown.say(verdict.because)
            pause_s = min(left_s, _LONGEST_ASK_S if waits else _CONFIRM_S)
            node.ask("wait_change", turn=number(answer.get("turn")), wait_s=pause_s)


def _guard_is_known(report: Report) -> Verdict:
    """The wait for a guard to be there, or for the certainty that there is none."""
    known = report.node.get("prune_guard") is not None or not report.pending
    return Verdict(Outcome.REACHED if known else Outcome.WAITING)


def _report_wait(
    found: _Found, node: RunningNode, goal: Goal, timeout_s: float, output: Output
) -> None:
    verdict, report = found.verdict, found.report
    if output is not Output.TABLE:
        data = {"for": str(goal), "outcome": _outcome(found), "because": list(verdict.because)}
        print_data({**data, "models": list(report.models)}, output)
    because = _listed(verdict)
    if verdict.outcome is Outcome.REACHED:
        if output is Output.TABLE:
            print(f"{_which(report)} {goal}")
        return
    if found.timed_out:
        fail(f"not {goal} within {timeout_s:g} s:{because}", NOT_REACHED)
    conflicts = mapping(report.node.get("conflicts"))
    if report.missing and goal is not Goal.GONE and report.missing[0] not in conflicts:
        because += f"\n  {unknown_model(node, report.missing[0])}"
    fail(f"cannot become {goal} as things are:{because}", ERROR)


def _report_apply(
    found: _Found, node: RunningNode, timeout_s: float, output: Output, plan: dict[str, object]
) -> None:
    from splitlearn_manager.cli.guard_view import guard_lines

    verdict, report = found.verdict, found.report
    guard = mapping(report.node.get("prune_guard"))
    if output is not Output.TABLE:
        data = {"plan": plan, "outcome": _outcome(found), "because": list(verdict.because)}
        print_data(
            {**data, "prune_guard": dict(guard) or None, "models": list(report.models)}, output
        )
    elif verdict.outcome is Outcome.REACHED:
        print(_done(report))
    elif guard:
        ids = texts(guard.get("model_ids"))
        managed = int(number(guard.get("managed")))
        print_lines(guard_lines(str(guard.get("digest")), ids, managed, node.directory))
        sys.stdout.flush()
    if verdict.outcome is Outcome.REACHED:
        return
    if verdict.outcome is Outcome.HELD:
        fail("not all is as the files say: the prune guard waits for you", NOT_REACHED)
    if found.timed_out:
        fail(f"not all is as the files say within {timeout_s:g} s:{_listed(verdict)}", NOT_REACHED)
    fail(f"not all can be as the files say:{_listed(verdict)}", ERROR)


def _outcome(found: _Found) -> str:
    return "timeout" if found.timed_out else str(found.verdict.outcome)


def _listed(verdict: Verdict) -> str:
    shown = "".join(f"\n  {line}" for line in verdict.because[:_SHOWN])
    more = len(verdict.because) - _SHOWN
    return shown + (f"\n  and {more} more" if more > 0 else "")


def _which(report: Report) -> str:
    if report.named:
        return f"{', '.join(report.named)}:"
    count = len(report.models)
    return f"{'1 model' if count == 1 else f'all {count} models' if count else 'no models'}:"


def _done(report: Report) -> str:
    """What of all that is declared is as declared, and what is left as it is on purpose."""
    aside = [
        f"{len(ids)} {name} ({', '.join(ids[:_SHOWN])})"
        for name, ids in (
            ("suspended", [str(m["model_id"]) for m in report.models if m.get("suspended")]),
            (
                "evicted until asked for",
                [str(m["model_id"]) for m in report.models if m.get("phase") == "Evicted"],
            ),
        )
        if ids
    ]
    count = len([m for m in report.models if m.get("owner") != "api"])
    models = "1 model" if count == 1 else f"{count} models"
    return f"all is as the files say: {models}" + "".join(f", {text}" for text in aside)
