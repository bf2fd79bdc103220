"""What loads measured, as the part of a model's record that says it, and read from it again. Pure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.runtime.base import Activations, Joining


def to_data(measured: Iterable[Measurement]) -> list[dict[str, object]]:
    """Measurements as JSON has them."""
    return [_one_to_data(measurement) for measurement in measured]


def from_data(data: Any) -> tuple[Measurement, ...]:
    """Those that can be read. Without the others the next load measures anew, and nothing else is lost."""
    found = []
    for measured in data if isinstance(data, list) else ():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found.append(_one_from_data(measured))
    return tuple(found)


def _one_to_data(measured: Measurement) -> dict[str, object]:
    data: dict[str, object] = {
        "load_hash": measured.load_hash,
        "weights": measured.weights,
        "device": measured.device,
        "estimated_mb": measured.estimated_mb,
        "weights_mb": measured.weights_mb,
    }
    if (activations := measured.activations) is not None:
        data["activations_mb"] = [list(line) for line in activations.lines]
    if (joining := measured.joining) is not None:
        data["joining"] = {
            "joins": joining.joins,
            "note": joining.note,
            "lengths": joining.lengths,
        }
    return data


def _one_from_data(data: Mapping[str, Any]) -> Measurement:
    estimated_mb, lines = data["estimated_mb"], data.get("activations_mb")
    return Measurement(
        load_hash=str(data["load_hash"]),
        weights=str(data["weights"]),
        device=str(data["device"]),
        estimated_mb=_mb(estimated_mb) if estimated_mb is not None else None,
        weights_mb=_mb(data["weights_mb"]),
        activations=Activations(tuple((_finite(fixed), _mb(each)) for fixed, each in lines))
        if lines is not None
        else None,
        joining=_joining(data.get("joining")),
    )


def _joining(data: Any) -> Joining | None:
    # What a release wrote that did not ask for lengths is found out anew.
    if data is None or "lengths" not in data:
        return None
    return Joining(data["joins"] is True, str(data["note"]), lengths=data["lengths"] is True)


def _mb(value: Any) -> float:
    if (mb := _finite(value)) < 0:
        raise ValueError(f"{mb} is no size")
    return mb


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{number} is no size")
    return number
