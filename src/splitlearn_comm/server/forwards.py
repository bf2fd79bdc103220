"""Remembers which model answered a training forward, so that a backward that names no model finds it.

An endpoint shared by several models makes this necessary even where the backward names the endpoint. The
forwards themselves are kept by the models, not here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardTarget:
    """The model_id that a training forward asked for, and the one that was opened for it."""

    requested: str
    opened: str


class ForwardTargets:
    """Which model answered each training forward; safe to use from several threads.

    Args:
        limit: beyond that many, the oldest is forgotten.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._targets: OrderedDict[str, ForwardTarget] = OrderedDict()

    def remember(self, forward_id: str, target: ForwardTarget) -> None:
        """Note which model answered a forward."""
        with self._lock:
            self._targets[forward_id] = target
            self._targets.move_to_end(forward_id)
            while len(self._targets) > self._limit:
                self._targets.popitem(last=False)

    def resolve(self, forward_id: str, model_id: str) -> str:
        """Return the model that answered the forward, unless `model_id` clearly means another."""
        with self._lock:
            target = self._targets.get(forward_id)
        if target is None or model_id not in ("", target.requested, target.opened):
            return model_id
        return target.opened

    def forget(self, forward_id: str) -> None:
        """Drop a forward that was used."""
        with self._lock:
            self._targets.pop(forward_id, None)
