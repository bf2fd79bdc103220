"""Who gets the room that there is, and for whom more is made: the loads of a plan.

Room goes by claim: what failed before comes last; then higher priority first; then models that requests wait
for, the longest wait first; then those that were accepted last, as others are evicted for them.

A model that requests wait for takes the place of whoever is idle and was used least recently, once that one
has had its time (`core.residency`). Two things end that patience:
- half of the time of a waiting request is over: then nobody is spared any more;
- all that it might displace are in use, and the request has waited for `PATIENCE_S`: then those that would
  go take no new requests, and go when the last one has its answer. What is in use is never evicted; but use
  that never ends would keep all others waiting until they give up. Their room is kept for it from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from splitlearn_manager.core.eviction import (
    AdmissionRequest,
    AwaitRoom,
    Decision,
    MakeRoom,
    Refused,
    Resident,
)
from splitlearn_manager.reconcile.actions import Action, Demand, Observed, Verb, Waiting, Wanted
from splitlearn_manager.reconcile.room import Room

PATIENCE_S = 1.0
"""How long a request waits for one of the models in use to be idle by itself, in seconds.

A model that is not used all the time is idle within that; one that is loses a second's worth of requests to
the wait for its return.
"""


class Filling:
    """See the module's text. `fill` is called once.

    Attributes:
        fitting: the loads that can start now, by model id.
        others: those that wait for memory, each after the evictions that it needs, in the order of claims.
        waiting: why there is no load yet, and why it waits.
        held: keys of instances that take no new requests from now on, and for which model's sake.
        due_s: when it is to be decided anew, though nothing happens before.
        awaits_idle: whether requests wait for somebody to be idle.
    """

    def __init__(self, observed: Observed, room: Room, declared: Mapping[str, Wanted]) -> None:
        self._observed = observed
        self._room = room
        self._declared = declared
        self._claims: list[Wanted] = []
        self.fitting: dict[str, Action] = {}
        self.others: list[Action] = []
        self.waiting: list[Waiting] = []
        self.held: dict[str, str] = {}
        self.due_s: list[float] = []
        self.awaits_idle = False

    def fill(self, to_load: Iterable[Wanted]) -> None:
        """Decides for all that are to be loaded."""
        self._claims = sorted(to_load, key=self._claim)
        for wanted in self._claims:
            self._place(wanted)

    def turns(self, starts: Sequence[Action]) -> tuple[str, ...]:
        """The ids of those that load in the order of their turns: first those that requests wait for.

        Args:
            starts: what can start now, in order.
        """
        asked_for = [
            w.spec.model_id
            for w in self._claims
            if self._demand(w) is not None and not self._has_failed(w)
        ]
        loading = {a.model_id for a in (*starts, *self.others) if a.takes_turn}
        rest = (a.model_id for a in (*starts, *self.others) if a.takes_turn)
        return tuple(dict.fromkeys((*(m for m in asked_for if m in loading), *rest)))

    def _claim(self, wanted: Wanted) -> tuple[bool, int, bool, float, str]:
        model_id = wanted.spec.model_id
        priority = self._declared[model_id].spec.config.priority
        demand = self._demand(wanted)
        since = demand.oldest_s if demand is not None else -wanted.accepted_s
        return (self._has_failed(wanted), -priority, demand is None, since, model_id)

    def _has_failed(self, wanted: Wanted) -> bool:
        attempt = self._observed.attempts.get(wanted.spec.model_id)
        return attempt is not None and attempt.concerns(wanted.spec)

    def _demand(self, wanted: Wanted) -> Demand | None:
        return self._observed.demands.get(wanted.spec.model_id)

    def _place(self, wanted: Wanted) -> None:
        request = self._request(wanted)
        decision = self._room.ask(request)
        if isinstance(decision, Refused):
            self._refused(wanted, request, decision)
            return
        after: tuple[str, ...] = ()
        if isinstance(decision, MakeRoom):
            self.others += [_eviction(victim, wanted) for victim in decision.victims]
            after = _ids(decision.victims)
        elif isinstance(decision, AwaitRoom):
            after = decision.freeing
        self._take(wanted, decision, decision.device)
        load = _load(wanted, decision.device, after)
        if after:
            self._wait(wanted, "AwaitingMemory", f"waits for the memory of {', '.join(after)}")
            self.others.append(load)
        else:
            self.fitting[load.model_id] = load

    def _request(self, wanted: Wanted) -> AdmissionRequest:
        spec, demand, now_s = wanted.spec, self._demand(wanted), self._observed.now_s
        spares = demand is None or now_s < demand.urgent_s
        return AdmissionRequest(
            spec.model_id,
            wanted.devices,
            wanted.mb,
            spec.config.priority,
            wanted.accepted_s,
            asked_for=demand is not None,
            spares_at_s=now_s if spares else None,
        )

    def _refused(self, wanted: Wanted, request: AdmissionRequest, refused: Refused) -> None:
        """Nobody goes for it now; it may be that somebody does in a moment."""
        now_s, demand = self._observed.now_s, self._demand(wanted)
        due_s = [self._room.not_spared_before_s(request)]
        reason, message = refused.reason, refused.message
        if demand is not None:
            self.awaits_idle = True
            patient_until_s = min(demand.oldest_s + PATIENCE_S, demand.urgent_s)
            if now_s >= patient_until_s:
                relieved = self._room.ask(replace(request, takes_busy=True))
                if isinstance(relieved, MakeRoom):
                    self._hold(wanted, relieved)
                    return
            in_time = self._room.ask(replace(request, takes_busy=True, spares_at_s=None))
            if isinstance(in_time, MakeRoom):
                due_s += [patient_until_s, demand.urgent_s]
                names = ", ".join(_ids(in_time.victims))
                reason = "AwaitingRoom"
                message = f"waits until {names} had its time and is idle"
        self.due_s += [at for at in due_s if at is not None and at > now_s]
        self._wait(wanted, reason, message)

    def _hold(self, wanted: Wanted, decision: MakeRoom) -> None:
        self.held |= dict.fromkeys((v.key for v in decision.victims), wanted.spec.model_id)
        self._take(wanted, decision, decision.device)
        names = ", ".join(_ids(decision.victims))
        message = f"waits until {names} is idle: no new requests are let to it until then"
        self._wait(wanted, "AwaitingRoom", message)

    def _take(self, wanted: Wanted, decision: Decision, device: str) -> None:
        """Nobody else is given this room, nor what goes for it."""
        if isinstance(decision, MakeRoom):
            self._room.mark_freeing(victim.key for victim in decision.victims)
        self._room.promise(wanted.spec.model_id, device, wanted.mb)

    def _wait(self, wanted: Wanted, reason: str, message: str) -> None:
        self.waiting.append(Waiting(wanted.spec.model_id, reason, message))


def _ids(victims: Collection[Resident]) -> tuple[str, ...]:
    return tuple(sorted(victim.model_id for victim in victims))


def _eviction(victim: Resident, wanted: Wanted) -> Action:
    return Action(
        Verb.EVICT,
        victim.model_id,
        f"makes room for {wanted.spec.model_id}",
        key=victim.key,
        device=victim.device,
        mb=victim.mb,
        reason="MadeRoom",
        makes_room_for=wanted.spec.model_id,
    )


def _load(wanted: Wanted, device: str, after: tuple[str, ...]) -> Action:
    size = f"{wanted.mb:,.0f} MB on {device}"
    return Action(
        Verb.LOAD,
        wanted.spec.model_id,
        size if wanted.mb else f"on {device}, its size is known once loaded",
        spec=wanted.spec,
        device=device,
        mb=wanted.mb,
        after=after,
        source=wanted.source,
    )
