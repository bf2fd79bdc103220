"""Bugs in the manager, in admission and eviction, and in what serves requests."""

from __future__ import annotations

import builtins
import dataclasses
from typing import Any

from mutants.mutant import Mutant, instead
from simulation.patching import patched
from splitlearn_manager.core import eviction, rollout
from splitlearn_manager.core.events import EventKind
from splitlearn_manager.core.eviction import Admitted
from splitlearn_manager.core.instance_work import InstanceWork
from splitlearn_manager.core.instances import Instances
from splitlearn_manager.core.ledger import Ledger, Shortfall
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.reconcile import plan
from splitlearn_manager.reconcile.actions import Action
from splitlearn_manager.reconcile.room import Room
from splitlearn_manager.reconcile.updating import Updates
from splitlearn_manager.reconcile.wanting import Wishes


def _accepts_what_was_given_up(real: Any) -> Any:
    def ready(self: Any, instance: Any, running: Any, spec: Any) -> Any:
        if instance.state is State.FAILED:
            instance.state = State.LOADING
        return real(self, instance, running, spec)

    return ready


def _frees_memory_at_once(real: Any) -> Any:
    def begin_unload(self: Any, *arguments: Any, **options: Any) -> Any:
        instance = real(self, *arguments, **options)
        if instance is not None:
            self._ledger = self._ledger.without((instance.key,))
        return instance

    return begin_unload


def _surge_is_free(real: Any) -> Any:
    def ask(self: Any, request: Any) -> Any:
        if not request.may_evict and request.replaces is None:
            return Admitted(request.devices[0])
        return real(self, request)

    return ask


def _adds_a_surge_uncounted(real: Any) -> Any:
    def add(self: Any, spec: Any, owner: Any, device: str, mb: float) -> Any:
        if spec.model_id not in self._current:
            return real(self, spec, owner, device, mb)
        with self._lock, patched(Ledger, "reserve", Ledger.promise):
            self._refuse_if_occupied(spec.model_id)
            added = self._add(spec, owner, device, mb)
        self._on_change()
        return added

    return add


def _abort_promotes(real: Any) -> Any:
    def judged(self: Any, *rest: Any) -> Any:
        verdict, why = real(self, *rest)
        back = verdict is rollout.Verdict.TAKE_BACK
        return (rollout.Verdict.TAKE_OVER if back else verdict), why

    return judged


def _judged_with(**changes: Any) -> Any:
    def make(real: Any) -> Any:
        return lambda config, now: real(config, dataclasses.replace(now, **changes))

    return make


def _as_if(**changes: Any) -> Any:
    """Residents of whom something that keeps them is not known."""

    def make(real: Any) -> Any:
        def residents(views: Any, *rest: Any) -> Any:
            seen = [dataclasses.replace(v, **changes.get("view", {})) for v in views]
            if changes.get("unpinned"):
                seen = [
                    dataclasses.replace(
                        v,
                        spec=dataclasses.replace(
                            v.spec, config=v.spec.config.model_copy(update={"pinned": False})
                        ),
                    )
                    for v in seen
                ]
            return real(seen, *rest)

        return residents

    return make


def _backwards(of: Any, key: Any = None) -> Any:
    return builtins.sorted(of, key=key, reverse=key is not None)


def _takes_all_that_may_go(
    ledger: Any, device: str, request: Any, residents: Any
) -> tuple[Any, ...] | None:
    going = tuple(r for r in residents if eviction.may_displace(request, r))
    missing = ledger.without(r.key for r in going).shortfall(device, request.mb)
    return going if going and not missing else None


def _whoever_is_idle(request: Any, resident: Any) -> bool:
    return resident.evictable and resident.model_id != request.model_id


def _idle_and_not_above(request: Any, resident: Any) -> bool:
    return _whoever_is_idle(request, resident) and resident.priority <= request.priority


def _with_nothing_parked(real: Any) -> Any:
    def init(self: Any, desired: Any, observed: Any) -> None:
        real(self, desired, dataclasses.replace(observed, parked={}))

    return init


def _demanded_for_ever(real: Any) -> Any:
    def make(self: Any, model: Any, devices: Any) -> Any:
        return dataclasses.replace(real(self, model, devices), accepted_s=1e12)

    return make


def _takes_api_models_for_its_own(real: Any) -> Any:
    def unloads(self: Any) -> Any:
        views = self._views
        self._views = tuple(dataclasses.replace(v, owner=Owner.DIRECTORY) for v in views)
        found = real(self)
        self._views = views
        return found

    return unloads


def _does_not_recheck(real: Any) -> Any:
    def begin_unload(self: Any, model_id: str, reason: str, **options: Any) -> Any:
        kept = {name: value for name, value in options.items() if name == "successor"}
        return real(self, model_id, reason, **kept)

    return begin_unload


def _closes_what_is_in_use(self: Any, instance: Any) -> bool:
    with self._lock:
        if instance.state is not State.UNLOADING or instance.close_started:
            return False
        instance.close_started = True
        return True


def _drains_before_it_switches(real: Any) -> Any:
    def add(self: Any, spec: Any, owner: Any, device: str, mb: float) -> Any:
        added = real(self, spec, owner, device, mb)
        if added is not None and self._current.pop(spec.model_id, None) is not None:
            with self._lock:
                self._publish()
            self._on_change()
        return added

    return add


def _routes_to_what_loads(real: Any) -> Any:
    def add(self: Any, spec: Any, owner: Any, device: str, mb: float) -> Any:
        added = real(self, spec, owner, device, mb)
        if added is not None and spec.model_id not in self._current:
            with self._lock:
                self._current[spec.model_id] = added
                self._publish()
        return added

    return add


def _leaves_what_it_has_read(real: Any) -> Any:
    def discard(self: Any, instance: Any, running: Any) -> None:
        real(self, instance, None)

    return discard


def _a_close_that_raises_is_no_close(self: Any, instance: Any, running: Any) -> None:
    if running is not None:
        try:
            running.close()
        except Exception:
            return
    following = self._instances.gone(instance)
    if instance.ready_since_s is not None:
        self.report(EventKind.UNLOADED, instance, instance.unload_reason, "unloaded")
    if following is not None:
        self.load(following)


def _recreates(real: Any) -> Any:
    def update(self: Any, wanted: Any, serving: Any) -> Any:
        config = wanted.spec.config.model_copy(update={"update": "recreate"})
        spec = dataclasses.replace(wanted.spec, config=config)
        found = real(self, dataclasses.replace(wanted, spec=spec), serving)
        is_action = isinstance(found, Action)
        return dataclasses.replace(found, spec=wanted.spec) if is_action else found

    return update


def _always_room(real: Any) -> Any:
    def add(self: Any, spec: Any, owner: Any, device: str, mb: float) -> Any:
        with patched(Ledger, "shortfall", lambda self, device, mb: Shortfall(0, 0.0)):
            return real(self, spec, owner, device, mb)

    return add


MUTANTS = (
    Mutant(
        "a hung load is never given up",
        "schedulers with a stuck LOADING: the slot and the memory are gone until a restart",
        lambda: [(InstanceWork, "_give_up", lambda self, instance: None)],
    ),
    Mutant(
        "the late result of a load that was given up is accepted",
        "time-outs that only stop waiting: the zombie comes back and serves beside its successor",
        lambda: [instead(Instances, "ready", _accepts_what_was_given_up)],
    ),
    Mutant(
        "a reservation is returned before its memory is",
        "bookkeeping on unload's beginning: the next load meets a device that is still full",
        lambda: [
            instead(Instances, "begin_unload", _frees_memory_at_once),
            (Ledger, "release", lambda self, key: self.without((key,))),
        ],
    ),
    Mutant(
        "memory is not returned after an unload",
        "frameworks that keep their pools: the books say full, and nothing is loaded any more",
        lambda: [(Ledger, "release", lambda self, key: self)],
    ),
    Mutant(
        "what a failed load has read stays in memory",
        "error paths without a close: each failed attempt leaks a model",
        lambda: [instead(InstanceWork, "_discard", _leaves_what_it_has_read)],
    ),
    Mutant(
        "an instance whose close raises is never gone",
        "stuck Terminating: a finalizer that failed once",
        lambda: [(InstanceWork, "_close", _a_close_that_raises_is_no_close)],
    ),
    Mutant(
        "room is not looked at again when a load begins",
        "admission by an old snapshot: two loads are let into the same room",
        lambda: [instead(Instances, "add", _always_room)],
    ),
    Mutant(
        "a rollout is skipped",
        "progressive delivery that is configured, and not done for this kind of change",
        lambda: [(InstanceWork, "_tries", lambda self, instance, read: False)],
    ),
    Mutant(
        "a rollout never ends",
        "a canary that nobody looks at any more: two versions for good",
        lambda: [(rollout, "judge", lambda config, now: (rollout.Verdict.GO_ON, ""))],
    ),
    Mutant(
        "what was aborted takes over",
        "a rollback button that is wired to the wrong side",
        lambda: [instead(rollout.Trial, "judged", _abort_promotes)],
    ),
    Mutant(
        "a shadow's answers decide nothing",
        "traffic mirroring that nobody looks at",
        lambda: [instead(rollout, "judge", _judged_with(worst=0.0))],
    ),
    Mutant(
        "a rollout of a suspended model goes on",
        "a pause button that stops new deployments, and not the one that is under way",
        lambda: [instead(rollout, "judge", _judged_with(paused=False))],
    ),
    Mutant(
        "updates always take the old version away first",
        "stop, then start: an outage for each deployment, whatever room there is",
        lambda: [instead(Updates, "of", _recreates)],
    ),
    Mutant(
        "idle models are never parked",
        "scale-to-zero that never gets to zero",
        lambda: [(plan._Planner, "_park_if_idle", lambda self, serving, wanted, waits=False: None)],
    ),
    Mutant(
        "the copy that a surge loads is not counted",
        "rolling updates with maxSurge on a full node: out of memory in the middle of a deployment",
        lambda: [
            instead(Room, "ask", _surge_is_free),
            instead(Instances, "add", _adds_a_surge_uncounted),
        ],
    ),
    Mutant(
        "max_models is not looked at",
        "limits checked in one place of two",
        lambda: [
            (
                Ledger,
                "shortfall",
                lambda self, device, mb: Shortfall(0, max(0.0, mb - self.free_mb(device))),
            )
        ],
    ),
    Mutant(
        "pinned models are evicted",
        "caches in which pinning is a hint",
        lambda: [instead(plan, "residents", _as_if(unpinned=True))],
    ),
    Mutant(
        "models in use are evicted",
        "model servers that unload by last arrival: a long request loses its model",
        lambda: [
            instead(plan, "residents", _as_if(view={"leases": 0})),
            instead(Instances, "begin_unload", _does_not_recheck),
        ],
    ),
    Mutant(
        "models of higher priority are evicted",
        "plain LRU under priorities",
        lambda: [(eviction, "may_displace", _whoever_is_idle)],
    ),
    Mutant(
        "the most recently used goes first",
        "a comparison the wrong way round",
        lambda: [(eviction, "sorted", _backwards)],
    ),
    Mutant(
        "more is evicted than is needed",
        "make-room loops that free everything they may",
        lambda: [(eviction, "_victims", _takes_all_that_may_go)],
    ),
    Mutant(
        "evicted models come back without a request",
        "swap thrash: two models that fit one at a time take turns for ever",
        lambda: [
            instead(plan._Planner, "__init__", _with_nothing_parked),
            (eviction, "may_displace", _idle_and_not_above),
        ],
    ),
    Mutant(
        "models of the Python API are pruned",
        "controllers that own whatever they find: a manual object is garbage to them",
        lambda: [instead(plan._Planner, "_unloads", _takes_api_models_for_its_own)],
    ),
    Mutant(
        "an action is not checked again when it is executed",
        "plans executed against a world that has moved on: what was idle is in use by now",
        lambda: [instead(Instances, "begin_unload", _does_not_recheck)],
    ),
    Mutant(
        "an instance is closed under its requests",
        "drain by time-out only: use after free",
        lambda: [(Instances, "claim_close", _closes_what_is_in_use)],
    ),
    Mutant(
        "the old version leaves before the new one serves",
        "updates called rolling that have a gap",
        lambda: [instead(Instances, "add", _drains_before_it_switches)],
    ),
    Mutant(
        "requests are routed to what still loads",
        "readiness taken from the process, not from the model",
        lambda: [instead(Instances, "add", _routes_to_what_loads)],
    ),
    Mutant(
        "demands of long ago count for ever",
        "a queue entry that is never taken off: whoever once waited displaces everybody",
        lambda: [instead(Wishes, "_make", _demanded_for_ever)],
    ),
)
