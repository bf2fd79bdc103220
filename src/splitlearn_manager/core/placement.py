"""On which of several devices a model goes (`device: auto`): a pure function of the room there is.

- A GPU rather than the CPU.
- Of the GPUs in which the model fits, the fullest: the one of which least stays free. Small models so
  share a GPU, and the largest hole is kept for a large one, which fits nowhere if each GPU has a little
  left. (Where two are equally full, the one with the lower number.)
- A model whose size is not known (0 MB) goes where most is free, since it may turn out to be large.

Where it fits nowhere, admission says whether others make room; `by_room` is the order in which it asks.

The answer depends on the room at the moment at which it is asked, and never on the order of the devices.
Pure: no torch, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from splitlearn_manager.core.ledger import Ledger


def placed_on(ledger: Ledger, devices: Iterable[str], mb: float) -> str | None:
    """The one of `devices` that a model of `mb` MB goes to; None if it fits in none of them now."""
    fitting = [d for d in _known(ledger, devices) if not ledger.shortfall(d, mb)]
    if mb <= 0:
        return next(iter(by_room(ledger, fitting)), None)
    return min(fitting, key=lambda d: (_is_cpu(d), ledger.free_mb(d), _by_number(d)), default=None)


def by_room(ledger: Ledger, devices: Iterable[str]) -> tuple[str, ...]:
    """Those of `devices` that the node has: GPUs before the CPU, the one with most free budget first."""
    return tuple(
        sorted(
            _known(ledger, devices),
            key=lambda d: (_is_cpu(d), -ledger.free_mb(d), _by_number(d)),
        )
    )


def by_number(devices: Iterable[str]) -> tuple[str, ...]:
    """GPUs by their numbers, then the CPU."""
    return tuple(sorted(devices, key=lambda d: (_is_cpu(d), _by_number(d))))


def _known(ledger: Ledger, devices: Iterable[str]) -> list[str]:
    """Those of `devices` that have a budget."""
    return [d for d in devices if d in ledger.budgets_mb]


def _is_cpu(device: str) -> bool:
    return device == "cpu"


def _by_number(device: str) -> tuple[int, str]:
    """cuda:2 before cuda:10."""
    return (len(device), device)
