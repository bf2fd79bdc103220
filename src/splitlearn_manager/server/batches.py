"""Runs one batch: those of its requests that are still wanted, together if that goes, and answers each.

    batch ─► still wanted? ─► one tensor of all bytes ─► one forward ─► each request its rows of the output

If a batch fails, each of its requests is tried alone, so that a bad one fails alone; if there was no memory
for it, in halves. What goes wrong with answering one request is no other's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import ParamSpec, TypeAlias

from splitlearn_comm.core.compute_function import ComputeFunction, invoke, on_cpu
from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import (
    ComputeError,
    ComputeFailed,
    DeadlinePassed,
    NotReady,
    OutOfMemory,
)
from splitlearn_comm.core.out_of_memory import telling_out_of_memory
from splitlearn_comm.core.packed import Output, Rows, joined
from splitlearn_comm.server.statuses import from_model_error, status_of
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.logs import log_event
from splitlearn_manager.runtime.base import BeginsForwards, Begun, ComputesSequences
from splitlearn_manager.server.queues import Queue, Waiting

log = logging.getLogger(__name__)
P = ParamSpec("P")

Answered: TypeAlias = "tuple[Waiting, Rows, float]"
"""A request, what the model answered it, and how many milliseconds that took."""


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A batch that is run: of its requests those that were still wanted as that began."""

    queue: Queue
    batch: list[Waiting]
    rows: int
    began_s: float


@dataclass(slots=True, eq=False)
class Sent:
    """A batch that runs elsewhere.

    Attributes:
        batch: all that were taken from the queue.
        taken_s: when.
        running: None until it is begun.
        output: what came, where more has to be done for it.
        failed: what went wrong, where that has still to be told.
    """

    queue: Queue
    batch: list[Waiting] = field(default_factory=list)
    taken_s: float = 0.0
    running: Running | None = None
    begun: Begun | None = None
    output: Output | Sequence[Rows] | None = None
    failed: BaseException | None = None


class BatchRunner:
    """See the module's text.

    Args:
        out_of_memory: told of an instance, and of the rows for which there was no memory.
        ran: told of each batch: model id, rows, seconds that its first request had waited.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        out_of_memory: Callable[[ManagedModel, int], None],
        ran: Callable[[str, int, float], None],
        clock: Callable[[], float],
    ) -> None:
        self._out_of_memory = out_of_memory
        self._ran = ran
        self._clock = clock

    def run(self, queue: Queue, batch: list[Waiting]) -> list[Answered]:
        """Run those that are still wanted; what has to be answered, and with what. Others are refused."""
        batch = [waiting for waiting in batch if _still_wanted(waiting)]
        if not batch:
            return []
        running = self._begun(queue, batch)
        return self._finished(running, lambda: _output(queue.instance, batch, running.rows))

    def begin(self, sent: Sent) -> bool:
        """Have those that are still wanted run elsewhere, and wait for nothing; others are refused.

        False if there are none. Else `taken` or `finished` has to be asked for what has to be answered.
        """
        batch = [waiting for waiting in sent.batch if _still_wanted(waiting)]
        if not batch:
            return False
        sent.running = running = self._begun(sent.queue, batch)
        try:
            with _working(sent.queue.instance, batch, running.rows) as function:
                assert isinstance(function, BeginsForwards)
                sent.begun = function.begin([waiting.packed for waiting in batch])
        except BaseException as error:
            sent.failed = error
        return True

    def taken(self, sent: Sent) -> list[Answered] | None:
        """What has to be answered, if that is known by now and nothing more has to be done for it."""
        if sent.begun is None or sent.running is None:
            return None
        try:
            sent.output = sent.begun.take()
            if sent.output is not None and _fits(sent.running, sent.output):
                return self._answered(sent.running, sent.output)
        except BaseException as error:
            sent.failed = error
        return None

    def finished(self, sent: Sent) -> list[Answered]:
        """Wait for what has to be answered, and run again what has to be."""
        running = sent.running
        assert running is not None

        def output() -> Output | Sequence[Rows]:
            if sent.failed is not None:
                raise sent.failed
            if sent.output is not None:
                return sent.output
            assert sent.begun is not None
            shape = (running.rows, *running.batch[0].packed.shape[1:])
            with telling_out_of_memory(running.queue.instance.model_id, shape):
                return sent.begun.finish()

        return self._finished(running, output)

    def _begun(self, queue: Queue, batch: list[Waiting]) -> Running:
        began_s = self._clock()
        rows = batch[0].rows if len(batch) == 1 else sum(waiting.rows for waiting in batch)
        self._ran(queue.instance.model_id, rows, began_s - batch[0].came_s)
        return Running(queue, batch, rows, began_s)

    def _finished(
        self, running: Running, output_of: Callable[[], Output | Sequence[Rows]]
    ) -> list[Answered]:
        queue, batch = running.queue, running.batch
        try:
            output = output_of()
        except BaseException as error:
            # BaseException, because a model that calls sys.exit() would otherwise leave its callers waiting.
            return self._after_failure(queue, batch, error)
        if _fits(running, output):
            return self._answered(running, output)
        log.warning(
            "model_id=%s joins=no: it answered %d rows with an output of shape %s",
            queue.instance.model_id,
            running.rows,
            list(output.shape) if isinstance(output, Output) else [],
        )
        queue.joins = False
        return self._one_by_one(queue, batch)

    def _answered(self, running: Running, output: Output | Sequence[Rows]) -> list[Answered]:
        batch = running.batch
        computed_ms = (self._clock() - running.began_s) * 1000
        if not isinstance(output, Output):
            return [(w, answer, computed_ms) for w, answer in zip(batch, output, strict=True)]
        if len(batch) == 1:
            return [(batch[0], output.whole(), computed_ms)]
        at, answered = 0, []
        for waiting in batch:
            answered.append((waiting, output.rows(at, waiting.rows), computed_ms))
            at += waiting.rows
        return answered

    def _after_failure(
        self, queue: Queue, batch: list[Waiting], error: BaseException
    ) -> list[Answered]:
        instance = queue.instance
        refusal = refusal_of(instance.model_id, error)
        if isinstance(error, OutOfMemory):
            self._out_of_memory(instance, error.batch)
        if len(batch) == 1 or _is_final(refusal):
            for waiting in batch:
                refuse(waiting, refusal)
            return []
        if isinstance(error, OutOfMemory):
            half = len(batch) // 2
            return [*self.run(queue, batch[:half]), *self.run(queue, batch[half:])]
        return self._one_by_one(queue, batch)

    def _one_by_one(self, queue: Queue, batch: Iterable[Waiting]) -> list[Answered]:
        return [answer for waiting in batch for answer in self.run(queue, [waiting])]


def _fits(running: Running, output: Output | Sequence[Rows]) -> bool:
    """Whether there is an answer in it to each request."""
    if not isinstance(output, Output) or len(running.batch) == 1:
        return True
    return bool(output.shape) and output.shape[0] == running.rows


@contextmanager
def _working(
    instance: ManagedModel, batch: Sequence[Waiting], rows: int
) -> Iterator[ComputeFunction]:
    """The function that answers a batch, for as long as its callers wait."""
    running = instance.running
    if running is None:
        raise NotReady(f"model {instance.model_id!r} is being unloaded")
    until_s = _until_s(batch)
    remaining_s = None if until_s is None else until_s - monotonic()
    shape = (rows, *batch[0].packed.shape[1:])
    with working_for(remaining_s), telling_out_of_memory(instance.model_id, shape):
        yield running.compute_function


def _output(instance: ManagedModel, batch: Sequence[Waiting], rows: int) -> Output | Sequence[Rows]:
    """What the model answers: all in one, or to each request where they have not one shape."""
    with _working(instance, batch, rows) as function:
        parts = [waiting.packed for waiting in batch]
        if isinstance(function, BeginsForwards):
            return function.begin(parts).finish()
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            if not isinstance(function, ComputesSequences):
                raise TypeError(
                    f"{type(function).__name__} takes no sequences of different lengths"
                )
            return function.compute_sequences(parts)
        tensor = joined(parts, pinned=function.overlaps)
        return Output(on_cpu(invoke(function, tensor).output))


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
        refuse(waiting, passed)
        return False
    return True


def refusal_of(model_id: str, error: BaseException) -> ComputeError:
    """What callers are told of an error; the log has its traceback if it is the model's."""
    if isinstance(error, ComputeError):
        return error
    refusal = from_model_error(model_id, error)
    log.error("model_id=%s status=%s", model_id, status_of(refusal).name, exc_info=error)
    return refusal


def _is_final(refusal: ComputeError) -> bool:
    """Whether trying again would not do: the worker process died, or had to be ended."""
    died = isinstance(refusal, ComputeFailed) and refusal.reason == "WorkerDied"
    return died or isinstance(refusal, DeadlinePassed | NotReady)


def end(how: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
    """Answer or refuse a request; what goes wrong with one is no other's business."""
    try:
        how(*arguments, **named)
    except Exception:
        log_event(log, logging.ERROR, "NotAnswered", exc_info=True)


def answer(waiting: Waiting, output: Rows, computed_ms: float) -> None:
    """Send the answer, and give the lease back."""
    with waiting.lease as lease:
        instance = lease.instance
        waiting.inference.answer(instance.model_id, output, computed_ms, instance.version)


def refuse(waiting: Waiting, error: ComputeError) -> None:
    """End the request without an answer, and give the lease back."""
    with waiting.lease as lease:
        lease.ok = False
        waiting.inference.refuse(error, lease.instance.model_id)
