"""Whether a plan still stands: nothing that it was made from is another, so making it anew would give it.

Requests alone change what an instance shows (its last use, its leases) all the time. Of that a plan
depends on one thing: whether somebody is idle who may be evicted, for a model that waits for room or
because others have taken the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from splitlearn_manager.core.ledger import Ledger
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.core.snapshot import InstanceView, Snapshot
from splitlearn_manager.desired.state import DesiredState
from splitlearn_manager.reconcile.actions import Demand, Plan, Wanted

_FOR_ROOM = frozenset({"InsufficientMemory", "MaxModels", "MemoryPressure"})


@dataclass(frozen=True, slots=True)
class Basis:
    """What a plan is made from, requests that are answered aside.

    Attributes:
        desired: without when to look again, which says nothing of what is desired.
        revision: of what the loop remembers.
        demands: the requests that wait for models.
    """

    desired: DesiredState
    ledger: Ledger
    instances: tuple[tuple[object, ...], ...]
    revision: int
    max_parallel_loads: int
    demands: Mapping[str, Demand]


def basis_of(
    desired: DesiredState,
    snapshot: Snapshot,
    revision: int,
    max_parallel_loads: int,
    demands: Mapping[str, Demand],
) -> Basis:
    instances = tuple(
        (v.key, v.state, v.spec, v.owner, v.device, v.reserved_mb, v.drain_overdue, v.trial)
        for v in snapshot.instances
    )
    lasting = replace(desired, next_check_s=None)
    return Basis(lasting, snapshot.ledger, instances, revision, max_parallel_loads, demands)


class Standing:
    """A plan, with what it was made from."""

    def __init__(
        self, made: Plan, basis: Basis, wanted: Mapping[str, Wanted], snapshot: Snapshot
    ) -> None:
        self._made = made
        self._basis = basis
        self._wanted = wanted
        due = [w.until_s for w in made.waiting if w.until_s is not None]
        self._due_s = min((*due, *(() if made.due_s is None else (made.due_s,))), default=None)
        waiting = [wanted[w.model_id] for w in made.waiting if w.reason in _FOR_ROOM]
        self._priority = max((w.spec.config.priority for w in waiting), default=None)
        self._accepted_s = max((w.accepted_s for w in waiting), default=0.0)
        self._idle = self._making_room(snapshot)

    @property
    def due_s(self) -> float | None:
        """When something that the plan waits for ends by itself, on the manager's clock."""
        return self._due_s

    def holds(self, basis: Basis, snapshot: Snapshot, now_s: float) -> bool:
        """Whether the plan made anew would be the same, and has nothing left to start."""
        return basis == self._basis and self._is_still_so(snapshot, now_s)

    def plan_for(
        self, wanted: Mapping[str, Wanted], basis: Basis, snapshot: Snapshot, now_s: float
    ) -> Plan | None:
        """The plan, if it would be the same for these; None if it is to be made anew.

        The directory may say something that changes nothing of what is wanted, such as that a file is
        being edited.
        """
        if wanted is not self._wanted or replace(basis, desired=self._basis.desired) != self._basis:
            return None
        return self._made if self._is_still_so(snapshot, now_s) else None

    def _is_still_so(self, snapshot: Snapshot, now_s: float) -> bool:
        return (
            not self._made.actions
            and (self._due_s is None or now_s < self._due_s)
            and self._making_room(snapshot) == self._idle
        )

    def _making_room(self, snapshot: Snapshot) -> frozenset[str]:
        """Who is idle and might go, for one of those that wait for room or under pressure."""
        pressed = snapshot.ledger.pressed
        if self._priority is None and not pressed and not self._made.awaits_idle:
            return frozenset()
        return frozenset(
            v.key for v in snapshot.instances if self._may_go(v, self._priority, pressed)
        )

    def _may_go(self, view: InstanceView, priority: int | None, pressed: Collection[str]) -> bool:
        if view.state is not State.READY or view.leases:
            return False
        if view.device in pressed or self._made.awaits_idle:
            return True
        if priority is None:
            return False
        return view.spec.config.priority < priority or view.last_used_s < self._accepted_s
