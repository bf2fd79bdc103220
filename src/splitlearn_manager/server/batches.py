"""Runs one batch: those of its requests that are still wanted, together if that goes, and answers each.

    batch ─► still wanted? ─► one tensor of all bytes ─► one forward ─► each request its rows of the output

If a batch fails, each of its requests is tried alone, so that a bad one fails alone; if there was no memory
for it, in halves. What goes wrong with answering one request is no other's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import ParamSpec, TypeAlias

from splitlearn_comm.core.compute_function import invoke, on_cpu
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
from splitlearn_manager.runtime.base import ComputesRows, ComputesSequences
from splitlearn_manager.server.queues import Queue, Waiting

log = logging.getLogger(__name__)
P = ParamSpec("P")

Answered: TypeAlias = "tuple[Waiting, Rows, float]"
"""A request, what the model answered it, and how many milliseconds that took."""


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
        instance = queue.instance
        began_s = self._clock()
        alone = len(batch) == 1
        rows = batch[0].rows if alone else sum(waiting.rows for waiting in batch)
        self._ran(instance.model_id, rows, began_s - batch[0].came_s)
        try:
            output = _output(instance, batch, rows)
        except BaseException as error:
            # BaseException, because a model that calls sys.exit() would otherwise leave its callers waiting.
            return self._after_failure(queue, batch, error)
        computed_ms = (self._clock() - began_s) * 1000
        if not isinstance(output, Output):
            return [(w, answer, computed_ms) for w, answer in zip(batch, output, strict=True)]
        if alone:
            return [(batch[0], output.whole(), computed_ms)]
        if not output.shape or output.shape[0] != rows:
            log.warning(
                "model_id=%s joins=no: it answered %d rows with an output of shape %s",
                instance.model_id,
                rows,
                list(output.shape),
            )
            queue.joins = False
            return self._one_by_one(queue, batch)
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


def _output(instance: ManagedModel, batch: Sequence[Waiting], rows: int) -> Output | Sequence[Rows]:
    """What the model answers: all in one, or to each request where they have not one shape."""
    running = instance.running
    if running is None:
        raise NotReady(f"model {instance.model_id!r} is being unloaded")
    until_s = _until_s(batch)
    remaining_s = None if until_s is None else until_s - monotonic()
    shape = (rows, *batch[0].packed.shape[1:])
    with working_for(remaining_s), telling_out_of_memory(instance.model_id, shape):
        function = running.compute_function
        parts = [waiting.packed for waiting in batch]
        if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
            if not isinstance(function, ComputesSequences):
                raise TypeError(
                    f"{type(function).__name__} takes no sequences of different lengths"
                )
            return function.compute_sequences(parts)
        if isinstance(function, ComputesRows):
            return function.compute_rows(parts)
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
