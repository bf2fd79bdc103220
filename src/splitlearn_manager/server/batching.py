"""Runs the forwards of all models: joins requests into batches, and lets the models take turns.

    request ─► queue of its instance ─► batch ─► one forward ─► each request its rows of the answer

Requests of one instance are joined whose tensors have the same dtype and the same sizes but for the first
dimension, up to `batch_size` rows, if the model was found to answer rows alike alone and together
(`splitlearn_manager.runtime.joining`). Nothing waits for a batch to fill unless `max_queue_delay_ms` says so:
the next batch forms while one runs. If a batch fails, each of its requests is tried alone, so that a bad one
fails alone.

An instance runs one batch at a time; one whose requests cannot be joined, several requests. Over all
instances so many forwards run as there are processors, and on each GPU as many more: those mostly wait, and
of one instance the second only joins and copies its inputs while the first computes. A forward that has run
for `LENDS_S` lends its place, so that no slow or hanging model holds up another. Who comes next has had the
least time, by the weight of its priority (`splitlearn_manager.server.fairness`).

A batch that is expected to be short runs on the thread that polls for calls, if there is one (`polled_here`):
waking another one would cost more. One that a worker process runs is sent there by that thread, and answered
by it (`splitlearn_manager.server.elsewhere`). All others run on threads of the batcher's own. Whoever does
not look for the next batch by itself sees to it that somebody does: the thread that polls before it waits
for calls, and one that has lost the polling as its batch ends.

A queue is bounded by `max_queue`; what is more is refused at once. A request whose deadline has passed, or
whose caller is gone, is dropped before its forward. The lock is held for microseconds, never in a forward.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic

from splitlearn_comm.core.errors import ComputeError, NotReady, Overloaded
from splitlearn_comm.core.packed import Packed
from splitlearn_comm.server.backend import Inference
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.server.batches import (
    Answered,
    BatchRunner,
    Sent,
    answer,
    end,
    refusal_of,
    refuse,
)
from splitlearn_manager.server.elsewhere import Elsewhere
from splitlearn_manager.server.fairness import weight_of
from splitlearn_manager.server.queues import CPU, Queue, Waiting, queue_of
from splitlearn_manager.server.threads import ThreadPlan

log = logging.getLogger(__name__)

LENDS_S = 0.1
"""A forward that has run for so long no longer counts against the number of those that run at a time."""
_NEVER_S = float("inf")
_LONG_AGO_S = float("-inf")
SHORT_S = 0.04
"""A batch that is expected to take no longer may run on the thread that polls for calls."""
SHORT_IN_COMPANY_S = 0.002
"""As `SHORT_S`, where requests of other instances may come meanwhile."""
COMPANY_S = 1.0
"""For so long after requests of several instances came, more of them are expected."""
POLLER_BACK_S = 0.02
"""The thread that polls is given so long to come to what it is expected to run; then another one does."""
_LEAST_ON_GPU = 2
"""Forwards at a time on a GPU, however few processors there are: one computes while another is copied."""
_SPARE_THREADS = 2
"""How many threads beyond those that compute are kept for later."""


class _Thread:
    """One that computes.

    Attributes:
        polls: whether it is one that polls for calls, and not the batcher's own.
        wake: released when there may be something to do.
        until_s: while it is idle: when it looks by itself.
    """

    def __init__(self, *, polls: bool = False) -> None:
        self.polls = polls
        self.until_s = _NEVER_S
        self.wake = threading.Lock()
        self.wake.acquire()


class Batcher:
    """Takes inferences, each with the lease on the instance that is to answer it.

    Args:
        threads: how many forwards run at a time, and how.
        apart: most forwards at a time of one instance whose requests are not joined.
        out_of_memory: told of an instance, and of the rows for which there was no memory.
        ran: told of each batch: model id, rows, seconds that its first request had waited.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        threads: ThreadPlan,
        *,
        apart: int = 10,
        out_of_memory: Callable[[ManagedModel, int], None] = lambda instance, rows: None,
        ran: Callable[[str, int, float], None] = lambda model_id, rows, waited_s: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._plan = threads
        self._apart = apart
        self._batches = BatchRunner(out_of_memory, ran, clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._active: dict[str, Queue] = {}
        self._idle: list[_Thread] = []
        self._threads = 0
        self._began: dict[_Thread | Sent, tuple[float, str]] = {}
        self._elsewhere = Elsewhere()
        self._poller: _Thread | None = None
        self._poller_id = 0
        self._polled_s = _LONG_AGO_S
        self._left_here = False
        self._asked_last = ""
        self._mixed_s = -COMPANY_S
        self._least_s: dict[str, float] = {}
        self._found: Queue | None = None
        self._stopped = False

    def submit(self, lease: Lease, inference: Inference, packed: Packed) -> None:
        """Queue a request; from now on it and its lease are the batcher's.

        Raises:
            Overloaded: `max_queue` requests of its model wait already.
            NotReady: the node is stopping.
        """
        instance = lease.instance
        now = self._clock()
        with self._lock:
            if self._stopped:
                raise NotReady("the node is shutting down")
            queue = queue_of(instance)
            limit = instance.config.max_queue
            if len(queue.waiting) >= limit:
                raise Overloaded(
                    f"model {instance.model_id!r} has {limit} requests waiting, its max_queue; "
                    "try again later"
                )
            if instance.key != self._asked_last:
                self._asked_last, self._mixed_s = instance.key, now
            if instance.key not in self._active:
                # What it did not use while nobody asked is not owed to it.
                queue.had_s = max(queue.had_s, self._least_s.get(queue.where, 0.0))
                self._active[instance.key] = queue
            queue.waiting.append(Waiting(inference, lease, packed, now))
            here = get_ident() == self._poller_id
            if here:
                self._polled_s = now
            if here and queue.is_short(self._short_s(now)):
                self._left_here = True
            elif queue.wants(self._apart):
                if queue.ripe_s() <= now and self._has_place(queue, self._taken(now)):
                    self._wake_one()
                else:
                    self._see_to_time(now)

    # The thread that polls, see `splitlearn_comm.http2.polling.Work`.

    def polled_here(self) -> None:
        """Requests come by this thread from now on, and short batches may run on it."""
        with self._lock:
            self._poller = _Thread(polls=True)
            self._poller_id = get_ident()

    def has_work(self) -> bool:
        """Whether a request waits or is run, here or elsewhere."""
        return bool(self._active)

    def waits_here(self) -> bool:
        """Whether there is a short batch to run."""
        with self._lock:
            now = self._polled_s = self._clock()
            self._found = self._next(now, here=True)
            if self._found is None:
                # This thread may wait for calls now: what was left to it is no longer.
                self._polled_s = _LONG_AGO_S
                if self._left_here and self._active:
                    self._see_to_the_rest(now)
                self._left_here = False
            return self._found is not None

    def run_here(self) -> None:
        """Run a short batch, or send it where it is run, if there is one."""
        with self._lock:
            now = self._polled_s = self._clock()
            (queue, self._found), me = (self._found, None), self._poller
            if queue is None or not (
                queue.wants(self._apart) and self._has_place(queue, self._taken(now))
            ):
                queue = self._next(now, here=True)
            if queue is None or me is None:
                return
            # While it runs, what waits behind it is for this thread to come back to.
            self._left_here = True
            sent = self._take_to_send(queue, now) if queue.begins else None
            batch = [] if sent is not None else self._take(queue, me, now)
        if sent is not None:
            self._send(sent)
        else:
            self._run(queue, batch, me)

    def fileno(self) -> int | None:
        """Readable when there is something to take that was run elsewhere."""
        return self._elsewhere.fileno()

    def arrived(self) -> None:
        """Answer what was run elsewhere; before that, what waits behind it is sent there."""
        for sent in self._elsewhere.come():
            answered = self._batches.taken(sent)
            if answered is None:
                self._set_aside(sent)
                continue
            with self._lock:
                now = self._polled_s = self._clock()
                self._settle(sent.queue, sent, len(sent.batch), sent.taken_s)
                found, following = self._next(now, here=True), None
                if found is not None and found.begins:
                    following = self._take_to_send(found, now)
                self._left_here = True
            if following is not None:
                self._send(following)
            for waiting, output, computed_ms in answered:
                end(answer, waiting, output, computed_ms)

    def _take_to_send(self, queue: Queue, now: float) -> Sent:
        sent = Sent(queue, taken_s=now)
        sent.batch = self._take(queue, sent, now)
        return sent

    def _send(self, sent: Sent) -> None:
        """Begin a batch that is run elsewhere."""
        try:
            begun = self._batches.begin(sent)
        except BaseException as error:
            begun = False
            self._give_up(sent.queue, sent.batch, error)
        if begun and not self._elsewhere.watch(sent):
            self._set_aside(sent)
            return
        with self._lock:
            if begun:
                # Somebody looks at it if it is not answered soon.
                self._see_to_time(self._clock())
                return
            self._settle(sent.queue, sent, len(sent.batch), sent.taken_s)

    def _set_aside(self, sent: Sent) -> None:
        """Have a thread see to it that may wait."""
        self._elsewhere.set_aside(sent)
        with self._lock:
            self._wake_one()

    def cut(self, key: str, why: ComputeError) -> int:
        """Refuse all requests that wait for the instance of that key; how many they were."""
        with self._lock:
            queue = self._active.get(key)
            cut = [*queue.waiting] if queue is not None else []
            if queue is not None:
                queue.waiting.clear()
                if not queue.running:
                    del self._active[key]
        for waiting in cut:
            end(refuse, waiting, why)
        return len(cut)

    def stop(self) -> None:
        """Refuse what waits, take nothing more, and let the threads go."""
        with self._lock:
            self._stopped = True
            keys = list(self._active)
            idle, self._idle = self._idle, []
        for key in keys:
            self.cut(key, NotReady("the node is shutting down"))
        for thread in idle:
            thread.wake.release()

    # Whose turn it is. The lock is held.

    def _taken(self, now: float) -> list[str]:
        """The devices of the forwards under way that have not lent their places."""
        if not self._began:
            return []
        lent = now - LENDS_S
        return [where for began_s, where in self._began.values() if began_s > lent]

    def _has_place(self, queue: Queue, taken: Sequence[str]) -> bool:
        """Whether another forward may begin there."""
        if not taken:
            return True
        least = 1 if queue.where == CPU else _LEAST_ON_GPU
        return taken.count(queue.where) < max(least, self._plan.forwards)

    def _next(self, now: float, *, here: bool = False) -> Queue | None:
        """The queue whose turn it is, `here` on the thread that polls."""
        taken, short_s = self._taken(now), self._short_s(now)
        found: Queue | None = None
        for queue in self._active.values():
            if (
                (found is None or queue.had_s < found.had_s)
                and queue.wants(self._apart)
                and self._has_place(queue, taken)
                and queue.ripe_s() <= now
                and (queue.is_short(short_s) if here else not self._is_for_poller(queue, now))
            ):
                found = queue
        return found

    def _short_s(self, now: float) -> float:
        """How long a batch may take that keeps others from being noticed."""
        return SHORT_S if now - self._mixed_s > COMPANY_S else SHORT_IN_COMPANY_S

    def _is_for_poller(self, queue: Queue, now: float) -> bool:
        """Whether the thread that polls will come to it at once."""
        attends = self._poller is not None and self._poller not in self._began
        return (
            attends and now - self._polled_s < POLLER_BACK_S and queue.is_short(self._short_s(now))
        )

    def _due_s(self, now: float) -> float:
        """When it may be somebody's turn though nothing happens meanwhile."""
        late_s = self._elsewhere.due_s()
        wanting = [q for q in self._active.values() if q.wants(self._apart)]
        if not wanting:
            return late_s
        lends = (at + LENDS_S for at, _ in self._began.values() if at + LENDS_S > now)
        ripens = (at for q in wanting if (at := q.ripe_s()) > now)
        for_poller = any(self._is_for_poller(q, now) for q in wanting)
        left = (self._polled_s + POLLER_BACK_S,) if for_poller else ()
        return min(*lends, *ripens, *left, late_s, _NEVER_S)

    def _see_to_the_rest(self, now: float) -> None:
        """Have a thread begin what may be begun now, or look again when that may be so."""
        if self._next(now) is not None:
            self._wake_one()
        else:
            self._see_to_time(now)

    def _see_to_time(self, now: float) -> None:
        """Have a thread look again when that may be somebody's turn."""
        if self._due_s(now) < min((thread.until_s for thread in self._idle), default=_NEVER_S):
            self._wake_one()

    def _wake_one(self) -> None:
        if self._idle:
            self._idle.pop().wake.release()
        elif self._threads <= sum(isinstance(t, _Thread) and not t.polls for t in self._began):
            # All there are compute.
            try:
                threading.Thread(target=self._work, name="compute", daemon=True).start()
            except RuntimeError as error:
                # Not the error of who asks: what waits is for the threads that there are, or tried again with
                # the next request.
                log.warning("event=NoThread waiting=%d: %s", len(self._active), error)
            else:
                self._threads += 1

    # Threads.

    def _work(self) -> None:
        me = _Thread()
        while True:
            with self._lock:
                now = self._clock()
                late = self._elsewhere.late(_NEVER_S if self._stopped else now)
                queue = self._next(now) if late is None else None
                if late is not None:
                    self._began[me] = self._began.pop(late)
                    self._see_to_the_rest(now)
                elif queue is not None:
                    batch = self._take(queue, me, now)
                elif self._stopped or len(self._idle) > self._plan.forwards + _SPARE_THREADS:
                    self._threads -= 1
                    return
                else:
                    me.until_s = self._due_s(now)
                    self._idle.append(me)
            if late is not None:
                self._run_late(late, me)
            elif queue is not None:
                self._run(queue, batch, me)
                # Nothing of the requests may outlive them here.
                del batch
            elif not me.wake.acquire(timeout=_patience_s(me.until_s, now)):
                self._woken_by_time(me)
            del late, queue

    def _take(self, queue: Queue, who: _Thread | Sent, now: float) -> list[Waiting]:
        batch = queue.take()
        queue.running += 1
        queue.in_forwards += len(batch)
        self._began[who] = now, queue.where
        self._least_s[queue.where] = max(self._least_s.get(queue.where, 0.0), queue.had_s)
        if queue.waiting or len(self._active) > 1:
            self._see_to_the_rest(now)
        return batch

    def _woken_by_time(self, me: _Thread) -> None:
        with self._lock:
            if me in self._idle:
                self._idle.remove(me)
                return
        # Woken in the same moment: that is settled now.
        me.wake.acquire()

    def _run(self, queue: Queue, batch: list[Waiting], me: _Thread) -> None:
        self._work_off(queue, batch, me, self._clock(), lambda: self._batches.run(queue, batch))

    def _run_late(self, late: Sent, me: _Thread) -> None:
        queue, finish = late.queue, self._batches.finished
        self._work_off(queue, late.batch, me, late.taken_s, lambda: finish(late))

    def _work_off(
        self,
        queue: Queue,
        batch: list[Waiting],
        me: _Thread,
        began_s: float,
        run: Callable[[], list[Answered]],
    ) -> None:
        try:
            self._plan.prepare()
            answered = run()
        except BaseException as error:
            answered = []
            self._give_up(queue, batch, error)
        finally:
            with self._lock:
                self._settle(queue, me, len(batch), began_s)
                now = self._clock()
                if queue.begins and queue.wants(self._apart):
                    # A process that has nothing to do is not left so while this thread answers.
                    self._see_to_the_rest(now)
                elif me.polls and me is not self._poller and self._active:
                    # Another thread polls by now; this one ends.
                    self._see_to_the_rest(now)
        for waiting, output, computed_ms in answered:
            end(answer, waiting, output, computed_ms)

    def _settle(self, queue: Queue, who: _Thread | Sent, requests: int, began_s: float) -> None:
        """A batch has been run. The lock is held."""
        took_s = self._clock() - began_s
        queue.running -= 1
        queue.in_forwards -= requests
        del self._began[who]
        queue.took(requests, took_s)
        queue.had_s += took_s / weight_of(queue.instance.config.priority)
        if not queue.waiting and not queue.running:
            del self._active[queue.instance.key]

    def _give_up(self, queue: Queue, batch: list[Waiting], error: BaseException) -> None:
        """Not the model's error: that has been told. Nobody may be left waiting, nor the thread be lost."""
        for waiting in batch:
            if not waiting.lease.released:
                end(refuse, waiting, refusal_of(queue.instance.model_id, error))


def _patience_s(until_s: float, now: float) -> float:
    """For a lock: -1 waits for ever."""
    return -1 if until_s == _NEVER_S else min(max(0.0, until_s - now), threading.TIMEOUT_MAX)
