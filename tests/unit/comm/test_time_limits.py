"""Who begins to wait just as the thread looks at who waits is seen, though most take no lock to begin."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from splitlearn_comm.client.time_limits import TimeLimits
from support.waiting import eventually


@dataclass(frozen=True)
class One:
    until_s: float


def test_who_begins_to_wait_while_the_thread_looks_is_seen() -> None:
    now_s = time.monotonic()
    first, newest, last = One(now_s + 500), One(now_s + 600), One(now_s + 900)
    waiting = [first]
    looks: list[threading.Event] = []
    begins = threading.Thread(target=lambda: (waiting.append(newest), limits.watch(newest.until_s)))

    def all_that_wait() -> list[One]:
        seen = list(waiting)
        if looks and not looks[0].is_set():
            begins.start()
            # It has begun to wait or stands before the lock, which this thread has.
            begins.join(0.2)
            looks[0].set()
        return seen

    limits: TimeLimits[One] = TimeLimits(all_that_wait, lambda one: None)
    limits.watch(first.until_s)
    eventually(lambda: limits._looks_s == first.until_s, "it waits for the first")
    waiting[:] = [last]
    looks.append(threading.Event())
    limits.look()
    assert looks[0].wait(10)
    begins.join(10)
    eventually(lambda: limits._looks_s == newest.until_s, "it waits for the newest")
    waiting.clear()
    limits.look()
