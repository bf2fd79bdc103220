"""What is asked of a node at rest: a request for a parked model, a dry run, a dry run of a change.

I17: a dry run beside the node calls nothing, and what is executed afterwards is what it said, in order.
I3: a request brings an evicted model back, where there is, or can be made, room for it.
"""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, NoReturn

from simulation.admission import Room
from simulation.machine import Broken
from simulation.models import Files, Resources
from simulation.node import Node
from simulation.script import FILES
from simulation.texts import IDS, ROOT, some_doc, text_of
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
    room = Room(taken, ledger.budgets_mb, ledger.max_models)
    desired = node.last.desired.models
    may_go = {
        i.key
        for i in node.instances
        if i.owner is Owner.DIRECTORY
        and i.state is State.READY
        and i.config.priority <= model.config.priority
        and not i.config.pinned
        and not (i.model_id in desired and desired[i.model_id].suspended)
    }
    return any(room.fits(device, wanted.mb, may_go) for device in wanted.devices)


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
        raise Broken("I17", f"a dry run at rest plans {made.actions}")


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
    foretold = [_essence(action) for action in dry_run(episode, node).actions]
    plans = episode.plans_during(4 * node.source.settle_s)
    done = [_essence(action) for action in plans[0].actions] if plans else []
    if foretold != done:
        raise Broken("I17", f"foretold were {foretold}, planned was {done}")


def _may_be_another_then(model: DesiredModel) -> bool:
    """What is held comes free in a second step; how long a model has been idle is another by then."""
    waits = model.held is not None or model.weights_problem is not None
    return waits or model.config.keep_alive_s is not None


def _essence(action: Action) -> tuple[object, ...]:
    return (action.verb, action.model_id, action.mode, action.device, action.after)
