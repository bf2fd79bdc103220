"""What is asked of a node at rest: requests, one for a parked model among them, dry runs, the status.

I17: a dry run beside the node calls nothing, and what is executed afterwards is what it said, in order.
I19: use of what serves swaps nothing.
I3: a request brings an evicted model back, where there is, or can be made, room for it.
"""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any, NoReturn

from simulation.admission import Room
from simulation.machine import Broken
from simulation.models import Files, Resources, activations_of, sizes_mb, weights_now
from simulation.node import Node
from simulation.pressure import limits_mb
from simulation.script import FILES
from simulation.texts import IDS, ROOT, some_doc, text_of
from simulation.words import actions_words
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.reconcile.actions import Action, Plan
from splitlearn_manager.reconcile.observation import from_json, to_json
from splitlearn_manager.reconcile.reconciler import Reconciler

if TYPE_CHECKING:
    from simulation.episode import Episode


class _Forbidden:
    """Runtime and executor of a dry run."""

    def start(self, *arguments: object) -> NoReturn:
        raise Broken("I17", f"a dry run starts {arguments}")


def play_epilogue(episode: Episode) -> None:
    """Raises Broken."""
    rng = Random(f"{episode.settings.seed}/epilogue")
    node = episode.node
    assert node is not None
    _status_can_be_told(node)
    _use_swaps_nothing(episode, node)
    _request_brings_back(episode, node)
    assert node.last is not None
    desired = node.last.desired
    # Of an id that was never accepted nobody else can know that a file declared it which is broken now.
    if rng.random() < 0.3 and not desired.conflicts and not desired.problems:
        _dry_run_of_nothing(episode, node)
        _dry_run_of_a_change(episode, node, rng)


def _status_can_be_told(node: Node) -> None:
    status = node.loop.status
    json.dumps([status.node(), status.models()])
    for described in status.models():
        if status.explain(str(described["model_id"])) is None:
            raise Broken("I18", f"{described['model_id']} is described and cannot be explained")


def _use_swaps_nothing(episode: Episode, node: Node) -> None:
    """I19: requests for models that serve load nothing and evict nobody."""
    serving = sorted(node.manager.table.by_model)
    own_time = {i.model_id for i in node.instances if i.config.keep_alive_s is not None}
    own_time |= set(node.loop._memory.attempts)
    if not serving:
        return
    done = len(episode.done)
    for _ in range(2):
        for model_id in serving:
            if model_id in node.manager.table.by_model:
                node.request(model_id, 0.5, 1.0)
        episode.let_pass(2.0)
    for verb, model_id, mode, detail in episode.done[done:]:
        if not own_time & {model_id, str(detail).removeprefix("makes room for ")}:
            words = f"{verb}{f' by {mode}' if mode else ''} {model_id} ({detail})"
            raise Broken("I19", f"only models that serve are used, and {words}")
    episode.come_to_rest()


def _request_brings_back(episode: Episode, node: Node) -> None:
    for model_id in sorted(node.loop._memory.parked):
        if not _could_be_brought_back(node, model_id):
            continue
        episode.machine.tell("world", f"a request for {model_id}, which is parked")
        request = node.request(model_id, 0.0, 30.0)
        episode.let_pass(31.0)
        if request.ended != "answered":
            raise Broken("I3", f"a request for {model_id}, which is parked: {request.ended}")
        episode.come_to_rest()
        return


def _could_be_brought_back(node: Node, model_id: str) -> bool:
    """It can be loaded, and has room once all go that may go for it."""
    assert node.last is not None
    model = node.last.desired.models.get(model_id)
    wanted = node.loop._wanted.get(model_id)
    if model is None or wanted is None or model_id in node.loop._memory.attempts:
        return False
    if any(i.model_id == model_id for i in node.instances):
        return False
    fails = model.config.config.kwargs.get("fail") is not None
    if model.suspended or fails or model.weights_problem or not wanted.weights_ready:
        return False
    if wanted.own_limit_problem:
        return False
    ledger = node.manager._instances._ledger
    taken = {key: (r.device, r.mb) for key, r in ledger.reservations.items()}
    room = Room(taken, limits_mb(ledger), ledger.max_models)
    desired = node.last.desired.models
    may_go = {i.key for i in node.instances if _may_go(i, desired.get(i.model_id), model)}
    if _turns_out_mb(node, model) > wanted.mb:
        return False  # the load finds that out, and fails if no more than the estimate was free
    return any(room.fits(device, wanted.mb, may_go) for device in wanted.devices)


def _turns_out_mb(node: Node, model: DesiredModel) -> float:
    """What a load will measure, whatever was estimated."""
    data = weights_now(node.machine, model.config) or b""
    sizes, activations = sizes_mb(data), activations_of(data)
    forward_mb = activations.mb(model.config.batch_size) if activations is not None else 0.0
    return sizes[1] + forward_mb if sizes is not None else 0.0


def _may_go(instance: Any, declared: DesiredModel | None, newcomer: DesiredModel) -> bool:
    """Priority and pinned count as they are declared now, whichever version serves."""
    config = declared.config if declared is not None else instance.config
    if instance.owner is not Owner.DIRECTORY or instance.state is not State.READY:
        return False
    if config.pinned or instance.config.pinned or (declared is not None and declared.suspended):
        return False
    return bool(config.priority <= newcomer.config.priority)


def dry_run(episode: Episode, node: Node) -> Plan:
    """The plan that the command line would print beside the node."""
    machine = episode.machine
    observed = from_json(to_json(node.loop.observe()))
    manager = ModelManager(
        max_models=node.manager._instances._ledger.max_models,
        resources=Resources(node.resources.budgets_mb()),
        runtime=_Forbidden(),
        files=Files(machine),
        clock=node.clock,
        executor=_Forbidden(),
    )
    source = DesiredSource(
        ROOT,
        machine.fs,
        node.source.settle_s,
        prune_guard_percent=node.source.prune_guard_percent,
    )
    loop = Reconciler(source, manager, node.clock, max_parallel_loads=node.loop.max_parallel_loads)
    written = dict(machine.state.held)
    _, made = loop.preview(node.source.settle_s, observed)
    if machine.state.held != written:
        raise Broken("I17", "a dry run writes state files")
    return made


def _dry_run_of_nothing(episode: Episode, node: Node) -> None:
    made = dry_run(episode, node)
    if made.actions:
        raise Broken("I17", f"a dry run at rest plans: {actions_words(made.actions)}")


def _dry_run_of_a_change(episode: Episode, node: Node, rng: Random) -> None:
    assert node.last is not None
    models = node.last.desired.models
    if any(_may_be_another_then(model) for model in models.values()):
        return
    for model_id in episode.settings.ids:
        if rng.random() < 0.6:
            text = text_of([some_doc(rng, model_id, ("v", "priority", "pinned", "update"))])
            episode.machine.tell("world", f"writes {FILES[IDS.index(model_id)]}: {text}")
            episode.world.directory.write(FILES[IDS.index(model_id)], text.data)
    if not episode.world.directory.by_hand:
        episode.machine.fast_forward()
    made = dry_run(episode, node)
    foretold = [_essence(action) for action in made.actions]
    episode.checks.watch_memory()
    before = len(episode.done)
    plans = episode.plans_during(4 * node.source.settle_s)
    if any(w.until_s is not None and w.until_s <= node.clock.now() for w in made.waiting):
        return  # a time that it waits for has come meanwhile, which is another plan
    done = [_essence(action) for action in plans[0].actions] if plans else []
    if foretold != done:
        raise Broken("I17", f"foretold were {_told(foretold)}, planned was {_told(done)}")
    _memory_went_as_foretold(episode, node, made, before)


def _memory_went_as_foretold(episode: Episode, node: Node, made: Plan, before: int) -> None:
    """I17: the peaks and the ends that were printed, and those that came, are the same.

    Where loads measure what was reserved for them: what nobody can know beforehand is not foretold. And
    where nothing else is done than what was foretold.
    """
    checks = episode.checks
    episode.come_to_rest()
    done = [(verb, model_id) for verb, model_id, *_ in episode.done[before:]]
    if done != [(a.verb, a.model_id) for a in made.actions] or checks.surprises:
        return
    for foretold in made.forecast:
        device = foretold.device
        came = (checks.peak_mb.get(device, 0.0), checks.last_used.get(device, 0.0))
        if max(abs(foretold.peak_mb - came[0]), abs(foretold.after_mb - came[1])) > 1e-6:
            message = (
                f"on {device} {foretold.peak_mb:g} MB were foretold at most, then {foretold.after_mb:g}, "
                f"and there were {came[0]:g}, then {came[1]:g}"
            )
            raise Broken("I17", message)


def _told(essences: list[tuple[object, ...]]) -> str:
    return "; ".join(" ".join(str(e) for e in found if e) for found in essences) or "nothing"


def _may_be_another_then(model: DesiredModel) -> bool:
    """What is held comes free in a second step; how long a model has been idle is another by then."""
    waits = model.held is not None or model.weights_problem is not None
    return waits or model.config.keep_alive_s is not None


def _essence(action: Action) -> tuple[object, ...]:
    return (action.verb, action.model_id, action.mode, action.device, action.after)
