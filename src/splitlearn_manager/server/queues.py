"""The requests that wait for one instance, and which of them make the next batch."""

from __future__ import annotations

import select
from collections import deque
from dataclasses import dataclass, field
from math import prod

import torch

from splitlearn_comm.core.packed import Packed
from splitlearn_comm.server.backend import Inference
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.runtime.base import BeginsForwards
from splitlearn_manager.runtime.sequences import LONGEST, MOST_TOGETHER

_WEIGHT_OF_LAST = 0.2
CPU = "cpu"
_SENT_S = 0.04
_SENT_BYTES = 4 * 2**20
"""What another process runs is begun by the thread that polls if it is expected to take no longer, and has
no more bytes to be copied."""
_SENT_AT_A_TIME = 64
"""A process that stands still takes a few hundred connections; to make the next one is to wait for it."""
_FORGETS = 0.98
ENOUGH_TOKENS = 128
"""Sequences of one length with so many tokens are a batch by themselves: to add others would gain less than
it costs to keep them apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request in the queue. Its lease is given back when it has been answered or refused."""

    inference: Inference
    lease: Lease
    packed: Packed
    came_s: float

    @property
    def rows(self) -> int:
        """Its size in the dimension along which requests are joined; 0 if it cannot be joined."""
        shape = self.packed.shape
        return shape[0] if shape else 0

    @property
    def tokens(self) -> int:
        """The values in it."""
        return prod(self.packed.shape)

    @property
    def is_short_sequence(self) -> bool:
        """Whether it may be joined with sequences of other lengths, if its model's may."""
        shape = self.packed.shape
        if self.packed.dtype is torch.bool:
            return False
        return len(shape) == 2 and shape[0] > 0 and 0 < shape[1] <= LONGEST

    def goes_with(self, other: Waiting) -> bool:
        """Whether the two may be in one batch."""
        mine, others = self.packed, other.packed
        return mine.dtype is others.dtype and mine.shape[1:] == others.shape[1:] and other.rows > 0


@dataclass(slots=True, eq=False)
class Queue:
    """The requests of one instance.

    Attributes:
        running: forwards under way.
        joins: whether its requests may be joined.
        joins_lengths: whether short sequences may be, whatever their lengths.
        request_s: what a request takes of a forward, in seconds, of late; None before the first.
        had_s: the time that it has had, by its weight; see `splitlearn_manager.server.fairness`.
        begins: whether its forwards run elsewhere, so that a thread that begins one need not wait for it.
        at_once: requests that were here at a time, waiting or in a forward: the most of late.
        in_forwards: requests in forwards under way.
        where: the device whose forwards its own count among; what is not on a GPU takes the processor.
    """

    instance: ManagedModel
    joins: bool
    joins_lengths: bool = False
    begins: bool = False
    waiting: deque[Waiting] = field(default_factory=deque)
    running: int = 0
    request_s: float | None = None
    had_s: float = 0.0
    at_once: float = 0.0
    in_forwards: int = 0
    where: str = field(init=False)

    def __post_init__(self) -> None:
        device = self.instance.device
        self.where = device if device.startswith("cuda") else CPU

    @property
    def largest(self) -> int:
        """The most rows of a batch."""
        limit = self.instance.largest_batch
        size = self.instance.config.batch_size
        return size if limit is None else min(size, limit)

    @property
    def most(self) -> int | None:
        """Forwards under way at a time; None where requests are not joined.

        On a GPU and in another process, the next batch is joined and copied while one runs.
        """
        if not self.joins:
            return None
        running = self.instance.running
        return 2 if running is not None and running.overlaps else 1

    def wants(self, apart: int) -> bool:
        """Whether it would run another batch, were it its turn.

        Args:
            apart: most forwards at a time where requests are not joined.
        """
        if not self.waiting or self.running >= (self.most or apart):
            return False
        if not (self.begins and self.joins and self.running):
            return True
        # Two batches of half the callers each: a process computes one while the other's are answered and ask
        # again. What came first alone would be a small one, for as long as the other takes.
        return len(self.waiting) >= min(self.at_once / 2, self.largest)

    def is_short(self, limit_s: float) -> bool:
        """Whether the next batch is one for the thread that polls: expected to take no longer than that, or
        to be computed elsewhere while that thread does other things."""
        config = self.instance.config
        if self.request_s is None or config.max_queue_delay_ms:
            return False
        requests = min(len(self.waiting), self.largest) if self.joins else 1
        if self.begins:
            if self.running >= _SENT_AT_A_TIME:
                return False
            size = len(self.waiting[0].packed.data) * requests
            return self.request_s * requests <= _SENT_S and size <= _SENT_BYTES
        if config.runtime == "process" and requests > 1:
            # While its worker computes, this thread could begin the next requests.
            return False
        return self.instance.device == "cpu" and self.request_s * requests <= limit_s

    def took(self, requests: int, seconds: float) -> None:
        """Take note of a forward."""
        each_s = seconds / max(1, requests)
        known_s = each_s if self.request_s is None else self.request_s
        self.request_s = known_s + _WEIGHT_OF_LAST * (each_s - known_s)

    def ripe_s(self) -> float:
        """When the first request has waited long enough for a batch to fill."""
        first, delay_ms = self.waiting[0], self.instance.config.max_queue_delay_ms
        if not delay_ms or not self.joins or sum(w.rows for w in self.waiting) >= self.largest:
            return first.came_s
        return first.came_s + delay_ms / 1000

    def take(self) -> list[Waiting]:
        """The next batch: the first request, and those that go with it, in their order.

        Where those are few, short sequences of other lengths fill it.
        """
        self.at_once = max(self.at_once * _FORGETS, len(self.waiting) + self.in_forwards)
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
        if self.joins_lengths and self.waiting:
            self._fill(batch, rows)
        return batch

    def _fill(self, batch: list[Waiting], rows: int) -> None:
        """Add sequences of other lengths to a batch of one length, those first that have waited longest."""
        first, tokens = batch[0], sum(waiting.tokens for waiting in batch)
        if not first.is_short_sequence or tokens >= ENOUGH_TOKENS:
            return
        left: deque[Waiting] = deque()
        passed: set[tuple[int, ...]] = set()
        for other in self.waiting:
            shape = other.packed.shape
            if (
                other.is_short_sequence
                and other.packed.dtype is first.packed.dtype
                and shape[1:] not in passed
                and rows + other.rows <= self.largest
                and tokens + other.tokens <= MOST_TOGETHER
            ):
                batch.append(other)
                rows, tokens = rows + other.rows, tokens + other.tokens
            else:
                # Others of its length must not overtake it.
                passed.add(shape[1:])
                left.append(other)
        self.waiting = left


def queue_of(instance: ManagedModel) -> Queue:
    """The queue of an instance, kept with it for as long as it lives."""
    queue = instance.queue
    if not isinstance(queue, Queue):
        running = instance.running
        joins = running is not None and running.joins
        joins_lengths = running is not None and running.joins_lengths
        queue = instance.queue = Queue(instance, joins, joins_lengths)
        queue.begins = (
            running is not None
            and queue.where == CPU
            and hasattr(select, "epoll")
            and isinstance(running.compute_function, BeginsForwards)
        )
    return queue
