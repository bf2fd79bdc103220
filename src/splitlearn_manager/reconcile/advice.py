"""What would help a model that is not as wanted: sentences for people, the best first.

Pure. It looks at who holds the room that a model waits for, and names what would free some; for failed
loads it says what their reason asks for. It proposes; nobody carries it out but people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Wanted
from splitlearn_manager.reconcile.facts import Facts
from splitlearn_manager.reconcile.node_facts import NodeFacts
from splitlearn_manager.reconcile.record import ROLLOUTS_TAKEN_BACK

_NAMED = 4

# By the reason of a failed load.
_FIX = {
    "WeightsNotFound": "put the files there, or correct model_path: a relative one starts at the YAML file",
    "WeightsUnreadable": "let the node's user read the files",
    "TooManyFiles": "let model_path name the directory of the model alone",
    "WeightsChanged": "finish copying the files: a copy under another name, then renamed, is never half read",
    "UntrustedCheckpoint": "save it as safetensors or as a state dict, or write `trusted: true` if you trust "
    "where it comes from",
    "InvalidModel": "correct the files or the keys that describe them: the message says what does not fit",
    "CorruptCheckpoint": "copy the file again: it is cut off or damaged",
    "OverMemoryLimit": "raise max_memory_mb in its file, or use a smaller model",
    "LoadFailed": "correct what the message says; with `log_level: DEBUG` in server.yaml, which applies at "
    "once, the next try logs the whole traceback",
    "WarmupFailed": "correct config.input_shape, or the model; `warmup: false` serves it untried",
    "OutOfMemory": "lower max_memory_percent or memory_quota_mb: the device had less than its budget",
    "HubUnreachable": "bring the network back, or cache the revision on this machine",
    "RolloutFailed": "correct the version, or widen its `rollout` rules; the old one goes on serving",
    "RolloutAborted": "go back to the old version in its file, or put a better one in place",
    "GoldenMismatch": "correct the weights; if the new answers are the right ones, leave `verify.golden` out "
    "of its file until they serve, record them (`golden`), and put it back",
    "AnswersDiffer": "raise verify.max_difference if the change is meant",
    "NotFinite": "look for damaged weights; the old version goes on serving",
    "LoadTimeout": "raise load_timeout_s if the load is only slow; if its code hangs, correct that",
    "WorkerDied": "read what it printed before, in the node's log (event=WorkerOutput); if the system "
    "ended it for memory, give it more",
    "InsufficientMemory": "more memory for it: what it measured is reserved by the next try, which waits "
    "for that much room",
    "DeviceNotFound": "let `device` name one that this node has, or write `device: auto`",
}


def for_failure(facts: Facts, reason: str) -> tuple[str, ...]:
    """What would help after a load failed, or is sure to, for this reason."""
    found = [_FIX.get(reason, "correct what the message says")]
    waiting = facts.waiting
    if reason in ROLLOUTS_TAKEN_BACK and not facts.views:
        return (
            "put the weights back that served, or better ones",
            f"`retry {facts.model_id}` lets it serve as it is: there is nothing to try it beside",
        )
    if facts.failed_attempt is None:
        return tuple(found)  # no load was tried: only a change helps
    is_rollout = reason in ROLLOUTS_TAKEN_BACK
    if waiting is not None and waiting.failed and (waiting.until_s is not None or is_rollout):
        found.append(f"`retry {facts.model_id}` tries it at once")
    if facts.hung is not None:
        found.append("start the node anew: a load that hangs cannot be stopped")
    return tuple(found)


def for_memory(
    facts: Facts, wanted: Wanted, node: NodeFacts, others: Sequence[InstanceView]
) -> tuple[str, ...]:
    """What would help a model that waits for memory."""
    holders = [v for v in others if v.device in wanted.devices]
    devices = " or ".join(wanted.devices) or "its device"
    quota = f"raise memory_quota_mb of {devices}, or max_memory_percent, in server.yaml: it applies at once"
    if too_large_for_any(wanted, node):
        return (quota, "a smaller model, or its weights in a smaller dtype (`config.dtype`)")
    free = {d.device: d.budget_mb - d.reserved_mb for d in node.devices}
    return (*_room(facts, wanted, holders, free), quota, *_fewer(holders))


def for_pressure(
    facts: Facts, wanted: Wanted, node: NodeFacts, others: Sequence[InstanceView]
) -> tuple[str, ...]:
    """What would help a model that waits because others use the memory of its devices."""
    devices = " or ".join(wanted.devices) or "its device"
    holders = [v for v in others if v.device in wanted.devices]
    free = {d.device: d.limit_mb - d.reserved_mb for d in node.devices}
    return (
        f"end or shrink what else uses memory of {devices}, or give the node more: `docs/memory.md` says "
        "what counts",
        *_room(facts, wanted, holders, free),
        *_fewer(holders),
    )


def for_place(
    facts: Facts, wanted: Wanted, node: NodeFacts, others: Sequence[InstanceView]
) -> tuple[str, ...]:
    """What would help a model that waits for a place under max_models."""
    at_present = f" (it is {node.max_models})" if node.max_models else ""
    places = f"raise max_models{at_present} in server.yaml: it applies at once"
    return (*_room(facts, wanted, others), places, *_fewer(others))


def too_large_for_any(wanted: Wanted, node: NodeFacts) -> str:
    """Why it can never fit as things are; empty if it could."""
    budgets = {d.device: d.budget_mb for d in node.devices if d.device in wanted.devices}
    if not budgets or any(wanted.mb <= budget for budget in budgets.values()):
        return ""
    have = ", ".join(f"{mb:,.0f} MB on {device}" for device, mb in sorted(budgets.items()))
    return f"it needs {wanted.mb:,.0f} MB, more than all models together may take: {have}"


def _room(
    facts: Facts,
    wanted: Wanted,
    holders: Sequence[InstanceView],
    free: Mapping[str, float] | None = None,
) -> Iterator[str]:
    """What would let it displace some of those that are loaded.

    Args:
        free: MB that are free, by device; None where a place is what it waits for, not memory.
    """
    if hung := [v for v in holders if v.state is State.FAILED]:
        yield f"start the node anew: the loads of {_names(hung)} hang and keep their room"
    if late := [v for v in holders if v.state is State.UNLOADING and not v.under_way]:
        yield f"the end of the requests that former copies answer for too long already: {_names(late)}"
    if facts.serving is not None:
        # An update evicts nobody: it is not worth another model's outage.
        if wanted.spec.config.update == "surge":
            yield "write `update: auto`: then the old version goes first where both do not fit"
        return
    ready = [v for v in holders if v.state is State.READY]
    of_api = [v for v in ready if v.owner is Owner.API]
    declared = [v for v in ready if v.owner is not Owner.API]
    pinned = [v for v in declared if v.spec.config.pinned]
    mine = wanted.spec.config.priority
    higher = [v for v in declared if v not in pinned and v.spec.config.priority > mine]
    movable = [v for v in declared if v not in pinned and v not in higher]
    if free is not None and not _is_enough(wanted, movable, free):
        movable = []  # none of them goes where all of them together would not make room
    if idle := [v for v in movable if not v.leases]:
        yield f"a request for {facts.model_id}: then {_names(idle)} may make room, last used before it"
    if busy := [v for v in movable if v.leases]:
        yield f"the end of the requests that {_names(busy)} answers, and a request for {facts.model_id}"
    if higher:
        least = min(v.spec.config.priority for v in higher)
        yield f"a priority of {least} in its file (it is {mine}), as that of {_names(higher)}"
    if pinned:
        yield f"unpin what is needed less: {_names(pinned)}"
    if of_api:
        yield f"unload what was loaded through the Python API: {_names(of_api)}"


def _is_enough(wanted: Wanted, movable: Sequence[InstanceView], free: Mapping[str, float]) -> bool:
    """Whether it fits on a device once those are gone; devices of which nothing is known may do."""
    return any(
        free.get(device, wanted.mb) + sum(v.reserved_mb for v in movable if v.device == device)
        >= wanted.mb
        for device in wanted.devices
    )


def _fewer(holders: Sequence[InstanceView]) -> tuple[str, ...]:
    if any(v.owner is Owner.DIRECTORY for v in holders):
        return ("remove the file of a model that is needed less",)
    return ()


def _names(views: Sequence[InstanceView]) -> str:
    ordered = sorted(views, key=lambda v: (-v.reserved_mb, v.model_id, v.key))
    named = [f"{v.model_id} ({v.reserved_mb:,.0f} MB)" for v in ordered[:_NAMED]]
    more = len(ordered) - _NAMED
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")
