"""The conditions of the node itself, from its facts, in words for people. Pure."""

from __future__ import annotations

import shlex

from splitlearn_manager.reconcile.conditions import Row
from splitlearn_manager.reconcile.node_facts import NodeFacts

_IDS_NAMED = 5


def node_conditions(node: NodeFacts) -> tuple[Row, ...]:
    """SourceAvailable, Watching, StateKept, PruneGuard, MemoryPressure, RestartRequired and Settled, in
    this order."""
    return (
        _source_available(node),
        _watching(node),
        _state_kept(node),
        _prune_guard(node),
        _memory_pressure(node),
        _restart_required(node),
        _settled(node),
    )


def _source_available(node: NodeFacts) -> Row:
    kind = "SourceAvailable"
    if not node.info.directory:
        return Row(kind, "True", "NoDirectory", "models come from the Python API alone")
    if not node.source_available:
        what = node.source_message or f"{node.info.directory} cannot be read"
        text = f"{what}; everything stays as it is; bring the directory back, mounted and readable"
        return Row(kind, "False", "SourceUnavailable", text)
    if node.source_message:
        text = f"{node.source_message}; what it may declare stays as it is"
        return Row(kind, "True", "PartlyUnreadable", text)
    return Row(kind, "True", "Available", f"{node.info.directory} can be read")


def _watching(node: NodeFacts) -> Row:
    kind, mode = "Watching", node.info.watch_mode
    if mode == "none":
        return Row(kind, "False", "NoDirectory", "there is no directory to watch")
    if mode == "polling":
        why = f": {node.info.watch_reason}" if node.info.watch_reason else ""
        text = f"changes are found by looking at the directory every resync_s seconds{why}"
        return Row(kind, "False", "Polling", text)
    return Row(kind, "True", "Watching", f"changes are reported by {mode}")


def _state_kept(node: NodeFacts) -> Row:
    kind = "StateKept"
    if node.state_problem:
        text = f"{node.state_problem}; until that is over a restart knows no newer last good specs"
        return Row(kind, "False", "StateNotKept", text)
    if not node.info.state_dir:
        return Row(kind, "Unknown", "NoStateDir", "nothing is kept over a restart")
    return Row(kind, "True", "Kept", f"what must survive a restart is in {node.info.state_dir}")


def _prune_guard(node: NodeFacts) -> Row:
    kind, guard = "PruneGuard", node.prune_guard
    if guard is None:
        return Row(kind, "False", "NothingHeld", "")
    named = ", ".join(guard.model_ids[:_IDS_NAMED])
    more = len(guard.model_ids) - _IDS_NAMED
    text = (
        f"no file declares {len(guard.model_ids)} of {guard.managed} models any more ({named}"
        f"{f' and {more} more' if more > 0 else ''}); none of them is unloaded; put their files back, or "
        f"confirm with `apply {shlex.quote(node.info.directory)} --confirm-prune {guard.digest}`"
    )
    return Row(kind, "True", "AwaitsConfirmation", text)


def _memory_pressure(node: NodeFacts) -> Row:
    kind = "MemoryPressure"
    short, less = [], []
    for use in node.devices:
        if use.ceiling is None:
            continue
        where = f"{use.device}: {use.ceiling}"
        if use.excess_mb > 0:
            short.append(f"{where}, and models hold {use.excess_mb:,.0f} MB more than is left")
        elif use.ceiling.stalled:
            short.append(f"{where}, and processes stand still because memory is short")
        elif use.limit_mb < use.budget_mb:
            less.append(
                f"{where}, so models may take {use.limit_mb:,.0f} of their {use.budget_mb:,.0f} MB"
            )
    if short:
        text = "; ".join((*short, "idle models go, one at a time, and loads wait until it is over"))
        return Row(kind, "True", "MemoryTaken", text)
    if less:
        return Row(kind, "False", "BudgetReduced", "; ".join(less))
    return Row(kind, "False", "EnoughMemory", "")


def _restart_required(node: NodeFacts) -> Row:
    kind, keys = "RestartRequired", node.info.restart_required
    if not keys:
        return Row(kind, "False", "UpToDate", "")
    text = f"server.yaml has new values of {', '.join(keys)}; the old ones hold until the node restarts"
    return Row(kind, "True", "SettingsChanged", text)


def _settled(node: NodeFacts) -> Row:
    kind = "Settled"
    if node.settled:
        return Row(kind, "True", "Settled", "nothing is under way, and nothing unsettled")
    if not node.complete:
        return Row(
            kind, "False", "FirstLook", "the directory has not been seen and settled once yet"
        )
    return Row(
        kind, "False", "InProgress", "something is under way or about to be, or is still changing"
    )
