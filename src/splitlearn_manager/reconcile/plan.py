"""What has to be done so that the node serves what the directory declares: a pure function.

`plan(desired, observed)` compares accepted desired state with what runs and gives a `Plan`: a list of
actions in the order in which they are executed, and for every model that gets none, what it waits for.
It does nothing, reads no clock and no file, and does not depend on the order of its inputs. The
reconciler carries a plan out; the command line prints it.

How it decides, model by model, those that are to reserve less first, then those of higher priority:
- loaded through the Python API: left alone;
- an operation is under way on it: waits;
- served and suspended: left alone;
- served in the desired version: nothing, or `adjust` where only keys differ that are applied in place;
- served in another version: `update`: by surge if both fit at once, else by recreate;
- not served: `load`, making room by the rule of `core.eviction`; parked ones only while requests wait for
  them; where that has failed, the version that served last; where too many have failed lately, nothing;
- served, owned by the directory and no longer declared: `unload`.

Where others have taken the memory of a device, idle models go by the rule of `core.relief`, whoever waits
for room, and nothing is loaded there before that is over.

Order: adjustments, updates, loads that fit now, both for models that failed before after those for
others, unloads, evictions with the loads that wait for them. Who gets the room, and in which order loads
are given turns, `filling` says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import inf

from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import InstanceView, residents
from splitlearn_manager.reconcile.actions import (
    PARKED,
    RELIEF_SHOWS_S,
    Action,
    Observed,
    Plan,
    Verb,
    Waiting,
    Wanted,
)
from splitlearn_manager.reconcile.filling import Filling
from splitlearn_manager.reconcile.forecast import forecast
from splitlearn_manager.reconcile.parking import park_if_idle
from splitlearn_manager.reconcile.room import Room
from splitlearn_manager.reconcile.tries import Tries, over_memory_limit
from splitlearn_manager.reconcile.updating import Updates, describe_changes


def plan(desired: Mapping[str, Wanted], observed: Observed) -> Plan:
    """See the module's text."""
    return _Planner(desired, observed).run()


class _Planner:
    """The state of one planning: the room as it will be, and the lists that become the plan."""

    def __init__(self, desired: Mapping[str, Wanted], observed: Observed) -> None:
        self._desired = desired
        self._observed = observed
        views = observed.snapshot.instances
        self._views = views
        self._by_id: dict[str, list[InstanceView]] = {}
        for view in views:
            self._by_id.setdefault(view.model_id, []).append(view)
        awaited = observed.demands.keys()
        self._room = Room(observed.snapshot.ledger, residents(views, Owner.DIRECTORY, awaited))
        self._tries = Tries(observed, self._by_id)
        self._updates = Updates(desired, observed, self._by_id, self._room, self._tries)
        self._waiting: list[Waiting] = []
        self._due: list[float] = []
        self._short: list[tuple[Wanted, InstanceView]] = []
        self._former: dict[str, ModelSpec] = {}  # what is loaded first, as it served last

    def run(self) -> Plan:
        unloads = self._unloads()
        self._room.mark_freeing(a.key for a in unloads)
        adjusts: list[Action] = []
        starts: list[Action] = []
        ordered = sorted(
            self._desired.values(),
            key=lambda w: (not self._gives_back(w), -w.spec.config.priority, w.spec.model_id),
        )
        to_load: list[Wanted] = []
        for wanted in ordered:
            action = self._for_present(wanted, to_load)
            if action is not None and action.verb is Verb.ADJUST:
                adjusts.append(action)
            elif action is not None and action.verb is Verb.EVICT:
                unloads.append(action)
            elif action is not None:
                starts.append(action)
        unloads += self._relieve()
        loads = Filling(self._observed, self._room, self._desired)
        loads.fill(to_load)
        fitting = (loads.fitting.get(wanted.spec.model_id) for wanted in to_load)
        starts += [action for action in fitting if action is not None]
        starts.sort(key=self._is_repetition)
        adjusts += self._complete({a.key for a in (*unloads, *loads.others)})
        actions = (*adjusts, *starts, *unloads, *loads.others)
        return Plan(
            actions,
            tuple(sorted(self._all_waiting(loads.waiting), key=lambda w: w.model_id)),
            forecast(self._observed.snapshot.ledger, actions, self._observed.max_parallel_loads),
            min((*self._due, *loads.due_s), default=None),
            turns=loads.turns(starts),
            held=loads.held,
            awaits_idle=loads.awaits_idle,
        )

    def _all_waiting(self, for_room: Sequence[Waiting]) -> list[Waiting]:
        """Who waits and why; of a model whose former version comes first, what that one waits for."""
        of_former = {w.model_id: w for w in for_room if w.model_id in self._former}
        waiting = [w for w in (*self._waiting, *for_room) if w.model_id not in of_former]
        for model_id, room in of_former.items():
            generation = self._former[model_id].generation
            message = f"generation {generation}, which served last, is loaded first: {room.message}"
            waiting.append(replace(room, message=message))
        return waiting

    def _complete(self, going: Collection[str | None]) -> list[Action]:
        """What is left goes to those that stay and reserve less than they were measured to take."""
        return [
            replace(
                self._adjustment(wanted, serving, mb), detail=f"reserves {mb:,.0f} MB, as measured"
            )
            for wanted, serving in self._short
            if serving.key not in going
            and self._room.resize(serving.key, mb := _mb_with(serving.spec, serving))
        ]

    def _is_repetition(self, action: Action) -> bool:
        """Whether it does what failed before: that comes last, so that it delays nothing else."""
        attempt = self._observed.attempts.get(action.model_id)
        return attempt is not None and action.spec is not None and attempt.concerns(action.spec)

    def _unloads(self) -> list[Action]:
        """Served or tried for the directory, and declared no more."""
        cancels = [
            self._cancel(view, "no file declares it")
            for view in sorted(self._views, key=lambda v: v.model_id)
            if view.trial and view.model_id not in self._desired
        ]
        return cancels + [
            Action(
                Verb.UNLOAD,
                view.model_id,
                "no file declares it",
                key=view.key,
                device=view.device,
                mb=view.reserved_mb,
                reason="Pruned",
            )
            for view in sorted(self._views, key=lambda v: v.model_id)
            if view.owner is Owner.DIRECTORY
            and view.state is State.READY
            and view.model_id not in self._desired
            and not self._operation_on(view.model_id)
        ]

    def _relieve(self) -> list[Action]:
        """Who goes because others have taken the memory: one on each device, until its memory is back."""
        ledger, now_s = self._observed.snapshot.ledger, self._observed.now_s
        busy = {v.key for v in self._views if v.leases}
        gone: list[Action] = []
        for device in ledger.pressed:
            if ledger.excess_mb(device) <= 0:
                # Nothing says how much is missing: what went last has to show its effect first.
                due_s = max(self._observed.parked.values(), default=-inf) + RELIEF_SHOWS_S
                if now_s < due_s:
                    self._due.append(due_s)
                    continue
            victim = self._room.first_to_go(device, busy)
            if victim is None:
                continue
            self._room.mark_freeing((victim.key,))
            gone.append(
                Action(
                    Verb.EVICT,
                    victim.model_id,
                    f"others have taken the memory of {device}",
                    key=victim.key,
                    device=device,
                    mb=victim.mb,
                    reason="MemoryPressure",
                )
            )
        return gone

    def _operation_on(self, model_id: str) -> State | None:
        for view in self._by_id.get(model_id, ()):
            if view.under_way:
                return view.state
        return None

    def _for_present(self, wanted: Wanted, to_load: list[Wanted]) -> Action | None:
        """The action on a model that is served; those that are not go to `to_load` or wait."""
        model_id = wanted.spec.model_id
        views = self._by_id.get(model_id, [])
        if any(v.owner is Owner.API for v in views):
            message = "a model of this id was loaded through the Python API"
            return self._wait(model_id, "OwnedByApi", message)
        if (tried := next((v for v in views if v.trial), None)) is not None:
            return self._tried(wanted, tried)
        if (state := self._operation_on(model_id)) is not None:
            names = {State.LOADING: "Loading", State.UNLOADING: "Unloading"}
            return self._wait(model_id, names[state], "an operation on it is under way")
        serving = next((v for v in views if v.state is State.READY), None)
        if serving is None:
            self._consider_load(wanted, to_load)
            return None
        self._value(serving, wanted)
        if wanted.suspended:
            return self._leave(serving)
        if serving.spec.version != wanted.spec.version:
            # One that waits for its update is parked when idle like any other.
            update = self._updates.of(wanted, serving)
            if isinstance(update, Action):
                return update
            self._waiting.append(update)
            return self._park_if_idle(serving, wanted, waits=True)
        if not _is_said_of(serving, wanted):
            return self._adjust(wanted, serving)
        if serving.reserved_mb < _mb_with(serving.spec, serving):
            self._short.append((wanted, serving))
        return self._park_if_idle(serving, wanted)

    def _tried(self, wanted: Wanted, tried: InstanceView) -> Action | None:
        """A new version is tried beside the one that serves."""
        if tried.spec.version != wanted.spec.version or wanted.spec.config.rollout is None:
            self._room.mark_freeing((tried.key,))
            return self._cancel(tried, "another version is wanted by now")
        if wanted.own_limit_problem is not None:
            # A load of it would fail by that, and so it must not take over.
            self._room.mark_freeing((tried.key,))
            return self._cancel(tried, wanted.own_limit_problem)
        if not _is_said_of(tried, wanted):
            return self._adjustment(wanted, tried, tried.reserved_mb)
        message = f"{self._name(tried)} is tried: {tried.trial}"
        return self._wait(wanted.spec.model_id, "RollingOut", message)

    def _cancel(self, tried: InstanceView, why: str) -> Action:
        return Action(
            Verb.CANCEL,
            tried.model_id,
            f"the rollout of {self._name(tried)}: {why}",
            key=tried.key,
            device=tried.device,
            mb=tried.reserved_mb,
            reason="RolloutSuperseded",
        )

    def _name(self, tried: InstanceView) -> str:
        views = self._by_id.get(tried.model_id, ())
        served = next((v.spec for v in views if v.state is State.READY), None)
        return tried.spec.named_beside(served)

    def _value(self, serving: InstanceView, wanted: Wanted) -> None:
        """Who goes for others is decided by what is wanted now, whichever version serves."""
        before, now = serving.spec.config, wanted.spec.config
        if now.priority != before.priority or (now.pinned and not before.pinned):
            self._room.value(serving.key, now.priority, pinned=now.pinned)

    def _leave(self, serving: InstanceView) -> Action | None:
        """Nothing happens to a suspended model, an eviction included."""
        self._room.keep(serving.key, "suspended")
        message = f"stays as it is until `resume {serving.model_id}`"
        return self._wait(serving.model_id, "Suspended", message)

    def _gives_back(self, wanted: Wanted) -> bool:
        """Whether what serves is to reserve less: as adjustments come first, others have that room."""
        return any(
            v.state is State.READY
            and v.spec.version == wanted.spec.version
            and _mb_with(wanted.spec, v) < v.reserved_mb
            for v in self._by_id.get(wanted.spec.model_id, ())
        )

    def _adjust(self, wanted: Wanted, serving: InstanceView) -> Action | None:
        model_id = wanted.spec.model_id
        if wanted.own_limit_problem is not None:
            # What is loaded breaks the new limit, and a load of the same would break it too.
            self._waiting.append(over_memory_limit(model_id, wanted.own_limit_problem))
            return None
        mb = _mb_with(wanted.spec, serving)
        if not self._room.resize(serving.key, mb):
            if mb <= _mb_with(serving.spec, serving):
                return self._adjustment(wanted, serving, serving.reserved_mb)
            message = (
                f"batches of {wanted.spec.config.batch_size} need {mb - serving.reserved_mb:,.0f} MB more "
                f"on {serving.device}, which are not free"
            )
            return self._wait(model_id, "InsufficientMemory", message)
        return self._adjustment(wanted, serving, mb)

    def _adjustment(self, wanted: Wanted, serving: InstanceView, mb: float) -> Action:
        return Action(
            Verb.ADJUST,
            wanted.spec.model_id,
            _adjusted(serving.spec, wanted.spec),
            spec=wanted.spec,
            key=serving.key,
            device=serving.device,
            mb=mb,
            source=wanted.source,
        )

    def _park_if_idle(
        self, serving: InstanceView, wanted: Wanted, *, waits: bool = False
    ) -> Action | None:
        """The eviction of what was idle for keep_alive_s.

        Args:
            waits: what was noted last is why it waits for an update.
        """
        if not waits and serving.model_id in self._observed.demands:
            return None  # those that waited for it come to it in a moment, however short its keep_alive_s
        found = park_if_idle(serving, wanted, self._observed.now_s)
        if isinstance(found, Action):
            if waits:
                self._waiting.pop()
            self._room.mark_freeing((serving.key,))
            return found
        if found is not None:
            self._due.append(found)
            if not waits:
                keep_alive_s = wanted.spec.config.keep_alive_s
                message = f"unloaded when idle for keep_alive_s = {keep_alive_s:g} s"
                self._wait(serving.model_id, "KeepAlive", message, found)
        return None

    def _consider_load(self, wanted: Wanted, to_load: list[Wanted]) -> None:
        model_id = wanted.spec.model_id
        parked_s = self._observed.parked.get(model_id)
        is_asked_for = model_id in self._observed.demands
        if parked_s is not None and not is_asked_for and wanted.accepted_s <= parked_s:
            self._wait(model_id, "Evicted", PARKED)
            return
        if (limit := self._tries.limit(model_id)) is not None:
            self._waiting.append(limit)
            return
        fallback = self._observed.fallbacks.get(model_id)
        if wanted.suspended and fallback is not None:
            # It is to stay as it is: what served when it was suspended, not what was never tried.
            self._wait(model_id, "Suspended", "the version that served last is loaded again")
            self._former[model_id] = fallback.spec
            to_load.append(fallback)
            return
        why = self._tries.why_not(wanted)
        if why is None and wanted.spec.config.rollout is not None and fallback is not None:
            message = "the version that served last is loaded first; the new one is tried beside it"
            self._wait(model_id, "RolloutPending", message)
            self._former[model_id] = fallback.spec
            to_load.append(fallback)
            return
        if why is None:
            to_load.append(wanted)
            return
        self._waiting.append(why)
        if why.failed and fallback is not None:
            to_load.append(fallback)

    def _wait(
        self, model_id: str, reason: str, message: str, until_s: float | None = None
    ) -> Action | None:
        """Notes why the model gets no action, and gives that: no action."""
        self._waiting.append(Waiting(model_id, reason, message, until_s))
        return None


def _mb_with(spec: ModelSpec, serving: InstanceView) -> float:
    """What is to be reserved for what serves, with that spec: larger batches take more beside the weights."""
    measured = serving.measured
    return serving.reserved_mb if measured is None else measured.total_mb(spec.config.batch_size)


def _is_said_of(view: InstanceView, wanted: Wanted) -> bool:
    """Whether it has the very spec that is wanted: the same keys, of the same generation. An edit that is
    taken back leaves the keys as they were, in a newer one."""
    had, now = view.spec, wanted.spec
    return (had.spec_hash, had.generation) == (now.spec_hash, now.generation)


def _adjusted(old: ModelSpec, new: ModelSpec) -> str:
    if old.spec_hash == new.spec_hash:
        return f"as it was, now as generation {new.generation}"
    return describe_changes(old, new)
