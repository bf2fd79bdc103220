"""What has happened to models, as rings that forget the oldest: one for each model, one for the node.

A repetition of a model's latest event is counted and not added. Each event, and each repetition, gets a
serial that grows over the whole node, so that who follows asks for what came after the last one seen.
Decides nothing and keeps nothing over a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

EVENTS_KEPT = 50
"""Events that a model keeps."""

NODE_EVENTS_KEPT = 1000
"""Events that the node keeps, over all models."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a model; equal ones in a row are counted, `at` is the latest.

    Attributes:
        serial: grows with every event of the node, from 1.
        at: unix time, in seconds.
        reason: stable, CamelCase; `message` is for people.
        count: how often it happened in a row.
    """

    serial: int
    at: float
    model_id: str
    reason: str
    message: str
    count: int = 1

    def as_dict(self) -> dict[str, object]:
        return {
            "serial": self.serial,
            "at": self.at,
            "model_id": self.model_id,
            "reason": self.reason,
            "message": self.message,
            "count": self.count,
        }


class EventLog:
    """See the module's text. Any thread may call any of it."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._serial = 0
        # A tuple for a model, because most models have a handful of events or none.
        self._by_model: dict[str, tuple[Event, ...]] = {}
        self._of_node: dict[int, Event] = {}

    def record(self, model_id: str, reason: str, message: str) -> None:
        """Adds an event; a repetition of the model's latest one is counted instead."""
        now = self._wall()
        with self._lock:
            self._serial += 1
            ring = self._by_model.get(model_id, ())
            count = 1
            if ring and (ring[-1].reason, ring[-1].message) == (reason, message):
                count = ring[-1].count + 1
                self._of_node.pop(ring[-1].serial, None)
                ring = ring[:-1]
            event = Event(self._serial, now, model_id, reason, message, count)
            self._by_model[model_id] = (*ring, event)[-EVENTS_KEPT:]
            self._of_node[event.serial] = event
            if len(self._of_node) > NODE_EVENTS_KEPT:
                del self._of_node[next(iter(self._of_node))]

    def of_model(self, model_id: str) -> tuple[Event, ...]:
        """The events of a model that are kept, oldest first."""
        return self._by_model.get(model_id, ())

    def since(self, serial: int, model_id: str | None = None) -> tuple[list[Event], int]:
        """The node's events after `serial`, oldest first, and the serial to ask with the next time.

        A serial that was never given out comes from an earlier process: then all are given.
        """
        with self._lock:
            if serial > self._serial:
                serial = 0
            found = [
                event
                for event in self._of_node.values()
                if event.serial > serial and model_id in (None, event.model_id)
            ]
            return found, self._serial

    def forget_all_but(self, known: Collection[str]) -> None:
        """Drops the rings of other models. What happened to them stays in the node's ring."""
        with self._lock:
            for model_id in [m for m in self._by_model if m not in known]:
                del self._by_model[model_id]
