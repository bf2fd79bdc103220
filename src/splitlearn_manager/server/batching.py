"""Runs the forwards of all models: joins requests into batches, and lets the models take turns.

    request ─► queue of its instance ─► batch ─► one forward ─► each request its rows of the answer

Requests of one instance are joined whose tensors have the same dtype and the same sizes but for the first
dimension, up to `batch_size` rows, if the model was found to answer rows alike alone and together
(`splitlearn_manager.runtime.joining`). Nothing waits for a batch to fill unless `max_queue_delay_ms` says so:
the next batch forms while one runs. If a batch fails, each of its requests is tried alone, so that a bad one
fails alone.

An instance runs one batch at a time; one whose requests cannot be joined, several requests. Over all
instances so many forwards run as there are processors. A forward that has run for `LENDS_S` lends its place,
so that no slow or hanging model holds up another. Who comes next has had the least time, by the weight of
its priority (`splitlearn_manager.server.fairness`).

A queue is bounded by `max_queue`; what is more is refused at once. A request whose deadline has passed, or
whose caller is gone, is dropped before its forward. The lock is held for microseconds, never in a forward.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, ParamSpec

from splitlearn_comm.core.compute_function import invoke
from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import (
    ComputeError,
    ComputeFailed,
    DeadlinePassed,
    NotReady,
    OutOfMemory,
    Overloaded,
)
from splitlearn_comm.core.out_of_memory import telling_out_of_memory
from splitlearn_comm.server.backend import Inference
from splitlearn_comm.server.servicer import on_cpu
from splitlearn_comm.server.statuses import from_model_error, status_of
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.server.fairness import weight_of
from splitlearn_manager.server.threads import ThreadPlan

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
P = ParamSpec("P")

LENDS_S = 0.1
"""A forward that has run for so long no longer counts against the number of those that run at a time."""
_NEVER_S = float("inf")
_SPARE_THREADS = 2
"""How many threads beyond those that compute are kept for later."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request in the queue. Its lease is given back when it has been answered or refused."""

    inference: Inference
    lease: Lease
    tensor: torch.Tensor
    came_s: float

    @property
    def rows(self) -> int:
        """Its size in the dimension along which requests are joined; 0 if it cannot be joined."""
        return int(self.tensor.shape[0]) if self.tensor.dim() else 0

    def goes_with(self, other: Waiting) -> bool:
        """Whether the two may be in one batch."""
        mine, others = self.tensor, other.tensor
        return mine.dtype is others.dtype and mine.shape[1:] == others.shape[1:] and other.rows > 0


@dataclass(slots=True, eq=False)
class Queue:
    """The requests of one instance.

    Attributes:
        running: forwards under way.
        joins: whether its requests may be joined.
        had_s: the time that it has had, by its weight; see `splitlearn_manager.server.fairness`.
    """

    instance: ManagedModel
    joins: bool
    waiting: deque[Waiting] = field(default_factory=deque)
    running: int = 0
    had_s: float = 0.0

    @property
    def largest(self) -> int:
        """The most rows of a batch."""
        limit = self.instance.largest_batch
        size = self.instance.config.batch_size
        return size if limit is None else min(size, limit)

    def ripe_s(self) -> float:
        """When the first request has waited long enough for a batch to fill."""
        first, delay_ms = self.waiting[0], self.instance.config.max_queue_delay_ms
        if not delay_ms or not self.joins or sum(w.rows for w in self.waiting) >= self.largest:
            return first.came_s
        return first.came_s + delay_ms / 1000

    def take(self) -> list[Waiting]:
        """The next batch: the first request, and those that go with it, in their order."""
        first = self.waiting.popleft()
        batch, rows = [first], first.rows
        if not self.joins or not rows or not self.waiting:
            return batch
        left: deque[Waiting] = deque()
        while self.waiting:
            other = self.waiting.popleft()
            if not first.goes_with(other):
                left.append(other)
            elif rows + other.rows > self.largest:
                # Those behind it must not overtake it.
                left.append(other)
                break
            else:
                batch.append(other)
                rows += other.rows
        left.extend(self.waiting)
        self.waiting = left
        return batch


class _Thread:
    """One that computes.

    Attributes:
        wake: released when there may be something to do.
        until_s: while it is idle: when it looks by itself.
    """

    def __init__(self) -> None:
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
        self._out_of_memory = out_of_memory
        self._ran = ran
        self._clock = clock
        self._lock = threading.Lock()
        self._active: dict[str, Queue] = {}
        self._idle: list[_Thread] = []
        self._threads = 0
        self._began_s: dict[_Thread, float] = {}
        self._least_s = 0.0
        self._stopped = False

    def submit(self, lease: Lease, inference: Inference, tensor: torch.Tensor) -> None:
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
            queue = _queue_of(instance)
            limit = instance.config.max_queue
            if len(queue.waiting) >= limit:
                raise Overloaded(
                    f"model {instance.model_id!r} has {limit} requests waiting, its max_queue; "
                    "try again later"
                )
            if instance.key not in self._active:
                # What it did not use while nobody asked is not owed to it.
                queue.had_s = max(queue.had_s, self._least_s)
                self._active[instance.key] = queue
            queue.waiting.append(Waiting(inference, lease, tensor, now))
            if self._wants(queue):
                if queue.ripe_s() <= now and self._places(now) > 0:
                    self._wake_one()
                else:
                    self._see_to_time(now)

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
            _end(_refuse, waiting, why)
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

    def _wants(self, queue: Queue) -> bool:
        """Whether it would run another batch, were it its turn."""
        most = 1 if queue.joins else self._apart
        return bool(queue.waiting) and queue.running < most

    def _places(self, now: float) -> int:
        lent = now - LENDS_S
        return self._plan.forwards - sum(began_s > lent for began_s in self._began_s.values())

    def _next(self, now: float) -> Queue | None:
        """The queue whose turn it is."""
        if self._places(now) <= 0:
            return None
        ready = [q for q in self._active.values() if self._wants(q) and q.ripe_s() <= now]
        return min(ready, key=lambda q: q.had_s, default=None)

    def _due_s(self, now: float) -> float:
        """When it may be somebody's turn though nothing happens meanwhile."""
        wanting = [q for q in self._active.values() if self._wants(q)]
        if not wanting:
            return _NEVER_S
        lends = (at + LENDS_S for at in self._began_s.values() if at + LENDS_S > now)
        ripens = (at for q in wanting if (at := q.ripe_s()) > now)
        return min((*lends, *ripens), default=_NEVER_S)

    def _see_to_time(self, now: float) -> None:
        """Have a thread look again when that may be somebody's turn."""
        if self._due_s(now) < min((thread.until_s for thread in self._idle), default=_NEVER_S):
            self._wake_one()

    def _wake_one(self) -> None:
        if self._idle:
            self._idle.pop().wake.release()
        elif self._threads <= len(self._began_s):
            # All there are compute.
            self._threads += 1
            threading.Thread(target=self._work, name="compute", daemon=True).start()

    # Threads.

    def _work(self) -> None:
        me = _Thread()
        while True:
            with self._lock:
                now = self._clock()
                queue = self._next(now)
                if queue is None:
                    if self._stopped or len(self._idle) > self._plan.forwards + _SPARE_THREADS:
                        self._threads -= 1
                        return
                    me.until_s = self._due_s(now)
                    self._idle.append(me)
                else:
                    batch = self._take(queue, me, now)
            if queue is None:
                if not me.wake.acquire(timeout=_patience_s(me.until_s, now)):
                    self._woken_by_time(me)
                continue
            self._run(queue, batch, me)
            # Nothing of the requests may outlive them here.
            del queue, batch

    def _take(self, queue: Queue, me: _Thread, now: float) -> list[Waiting]:
        batch = queue.take()
        queue.running += 1
        self._began_s[me] = now
        self._least_s = max(self._least_s, queue.had_s)
        if self._next(now) is not None:
            self._wake_one()
        else:
            self._see_to_time(now)
        return batch

    def _woken_by_time(self, me: _Thread) -> None:
        with self._lock:
            if me in self._idle:
                self._idle.remove(me)
                return
        # Woken in the same moment: that is settled now.
        me.wake.acquire()

    def _run(self, queue: Queue, batch: list[Waiting], me: _Thread) -> None:
        began_s = self._clock()
        try:
            self._plan.prepare()
            answered = self._forward(queue, batch)
        except BaseException as error:
            # Not the model's: that has been told. Nobody may be left waiting, nor the thread be lost.
            answered = []
            for waiting in batch:
                if not waiting.lease.released:
                    _end(_refuse, waiting, _refusal(queue.instance.model_id, error))
        finally:
            with self._lock:
                now = self._clock()
                queue.running -= 1
                del self._began_s[me]
                queue.had_s += (now - began_s) / weight_of(queue.instance.config.priority)
                if not queue.waiting and not queue.running:
                    del self._active[queue.instance.key]
        for waiting, output, computed_ms in answered:
            _end(_answer, waiting, output, computed_ms)

    # Forwards.

    def _forward(
        self, queue: Queue, batch: list[Waiting]
    ) -> list[tuple[Waiting, torch.Tensor, float]]:
        """Runs those that are still wanted; what has to be answered, and with what."""
        batch = [waiting for waiting in batch if _still_wanted(waiting)]
        if not batch:
            return []
        import torch

        instance = queue.instance
        began_s = self._clock()
        rows = sum(waiting.rows for waiting in batch)
        self._ran(instance.model_id, rows, began_s - batch[0].came_s)
        try:
            output = _output(instance, batch)
        except BaseException as error:
            # BaseException, because a model that calls sys.exit() would otherwise leave its callers waiting.
            return self._after_failure(queue, batch, error)
        computed_ms = (self._clock() - began_s) * 1000
        if len(batch) == 1:
            return [(batch[0], output, computed_ms)]
        if output.dim() == 0 or output.shape[0] != rows:
            log.warning(
                "model_id=%s joins=no: it answered %d rows with an output of shape %s",
                instance.model_id,
                rows,
                list(output.shape),
            )
            queue.joins = False
            return self._one_by_one(queue, batch)
        parts = torch.split(output, [waiting.rows for waiting in batch])
        return [(w, part, computed_ms) for w, part in zip(batch, parts, strict=True)]

    def _after_failure(
        self, queue: Queue, batch: list[Waiting], error: BaseException
    ) -> list[tuple[Waiting, torch.Tensor, float]]:
        instance = queue.instance
        refusal = _refusal(instance.model_id, error)
        if isinstance(error, OutOfMemory):
            self._out_of_memory(instance, error.batch)
        if len(batch) == 1 or _is_final(refusal):
            for waiting in batch:
                _refuse(waiting, refusal)
            return []
        if isinstance(error, OutOfMemory):
            half = len(batch) // 2
            return [*self._forward(queue, batch[:half]), *self._forward(queue, batch[half:])]
        return self._one_by_one(queue, batch)

    def _one_by_one(
        self, queue: Queue, batch: Iterable[Waiting]
    ) -> list[tuple[Waiting, torch.Tensor, float]]:
        return [answer for waiting in batch for answer in self._forward(queue, [waiting])]


def _patience_s(until_s: float, now: float) -> float:
    """For a lock: -1 waits for ever."""
    return -1 if until_s == _NEVER_S else min(max(0.0, until_s - now), threading.TIMEOUT_MAX)


def _queue_of(instance: ManagedModel) -> Queue:
    """The queue of an instance, kept with it for as long as it lives."""
    queue = instance.queue
    if not isinstance(queue, Queue):
        joins = instance.running is not None and instance.running.joins
        queue = instance.queue = Queue(instance, joins)
    return queue


def _output(instance: ManagedModel, batch: Sequence[Waiting]) -> torch.Tensor:
    import torch

    running = instance.running
    if running is None:
        raise NotReady(f"model {instance.model_id!r} is being unloaded")
    until_s = _until_s(batch)
    remaining_s = None if until_s is None else until_s - monotonic()
    rows = sum(waiting.rows for waiting in batch)
    shape = (rows, *batch[0].tensor.shape[1:])
    with working_for(remaining_s), telling_out_of_memory(instance.model_id, shape):
        joined = batch[0].tensor if len(batch) == 1 else torch.cat([w.tensor for w in batch])
        return on_cpu(invoke(running.compute_function, joined).output)


def _until_s(batch: Sequence[Waiting]) -> float | None:
    """When nobody waits for the batch any more."""
    latest_s = 0.0
    for waiting in batch:
        if waiting.inference.until_s is None:
            return None
        latest_s = max(latest_s, waiting.inference.until_s)
    return latest_s


def _still_wanted(waiting: Waiting) -> bool:
    try:
        waiting.inference.check_wanted()
    except DeadlinePassed as passed:
        _refuse(waiting, passed)
        return False
    return True


def _refusal(model_id: str, error: BaseException) -> ComputeError:
    if isinstance(error, ComputeError):
        return error
    refusal = from_model_error(model_id, error)
    log.error("model_id=%s status=%s", model_id, status_of(refusal).name, exc_info=error)
    return refusal


def _is_final(refusal: ComputeError) -> bool:
    """Whether trying again would not do: the worker process died, or had to be ended."""
    died = isinstance(refusal, ComputeFailed) and refusal.reason == "WorkerDied"
    return died or isinstance(refusal, DeadlinePassed | NotReady)


def _end(how: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
    """Answer or refuse a request; what goes wrong with one is no other's business."""
    try:
        how(*arguments, **named)
    except Exception:
        log.exception("event=NotAnswered")


def _answer(waiting: Waiting, output: torch.Tensor, computed_ms: float) -> None:
    with waiting.lease as lease:
        waiting.inference.answer(lease.instance.model_id, output, computed_ms)


def _refuse(waiting: Waiting, error: ComputeError) -> None:
    with waiting.lease as lease:
        lease.ok = False
        waiting.inference.refuse(error, lease.instance.model_id)
