"""A worker looks for the next request, in place of sleeping, where the last one came soon."""

from __future__ import annotations

from typing import Any

import pytest

from splitlearn_manager.runtime.channel import Message
from splitlearn_manager.worker import model_worker
from splitlearn_manager.worker.model_worker import Connection


class Calls:
    """A channel on which each message comes so many seconds after it was waited for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.comes_after_s = 0.0
        self.looked_s: list[float] = []

    def look_for_message(self, seconds: float) -> None:
        self.looked_s.append(seconds)

    def receive_any(self) -> tuple[Message, list[int]]:
        self.now_s += self.comes_after_s
        return {"area": False, "tensors": []}, []


def test_it_looks_only_where_the_last_one_came_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Any = Calls()
    monkeypatch.setattr(model_worker, "perf_counter", lambda: calls.now_s)
    connection = Connection(calls)
    looked = []
    for comes_after_s in (5.0, 0.0002, 0.0003, 0.5, 0.0001, 0.0001):
        calls.comes_after_s = comes_after_s
        calls.looked_s.clear()
        connection.receive()
        looked.append(bool(calls.looked_s))
        assert sum(calls.looked_s) <= 0.001, "it takes a processor for long, for nothing"
    assert looked == [False, False, True, True, False, True]
