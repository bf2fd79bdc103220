"""What must be true once all faults are over and nothing happens any more.

What is desired follows from the files alone, where no doubt is left (`_desired_as_declared`); what serves
follows from what is desired, where it can be loaded and has room (`_serves_as_desired`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulation.admission import Room
from simulation.machine import Broken
from simulation.models import weights_now
from simulation.node import Node
from simulation.oracle import meaning_of
from simulation.pressure import check_others_are_gone, limits_mb
from simulation.words import model_words, plan_words, spec_words
from splitlearn_manager.config.model_source import fingerprint, resolve_source
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.desired.state import DesiredModel, DesiredState
from splitlearn_manager.errors import SplitlearnError

if TYPE_CHECKING:
    from simulation.episode import Episode


NO_WEIGHTS = "no weights"
FAILS = "its loads fail for good"
CANNOT = "it cannot be loaded"
_FAILED = (NO_WEIGHTS, FAILS, CANNOT)


def check_rest(episode: Episode) -> None:
    """Raises Broken."""
    node = episode.node
    assert node is not None
    assert node.last is not None
    desired = node.last.desired
    if not desired.source_available or not desired.complete or desired.undecided:
        raise Broken("I3", f"the directory is there, and not known yet; {_doubt(desired)}")
    for model_id in sorted({*episode.settings.ids, *desired.models}):
        _desired_as_declared(episode, desired, model_id)
    _nothing_leaked(node)
    check_others_are_gone(node)
    for model_id, model in desired.models.items():
        _serves_as_desired(episode, node, model_id, model)
    for instance in node.instances:
        if instance.owner is Owner.DIRECTORY and instance.model_id not in desired.models:
            raise Broken("I3", f"{instance!r} serves, and is not desired")


def _doubt(desired: DesiredState) -> str:
    there = "there" if desired.source_available else "away"
    return f"to the node it is {there}, complete: {desired.complete}, undecided: {[*desired.undecided]}"


def check_seen(episode: Episode) -> None:
    """I4: what changed last is known, though no event told of it. Raises Broken."""
    node = episode.node
    assert node is not None
    assert node.last is not None
    try:
        for model_id in sorted({*episode.settings.ids, *node.last.desired.models}):
            _desired_as_declared(episode, node.last.desired, model_id)
    except Broken as broken:
        raise Broken("I4", f"after a while without events: {broken.message}") from None


def _desired_as_declared(episode: Episode, desired: DesiredState, model_id: str) -> None:
    """I15: where the files leave no doubt, they alone decide."""
    oracle = episode.oracle
    declared: list[tuple[str, str]] = []
    doubtful = []
    for name, history in oracle.truth.files.items():
        value = history.value
        if isinstance(value, bytes):
            said = meaning_of(name, value)
            declared += [(name, spec) for spec in said.specs.get(model_id, ())]
            if said.faulty and not said.specs.get(model_id):
                doubtful.append(name)
        elif value is not None:
            doubtful.append(name)
    model = desired.models.get(model_id)
    if model is not None and model.suspended:
        return
    if len(declared) > 1:
        if model_id not in desired.conflicts:
            raise Broken("I15", f"{model_id} is declared by {declared}, and that is no conflict")
    elif len(declared) == 1 and not doubtful:
        name, spec = declared[0]
        if model is None or model.spec_hash != spec or model.held is not None:
            raise Broken("I15", f"{name} declares {model_id}, and accepted is {model_words(model)}")
    elif not declared and not doubtful and model is not None:
        guard = desired.prune_guard
        if guard is None or model_id not in guard.model_ids:
            raise Broken("I15", f"no file declares {model_id}, and desired is {model_words(model)}")


def _nothing_leaked(node: Node) -> None:
    """I5: each instance is in memory once, holds its reservation, and nothing else does."""
    ready = [i for i in node.instances if i.state is State.READY]
    others = [i for i in node.instances if i.state is not State.READY]
    if others:
        raise Broken("I3", f"{others} at rest")
    keys = sorted(i.key for i in ready)
    in_memory = sorted(running.key for running in node.lab.open)
    if in_memory != keys:
        raise Broken("I5", f"{in_memory} are in memory, {keys} are READY")
    held = sorted(node.manager._instances._ledger.reservations)
    if held != keys:
        raise Broken("I10", f"{held} hold reservations, {keys} are READY")
    ids = [i.model_id for i in ready]
    if len(ids) != len(set(ids)):
        raise Broken("I5", f"loaded twice: {ids}")
    known = {*(node.last.desired.models if node.last else ()), *ids}
    memory = node.loop._memory
    for book in (memory.attempts, memory.parked, memory.served, memory.waiters.at(0.0)):
        if not book.keys() <= known:
            raise Broken("I5", f"remembered of models that nobody knows: {sorted(book)}")


def _serves_as_desired(episode: Episode, node: Node, model_id: str, model: DesiredModel) -> None:
    """I3: what can be loaded and has room serves, as it was declared, from the files as they are."""
    instances = [i for i in node.instances if i.model_id == model_id]
    if model.suspended or any(i.owner is Owner.API for i in instances):
        return
    serving = instances[0] if instances else None
    if serving is not None and _is_current(serving, model):
        _is_made_of_what_it_says(episode, serving)
        return
    excuse = _excuse(episode, node, model_id, model, serving)
    if excuse in _FAILED and serving is None:
        _the_old_one_would_serve(episode, node, model_id, model)
    if excuse is None:
        raise Broken(
            "I3",
            f"{model_id} is desired at generation {model.generation}, and "
            f"{spec_words(serving.spec if serving is not None else None)} serves; "
            f"{plan_words(node.last.plan if node.last else None)}",
        )


def _is_current(serving: Any, model: DesiredModel) -> bool:
    same_weights = model.weights in (None, serving.spec.weights)
    return serving.spec.spec_hash == model.spec_hash and same_weights


def _the_old_one_would_serve(
    episode: Episode, node: Node, model_id: str, model: DesiredModel
) -> None:
    """I11: where the new version cannot be loaded, the one that served last serves, if it can."""
    good = episode.checks.good.get(model_id)
    if good is None or good.load_hash == model.load_hash or _was_parked(episode, model_id, model):
        return
    try:
        if (
            fingerprint(resolve_source(good.config, episode.machine.fs), episode.machine.fs)
            != good.weights
        ):
            return
        mb = node.manager.size_mb(good)
    except SplitlearnError:
        return
    ledger = node.manager._instances._ledger
    taken = {key: (r.device, r.mb) for key, r in ledger.reservations.items()}
    room = Room(taken, limits_mb(ledger), ledger.max_models)
    if any(room.fits(device, mb, ()) for device in node.manager.devices_for(good.config)):
        raise Broken(
            "I11",
            f"generation {model.generation} of {model_id} cannot be loaded, generation "
            f"{good.generation} served last and could, and nothing serves",
        )


def _was_parked(episode: Episode, model_id: str, model: DesiredModel) -> bool:
    """It was evicted, and nobody has asked for it since, nor declared another version."""
    evicted_at = episode.checks.evicted.get(model_id)
    return evicted_at is not None and model.accepted_at <= evicted_at


def _excuse(
    episode: Episode, node: Node, model_id: str, model: DesiredModel, serving: Any
) -> str | None:
    """Why it may not serve as desired; None if it should."""
    if model.weights is None or model.weights_problem is not None:
        return NO_WEIGHTS
    if model.config.config.kwargs.get("fail") is not None:
        return FAILS
    if serving is None and _was_parked(episode, model_id, model):
        return "parked"
    wanted = node.loop._wanted[model_id]
    if not wanted.weights_ready or wanted.own_limit_problem is not None:
        return CANNOT
    attempt = node.loop._memory.attempts.get(model_id)
    failed = attempt is not None and attempt.concerns(wanted.spec)
    if failed and attempt is not None and attempt.retry_at_s is None:
        return FAILS
    if serving is None and model.config.rollout is not None:
        # The version that served last comes first: what is new is tried beside it.
        found = node.loop._found
        wanted = found.observed.fallbacks.get(model_id, wanted) if found is not None else wanted
    ledger = node.manager._instances._ledger
    taken = {key: (r.device, r.mb) for key, r in ledger.reservations.items()}
    room = Room(taken, limits_mb(ledger), ledger.max_models)
    update = model.config.update if model.config.rollout is None else "surge"
    if failed and serving is not None and update == "recreate":
        return "tried in the place of what serves, which would have to go for each further try"
    instead = set()
    if serving is not None and update != "surge" and not failed:
        instead = {serving.key}
    if not any(room.fits(device, wanted.mb, instead) for device in wanted.devices):
        return "no room"
    return None


def _is_made_of_what_it_says(episode: Episode, serving: Any) -> None:
    running = serving.running
    if running.config.load_hash() != serving.spec.load_hash:
        raise Broken("I18", f"{serving!r} was loaded from another config than it says")
    now = weights_now(episode.machine, serving.config)
    if now is None:
        return
    if running.made_of != now:
        raise Broken("I3", f"{serving!r} serves {running.made_of!r}, its files hold {now!r}")
