"""Copies of requests for a version that is tried in a shadow: which of them are asked, and count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from splitlearn_comm.core import TensorCodec
from splitlearn_comm.core.packed import Output
from splitlearn_comm.server.backend import Inference
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.rollout import Traffic, Trial
from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.shadows import Shadows
from splitlearn_manager.server.threads import ThreadPlan
from support.fakes import Bench
from support.inferences import Asked, Gate, instance_of
from support.waiting import eventually

X = torch.ones(1, 4)
MOST = 8


class Shadow:
    """A version that is tried and answers only once its gate is open, one request at a time."""

    def __init__(self, **keys: object) -> None:
        self.gate = Gate(nn.Identity())
        rollout = {"shadow": {"percent": 100, "for_s": 60}}
        self.version: ManagedModel = instance_of(self.gate, joins=False, rollout=rollout, **keys)
        self.version.trial = Trial(self.version.config, 0.0, Traffic())
        self.shadows = Shadows(Bench().manager, Batcher(ThreadPlan(2, lambda: 1), apart=1))

    def follow(self) -> Inference:
        asked = Asked(X)
        return self.shadows.follow(self.version, asked, asked.unpack(TensorCodec()))[0]

    def asks(self, requests: int) -> None:
        """So many requests come, and are all answered after that."""
        for one in [self.follow() for _ in range(requests)]:
            one.answer("m", Output(X).whole(), 1.0)

    def end(self) -> None:
        self.gate.open.set()
        eventually(lambda: self.version.idle, "all that was asked has ended")


@pytest.fixture
def shadow() -> Iterator[Shadow]:
    made = Shadow()
    yield made
    made.end()


def test_no_more_copies_wait_than_may_however_many_are_answered_at_once(shadow: Shadow) -> None:
    """Seen to fail when it is looked at only as requests come."""
    shadow.asks(3 * MOST)
    assert shadow.version.in_flight == MOST


def test_a_copy_that_finds_no_place_in_the_queue_is_no_request_of_the_new_version() -> None:
    """Seen to fail, with a version that answers nothing and takes over, when it counts as one."""
    shadow = Shadow(max_queue=1)
    shadow.asks(1)
    shadow.gate.wait_entered()
    shadow.asks(5)
    assert shadow.version.in_flight == 2
    assert shadow.version.traffic == Traffic()
    shadow.end()
    assert (shadow.version.requests, shadow.version.errors) == (2, 0)


def test_what_waits_when_the_trial_ends_counts_neither_as_a_request_nor_as_an_error(
    shadow: Shadow,
) -> None:
    """Seen to fail, with errors of a version that has just taken over, when it counts as refused."""
    shadow.asks(3)
    shadow.gate.wait_entered()
    shadow.version.trial = None
    shadow.asks(3)
    assert shadow.version.in_flight == 3
    shadow.end()
    assert (shadow.version.requests, shadow.version.errors) == (1, 0)
