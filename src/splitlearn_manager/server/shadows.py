"""Asks a version that is tried in a shadow what the old version has answered, and compares.

    request ─► old version ─► answer sent ─► copy of the request ─► new version ─► compared, and thrown away

A copy is made of the request as it came, before a model may write into it, and nothing of it reaches the
caller: neither what the new version says nor how long it takes. Where too much waits, nothing is asked, and
what was not asked in the end is no request of the new version: it proves nothing.
"""

from __future__ import annotations

import logging
import time

import torch

from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.errors import ComputeError, DeadlinePassed
from splitlearn_comm.core.packed import Packed, Rows
from splitlearn_comm.server.backend import Inference
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.logs import log_event
from splitlearn_manager.server.batching import Batcher

log = logging.getLogger(__name__)

_MOST_WAITING = 8
"""So many copies wait at most: a new version that is slower must not take the processors from the old one."""
_PATIENCE_S = 60.0


class Shadows:
    """See the module's text."""

    def __init__(self, manager: ModelManager, batcher: Batcher) -> None:
        self._manager = manager
        self._batcher = batcher

    def follow(
        self, version: ManagedModel, inference: Inference, packed: Packed
    ) -> tuple[Inference, Packed]:
        """The request, so that `version` is asked the same once it has been answered."""
        if version.in_flight >= _MOST_WAITING:
            return inference, packed
        # What is a view is taken over by the first that makes a tensor of it.
        copied = bytes(packed.data)
        copy = Packed(copied, packed.shape, packed.dtype)
        first = Packed(copied, packed.shape, packed.dtype)
        return _Followed(inference, lambda answer: self._ask(version, copy, answer)), first

    def _ask(self, version: ManagedModel, packed: Packed, answer: torch.Tensor) -> None:
        # Again: many requests may have been answered at once.
        if version.trial is None or version.in_flight >= _MOST_WAITING:
            return
        lease = self._manager.try_lease(version)
        if lease is None:
            return
        try:
            self._batcher.submit(lease, _Shadow(lease, answer), packed)
        except ComputeError:
            lease.counts = False
            lease.release()


class _Followed:
    """A request as it is, whose answer is told to somebody once it has been sent."""

    def __init__(self, inference: Inference, then: object) -> None:
        self._inference = inference
        self._then = then
        self.until_s = inference.until_s
        self.unpack = inference.unpack
        self.check_wanted = inference.check_wanted
        self.refuse = inference.refuse

    def answer(self, model_id: str, output: Rows, computed_ms: float, version: str = "") -> None:
        self._inference.answer(model_id, output, computed_ms, version)
        try:
            self._then(output.tensor().clone())  # type: ignore[operator]
        except Exception:
            log_event(log, logging.ERROR, "ShadowFailed", exc_info=True, model=model_id)


class _Shadow:
    """The copy of a request, for which nobody waits."""

    def __init__(self, lease: Lease, expected: torch.Tensor) -> None:
        self._lease = lease
        self._version = lease.instance
        self._expected = expected
        self.until_s: float | None = time.monotonic() + _PATIENCE_S

    def unpack(self, codec: TensorCodec) -> Packed:
        raise AssertionError("it is unpacked")

    def check_wanted(self) -> None:
        if self._version.trial is None:
            raise DeadlinePassed("the trial is over; nothing was computed")

    def answer(self, model_id: str, output: Rows, computed_ms: float, version: str = "") -> None:
        trial = self._version.trial
        if trial is not None:
            trial.compared += 1
            trial.worst = max(trial.worst, _apart(self._expected, output.tensor()))

    def refuse(self, error: ComputeError, model_id: str = "") -> None:
        self._lease.counts = self._version.trial is not None
        log.debug("model_id=%s reason=%s in a shadow", model_id, error.reason)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two values; infinite if the shapes differ, or only one is a number."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    alike = (one == other) | (one.isnan() & other.isnan())
    apart = (one.double() - other.double()).abs().masked_fill(alike, 0.0)
    return float(apart.nan_to_num(nan=float("inf")).max())
