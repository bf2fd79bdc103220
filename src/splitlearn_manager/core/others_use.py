"""How much of a device others use: what is read of it, less what our own models hold.

Others are all that models share the device with: other processes, and this one beside its models (Python,
torch, buffers of requests that run). While a model is being loaded or unloaded nobody can tell how much of
its memory it holds already, so a reading says no more than between what and what the others' use lies. The
figure that is kept moves only where a reading shows that it is wrong:

- a reading that it may be right for, or that is off by less than `slack_mb`, changes nothing, so noise
  changes no decision;
- where more must be used than it says, it rises at once;
- where less is used, it falls once that has lasted `HOLD_S`, to the highest use in that time. If it rose
  while a load or an unload was under way it may never have been right, and falls at once.

Pure: it reads no clock and no file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from splitlearn_manager.core.ledger import Ceiling
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.core.snapshot import InstanceView

HOLD_S = 5.0
"""So long less must be used before it is believed."""

_PEAK = 1.25
"""The most that a load is thought to take on its way, of what was reserved for it."""

# Share of the time, in percent, that some process stood still for want of memory (PSI, over 10 s): from
# the first on the device is stalled, until it is below the second.
_STALLED_FROM = 20.0
_STALLED_UNTIL = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """A device at one moment. Memory in MB (2**20 bytes).

    Attributes:
        total_mb: what it has for this process.
        used_mb: what everybody uses of that.
        stalled_percent: of the last 10 s, how long some process waited for memory; None if not known.
    """

    total_mb: float
    used_mb: float
    stalled_percent: float | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """MB that our models hold of a device, at least and at most.

    Attributes:
        settled: no model is on its way in or out.
    """

    least_mb: float = 0.0
    most_mb: float = 0.0
    settled: bool = True


@dataclass(frozen=True, slots=True)
class OthersUse:
    """See the module's text.

    Attributes:
        mb: what others use.
        total_mb: what the device has.
        sure: it was read while no model was on its way in or out.
        dip_since_s, dip_mb: since when less is used, and how much at most; None while it is not.
    """

    mb: float
    total_mb: float
    sure: bool
    stalled: bool = False
    dip_since_s: float | None = None
    dip_mb: float = 0.0

    def ceiling(self) -> Ceiling:
        """What is left for models."""
        return Ceiling(self.total_mb, self.mb, floor_mb(self.total_mb), self.stalled)


def floor_mb(total_mb: float) -> float:
    """What is to stay free of a device: 5 %, between 64 and 512 MB.

    Loads take a little more on their way than in the end, and the system needs some to work with.
    """
    return min(512.0, max(64.0, total_mb / 20))


def slack_mb(total_mb: float) -> float:
    """By how much the figure may be off: less than half a percent, between 4 and 128 MB."""
    return min(128.0, max(4.0, total_mb / 256))


def held_on(device: str, before: Iterable[InstanceView], after: Iterable[InstanceView]) -> Held:
    """What our models held of a device while it was read.

    Args:
        before, after: the instances just before and just after the reading.
    """
    views = [{v.key: v for v in at if v.device == device} for at in (before, after)]
    least = most = 0.0
    settled = True
    for key in views[0].keys() | views[1].keys():
        seen = [by_key[key] for by_key in views if key in by_key]
        if len(seen) == 2 and all(_is_in_memory(v) for v in seen):
            measured = seen[1].measured_mb or 0.0
            least += measured
            in_use = any(v.leases for v in seen)
            most += max(measured, seen[1].reserved_mb) if in_use else measured
        else:
            settled = False
            most += max(max(v.measured_mb or 0.0, _PEAK * v.reserved_mb) for v in seen)
    return Held(least, most, settled)


def first_use(reading: Reading, held: Held) -> OthersUse:
    """What others use, of which nothing was known before."""
    use = OthersUse(_between(reading.used_mb - held.least_mb), reading.total_mb, held.settled)
    return replace(use, stalled=_is_stalled(False, reading))


def next_use(use: OthersUse, reading: Reading, held: Held, now_s: float) -> OthersUse:
    """What others use, after one more reading. Gives `use` itself if nothing is another.

    Args:
        now_s: on a clock that never jumps.
    """
    stalled = _is_stalled(use.stalled, reading)
    if reading.total_mb != use.total_mb:
        return replace(first_use(reading, held), stalled=stalled)
    least = _between(reading.used_mb - held.most_mb)
    most = _between(reading.used_mb - held.least_mb)
    slack = slack_mb(use.total_mb)
    if least > use.mb + slack:
        return OthersUse(least, use.total_mb, held.settled, stalled)
    if most >= use.mb - slack:
        sure = use.sure or held.settled
        if (sure, stalled, None) == (use.sure, use.stalled, use.dip_since_s):
            return use
        return OthersUse(use.mb, use.total_mb, sure, stalled)
    if not use.sure:
        return OthersUse(most, use.total_mb, held.settled, stalled)
    since_s = now_s if use.dip_since_s is None else use.dip_since_s
    highest = most if use.dip_since_s is None else max(most, use.dip_mb)
    if now_s - since_s >= HOLD_S:
        return OthersUse(highest, use.total_mb, held.settled, stalled)
    return replace(use, stalled=stalled, dip_since_s=since_s, dip_mb=highest)


def _is_in_memory(view: InstanceView) -> bool:
    """All of it, and it stays: it serves, or is tried beside the version that does, maybe for days."""
    return view.state is State.READY or bool(view.trial)


def _between(mb: float) -> float:
    """Others cannot use less than nothing, whatever two figures of different moments say."""
    return max(0.0, mb)


def _is_stalled(before: bool, reading: Reading) -> bool:
    percent = reading.stalled_percent
    if percent is None:
        return False
    return percent >= (_STALLED_UNTIL if before else _STALLED_FROM)
