"""Updates of what serves: by surge if both versions fit at once, else by recreate; pure.

Where a version has failed, the one before it serves, and is not taken away for another try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from splitlearn_manager.config.model_config import changes
from splitlearn_manager.core.eviction import AdmissionRequest, Admitted, Refused
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.reconcile.actions import Action, Mode, Observed, Verb, Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.room import Room
from splitlearn_manager.reconcile.tries import Tries, after_failure


class Updates:
    """See the module's text. What it decides on takes room of `room`.

    Args:
        by_id: the instances of each model.
    """

    def __init__(
        self,
        desired: Mapping[str, Wanted],
        observed: Observed,
        by_id: Mapping[str, Sequence[InstanceView]],
        room: Room,
        tries: Tries,
    ) -> None:
        self._desired = desired
        self._observed = observed
        self._by_id = by_id
        self._room = room
        self._tries = tries

    def of(self, wanted: Wanted, serving: InstanceView) -> Action | Waiting:
        """The update of what serves, or why there is none now."""
        spec = wanted.spec
        attempt = self._observed.attempts.get(spec.model_id)
        # A rollout has both versions at a time.
        setting = spec.config.update if spec.config.rollout is None else "surge"
        why = self._tries.why_not(wanted)
        if why is not None and (setting == "surge" or not _is_due_later(why, attempt)):
            return why
        request = AdmissionRequest(
            spec.model_id,
            wanted.devices,
            wanted.mb,
            spec.config.priority,
            wanted.accepted_s,
            may_evict=False,
        )
        if setting != "recreate" and (first := self._asked_for_first(wanted)) is not None:
            message = f"requests wait for {first}, which takes the memory first"
            return Waiting(spec.model_id, "AwaitingMemory", message)
        beside = self._room.ask(request)
        if setting != "recreate" and isinstance(beside, Admitted):
            return why or self._updating(wanted, serving, Mode.SURGE, beside.device)
        if setting == "surge":
            message = (
                beside.message if isinstance(beside, Refused) else "waits for memory to come back"
            )
            reason = beside.reason if isinstance(beside, Refused) else "AwaitingMemory"
            return Waiting(spec.model_id, reason, message)
        if attempt is not None and attempt.concerns(spec):
            # Taking the old version away again for what failed once would cost an outage a try.
            return after_failure(spec.model_id, attempt, None)
        instead = self._room.ask(replace(request, replaces=serving.key))
        if isinstance(instead, Admitted):
            return self._updating(wanted, serving, Mode.RECREATE, instead.device)
        if isinstance(instead, Refused):
            return Waiting(spec.model_id, instead.reason, instead.message)
        return Waiting(spec.model_id, "AwaitingMemory", "waits for memory to come back")

    def _asked_for_first(self, wanted: Wanted) -> str | None:
        """Whose room an update would take that requests wait for: others may have gone to make it."""
        for model_id in sorted(self._observed.demands):
            other = self._desired.get(model_id)
            if other is None or model_id in self._by_id or self._tries.why_not(other) is not None:
                continue
            priority = other.spec.config.priority
            if priority < wanted.spec.config.priority or self._tries.limit(model_id) is not None:
                continue
            request = AdmissionRequest(
                model_id,
                other.devices,
                other.mb,
                priority,
                other.accepted_s,
                may_evict=False,
            )
            fits = self._room.ask(request)
            if isinstance(fits, Admitted) and not self._room.fits_besides(
                fits.device, other.mb, wanted.devices, wanted.mb
            ):
                return model_id
        return None

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


def _is_due_later(why: Waiting, attempt: Attempt | None) -> bool:
    """Whether a load that failed is to be tried again at a known time."""
    return attempt is not None and why.until_s is not None and why.reason == attempt.reason


def describe_changes(old: ModelSpec, new: ModelSpec) -> str:
    """What differs between two specs, for people: `dtype float16 → bfloat16, weights changed`."""
    parts = [str(change) for change in changes(old.config, new.config)]
    if old.weights != new.weights:
        parts.append("weights changed")
    return ", ".join(parts) or "nothing a person could see"
