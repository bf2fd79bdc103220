"""What has to be done so that the node serves what the directory declares: a pure function.

`plan(desired, observed)` compares accepted desired state with what runs and gives a `Plan`: a list of
actions in the order in which they are executed, and for every model that gets none, what it waits for.
It does nothing, reads no clock and no file, and does not depend on the order of its inputs. The
reconciler carries a plan out; the command line prints it.

How it decides, model by model, those of higher priority first:
- loaded through the Python API: left alone;
- an operation is under way on it: waits;
- served and suspended: left alone;
- served in the desired version: nothing, or `adjust` where only keys differ that are applied in place;
- served in another version: `update`: by surge if both fit at once, else by recreate;
- not served: `load`, making room by the rule of `core.eviction`; parked ones only on demand; where that
  has failed, the version that served last; where too many have failed lately, nothing;
- served, owned by the directory and no longer declared: `unload`.

Order: adjustments, updates, loads that fit now, both for models that failed before after those for
others, unloads, evictions with the loads that wait for them. Where there is not room for all loads of one
priority, it goes to the one that was asked for last, as others are evicted for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from splitlearn_manager.config.model_config import changes
from splitlearn_manager.core.eviction import (
    AdmissionRequest,
    Admitted,
    AwaitRoom,
    MakeRoom,
    Refused,
)
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import InstanceView, residents
from splitlearn_manager.errors import LoadTimeout
from splitlearn_manager.reconcile.actions import (
    PARKED,
    Action,
    Mode,
    Observed,
    Plan,
    Verb,
    Waiting,
    Wanted,
)
from splitlearn_manager.reconcile.backoff import MOST_FAILURES, WINDOW_S, Attempt
from splitlearn_manager.reconcile.forecast import forecast
from splitlearn_manager.reconcile.room import Room


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
        self._room = Room(observed.snapshot.ledger, residents(views, Owner.DIRECTORY))
        self._waiting: list[Waiting] = []
        self._due: list[float] = []

    def run(self) -> Plan:
        unloads = self._unloads()
        self._room.mark_freeing(a.key for a in unloads)
        adjusts: list[Action] = []
        starts: list[Action] = []
        waiting_loads: list[Action] = []
        ordered = sorted(
            self._desired.items(), key=lambda pair: (-pair[1].spec.config.priority, pair[0])
        )
        to_load: list[Wanted] = []
        for _, wanted in ordered:
            action = self._for_present(wanted, to_load)
            if action is not None and action.verb is Verb.ADJUST:
                adjusts.append(action)
            elif action is not None and action.verb is Verb.EVICT:
                unloads.append(action)
            elif action is not None:
                starts.append(action)
        loads: dict[str, Action] = {}
        for wanted in sorted(to_load, key=self._claim_to_room):
            for action in self._load(wanted):
                if action.after or action.verb is Verb.EVICT:
                    waiting_loads.append(action)
                else:
                    loads[action.model_id] = action
        starts += [
            loads[wanted.spec.model_id] for wanted in to_load if wanted.spec.model_id in loads
        ]
        starts.sort(key=self._is_repetition)
        actions = (*adjusts, *starts, *unloads, *waiting_loads)
        return Plan(
            actions,
            tuple(sorted(self._waiting, key=lambda w: w.model_id)),
            forecast(self._observed.snapshot.ledger, actions, self._observed.max_parallel_loads),
            min(self._due, default=None),
        )

    def _claim_to_room(self, wanted: Wanted) -> tuple[bool, int, float]:
        """Who gets room first: what others left for the latest demand is not for an earlier one."""
        spec = wanted.spec
        attempt = self._observed.attempts.get(spec.model_id)
        has_failed = attempt is not None and attempt.concerns(spec)
        priority = self._desired[spec.model_id].spec.config.priority
        return (has_failed, -priority, -wanted.demanded_s)

    def _is_repetition(self, action: Action) -> bool:
        """Whether it does what failed before: that comes last, so that it delays nothing else."""
        attempt = self._observed.attempts.get(action.model_id)
        return attempt is not None and action.spec is not None and attempt.concerns(action.spec)

    def _unloads(self) -> list[Action]:
        """Served for the directory, and declared no more."""
        return [
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

    def _operation_on(self, model_id: str) -> State | None:
        for view in self._by_id.get(model_id, ()):
            if view.state in (State.LOADING, State.UNLOADING):
                return view.state
        return None

    def _for_present(self, wanted: Wanted, to_load: list[Wanted]) -> Action | None:
        """The action on a model that is served; those that are not go to `to_load` or wait."""
        model_id = wanted.spec.model_id
        views = self._by_id.get(model_id, [])
        if any(v.owner is Owner.API for v in views):
            message = "a model of this id was loaded through the Python API"
            return self._wait(model_id, "OwnedByApi", message)
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
            action = self._update(wanted, serving)
            return action or self._park_if_idle(serving, wanted, waits=True)
        if serving.spec.spec_hash != wanted.spec.spec_hash:
            return self._adjust(wanted, serving)
        return self._park_if_idle(serving, wanted)

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

    def _adjust(self, wanted: Wanted, serving: InstanceView) -> Action | None:
        model_id = wanted.spec.model_id
        if wanted.own_limit_problem is not None:
            # What is loaded breaks the new limit, and a load of the same would break it too.
            self._waiting.append(_over_memory_limit(model_id, wanted.own_limit_problem))
            return None
        return Action(
            Verb.ADJUST,
            model_id,
            describe_changes(serving.spec, wanted.spec),
            spec=wanted.spec,
            key=serving.key,
            source=wanted.source,
        )

    def _park_if_idle(
        self, serving: InstanceView, wanted: Wanted, *, waits: bool = False
    ) -> Action | None:
        """The eviction of what was idle for keep_alive_s.

        Args:
            waits: what was noted last is why it waits for an update.
        """
        config = wanted.spec.config
        # What serves stays pinned until its update, as for making room.
        if config.keep_alive_s is None or config.pinned or serving.spec.config.pinned:
            return None
        # While it is in use, that is the earliest moment at which it can have been idle for long enough.
        busy_until_s = self._observed.now_s if serving.leases else serving.last_used_s
        idle_at = busy_until_s + config.keep_alive_s
        if serving.leases or self._observed.now_s < idle_at:
            self._due.append(idle_at)
            if not waits:
                message = f"unloaded when idle for keep_alive_s = {config.keep_alive_s:g} s"
                self._wait(serving.model_id, "KeepAlive", message, idle_at)
            return None
        if waits:
            self._waiting.pop()
        self._room.mark_freeing((serving.key,))
        return Action(
            Verb.EVICT,
            serving.model_id,
            f"idle for {config.keep_alive_s:g} s",
            key=serving.key,
            device=serving.device,
            mb=serving.reserved_mb,
            reason="Idle",
        )

    def _consider_load(self, wanted: Wanted, to_load: list[Wanted]) -> None:
        model_id = wanted.spec.model_id
        parked_s = self._observed.parked.get(model_id)
        if parked_s is not None and wanted.demanded_s <= parked_s:
            self._wait(model_id, "Evicted", PARKED)
            return
        if (limit := self._limit(model_id)) is not None:
            self._waiting.append(limit)
            return
        fallback = self._observed.fallbacks.get(model_id)
        if wanted.suspended and fallback is not None:
            # It is to stay as it is: what served when it was suspended, not what was never tried.
            self._wait(model_id, "Suspended", "the version that served last is loaded again")
            to_load.append(fallback)
            return
        why = self._why_not_load(wanted)
        if why is None:
            to_load.append(wanted)
            return
        self._waiting.append(why)
        if why.failed and fallback is not None:
            to_load.append(fallback)

    def _limit(self, model_id: str) -> Waiting | None:
        """That so many loads of the model have failed lately that none is tried, whoever asks."""
        until_s = self._observed.limited.get(model_id)
        if until_s is None or until_s <= self._observed.now_s:
            return None
        attempt = self._observed.attempts.get(model_id)
        message = (
            f"{MOST_FAILURES} loads of it failed within {WINDOW_S:g} s; no more than so many are tried, "
            "whatever asks for it"
        )
        if attempt is not None:
            message += f"; the last one: {attempt.message}"
        return Waiting(model_id, "RateLimited", message, until_s, failed=True)

    def _why_not_load(self, wanted: Wanted) -> Waiting | None:
        """Why a load of this very version is not to be tried now, whatever room there is."""
        model_id = wanted.spec.model_id
        if not wanted.weights_ready:
            if wanted.weights_problem:
                return Waiting(model_id, "WeightsNotFound", wanted.weights_problem, failed=True)
            return Waiting(model_id, "WeightsNotReady", "its files are still changing")
        if wanted.own_limit_problem is not None:
            return _over_memory_limit(model_id, wanted.own_limit_problem)
        if (limit := self._limit(model_id)) is not None:
            return limit
        attempt = self._observed.attempts.get(model_id)
        if attempt is None or not attempt.concerns(wanted.spec):
            return None
        if wanted.suspended:
            message = f"{attempt.message}; not tried again while it is suspended"
            return Waiting(model_id, attempt.reason, message, failed=True)
        views = self._by_id.get(model_id, ())
        if any(v.state is State.FAILED and attempt.concerns(v.spec) for v in views):
            # Given up, and its loader has not come back: another one would hang beside it, and
            # each of them holds a place until it returns.
            hangs = attempt.reason == LoadTimeout.__name__
            due_s = (
                attempt.retry_at_s if attempt.blocks(wanted.spec, self._observed.now_s) else None
            )
            return _after_failure(model_id, attempt, None if hangs else due_s)
        if attempt.blocks(wanted.spec, self._observed.now_s):
            return _after_failure(model_id, attempt, attempt.retry_at_s)
        return None

    def _update(self, wanted: Wanted, serving: InstanceView) -> Action | None:
        spec = wanted.spec
        attempt = self._observed.attempts.get(spec.model_id)
        setting = spec.config.update
        why = self._why_not_load(wanted)
        if why is not None and (setting == "surge" or not _is_due_later(why, attempt)):
            self._waiting.append(why)
            return None
        request = AdmissionRequest(
            spec.model_id,
            wanted.devices,
            wanted.mb,
            spec.config.priority,
            wanted.demanded_s,
            may_evict=False,
        )
        beside = self._room.ask(request)
        if setting != "recreate" and isinstance(beside, Admitted):
            if why is None:
                return self._updating(wanted, serving, Mode.SURGE, beside.device)
            self._waiting.append(why)
            return None
        if setting == "surge":
            message = (
                beside.message if isinstance(beside, Refused) else "waits for memory to come back"
            )
            reason = beside.reason if isinstance(beside, Refused) else "AwaitingMemory"
            return self._wait(spec.model_id, reason, message)
        if attempt is not None and attempt.concerns(spec):
            # Taking the old version away again for what failed once would cost an outage a try.
            self._waiting.append(_after_failure(spec.model_id, attempt, None))
            return None
        instead = self._room.ask(replace(request, replaces=serving.key))
        if isinstance(instead, Admitted):
            return self._updating(wanted, serving, Mode.RECREATE, instead.device)
        if isinstance(instead, Refused):
            return self._wait(spec.model_id, instead.reason, instead.message)
        return self._wait(spec.model_id, "AwaitingMemory", "waits for memory to come back")

    def _updating(self, wanted: Wanted, serving: InstanceView, mode: Mode, device: str) -> Action:
        spec = wanted.spec
        self._room.mark_freeing((serving.key,))
        self._room.promise(spec.model_id, device, wanted.mb)
        return Action(
            Verb.UPDATE,
            spec.model_id,
            describe_changes(serving.spec, spec),
            spec=spec,
            key=serving.key,
            device=device,
            mb=wanted.mb,
            mode=mode,
            reason="SpecChanged" if serving.spec.load_hash != spec.load_hash else "WeightsChanged",
            source=wanted.source,
        )

    def _load(self, wanted: Wanted) -> Iterable[Action]:
        """The load of a model that is not served, after the evictions that it needs."""
        spec = wanted.spec
        request = AdmissionRequest(
            spec.model_id, wanted.devices, wanted.mb, spec.config.priority, wanted.demanded_s
        )
        decision = self._room.ask(request)
        after: tuple[str, ...] = ()
        if isinstance(decision, Refused):
            self._wait(spec.model_id, decision.reason, decision.message)
            return
        if isinstance(decision, MakeRoom):
            for victim in decision.victims:
                yield Action(
                    Verb.EVICT,
                    victim.model_id,
                    f"makes room for {spec.model_id}",
                    key=victim.key,
                    device=victim.device,
                    mb=victim.mb,
                    reason="MadeRoom",
                )
            self._room.mark_freeing(v.key for v in decision.victims)
            after = tuple(sorted(v.model_id for v in decision.victims))
        elif isinstance(decision, AwaitRoom):
            after = decision.freeing
        self._room.promise(spec.model_id, decision.device, wanted.mb)
        if after:
            self._wait(
                spec.model_id, "AwaitingMemory", f"waits for the memory of {', '.join(after)}"
            )
        yield Action(
            Verb.LOAD,
            spec.model_id,
            f"{wanted.mb:,.0f} MB on {decision.device}"
            if wanted.mb
            else f"on {decision.device}, its size is known once loaded",
            spec=spec,
            device=decision.device,
            mb=wanted.mb,
            after=after,
            source=wanted.source,
        )

    def _wait(
        self, model_id: str, reason: str, message: str, until_s: float | None = None
    ) -> Action | None:
        """Notes why the model gets no action, and gives that: no action."""
        self._waiting.append(Waiting(model_id, reason, message, until_s))
        return None


def _over_memory_limit(model_id: str, problem: str) -> Waiting:
    return Waiting(model_id, "OverMemoryLimit", problem, failed=True)


def _is_due_later(why: Waiting, attempt: Attempt | None) -> bool:
    """Whether a load that failed is to be tried again at a known time."""
    return attempt is not None and why.until_s is not None and why.reason == attempt.reason


def _after_failure(model_id: str, attempt: Attempt, until_s: float | None) -> Waiting:
    return Waiting(model_id, attempt.reason, attempt.message, until_s, failed=True)


def describe_changes(old: ModelSpec, new: ModelSpec) -> str:
    """What differs between two specs, for people: `dtype float16 → bfloat16, weights changed`."""
    parts = [str(change) for change in changes(old.config, new.config)]
    if old.weights != new.weights:
        parts.append("weights changed")
    return ", ".join(parts) or "nothing a person could see"
