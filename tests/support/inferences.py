"""Requests for a batcher without a network, and instances of real modules that answer them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

from splitlearn_comm.core import ComputeError, DeadlinePassed, ModelComputeFunction, TensorCodec
from splitlearn_comm.core.packed import Packed, Rows
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.runtime.base import TakesSequences
from splitlearn_manager.runtime.sequences import SequenceFunction
from splitlearn_manager.server.batching import Batcher
from support.fakes import FakeRunning, model

PATIENCE_S = 20.0


class Asked:
    """A request whose end can be waited for."""

    def __init__(self, tensor: torch.Tensor, until_s: float | None = None) -> None:
        self.tensor = tensor
        self.until_s = until_s
        self.wanted = True
        self.output: torch.Tensor | None = None
        self.error: ComputeError | None = None
        self.ended = threading.Event()
        self.when_ended: Callable[[Asked], None] = lambda asked: None

    def unpack(self, codec: TensorCodec) -> Packed:
        own = TensorCodec(self.tensor.dtype)
        return own.unpack(*own.encode(self.tensor))

    def check_wanted(self) -> None:
        if not self.wanted:
            raise DeadlinePassed("the caller is gone; nothing was computed", "CallerGone")

    def answer(self, model_id: str, output: Rows, computed_ms: float, version: str = "") -> None:
        self._end(output.tensor().clone(), None)

    def refuse(self, error: ComputeError, model_id: str = "") -> None:
        self._end(None, error)

    def result(self) -> torch.Tensor:
        """Its answer; whoever refused it is raised."""
        assert self.ended.wait(PATIENCE_S), "never answered"
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output

    def _end(self, output: torch.Tensor | None, error: ComputeError | None) -> None:
        assert not self.ended.is_set(), "answered twice"
        self.output, self.error = output, error
        self.when_ended(self)
        self.ended.set()


class OfModule(FakeRunning):
    """A running model that is a real module."""

    def __init__(self, module: nn.Module, *, joins: bool, **keys: object) -> None:
        super().__init__(model("m", **keys), 1.0)
        takes_sequences = isinstance(module, TakesSequences)
        self.function = (SequenceFunction if takes_sequences else ModelComputeFunction)(module)
        self.joins, self.joins_lengths = joins, joins and takes_sequences

    @property
    def compute_function(self) -> ModelComputeFunction:
        return self.function


def instance_of(
    module: nn.Module,
    model_id: str = "m",
    *,
    joins: bool = True,
    device: str = "cpu",
    **keys: object,
) -> ManagedModel:
    """A READY instance, which says that it is on `device`; the module itself is on the processor."""
    spec = ModelSpec.of(model(model_id, **keys))
    instance = ManagedModel(
        f"{model_id}#1", spec, owner=Owner.API, device=device, loading_since_s=0
    )
    instance.running = OfModule(module, joins=joins, **keys)
    instance.open_for_leases()
    return instance


def leased(instance: ManagedModel) -> Lease:
    assert instance.acquire(0.0)

    def give_back(lease: Lease) -> None:
        instance.release(0.0, duration_s=0.0, ok=lease.ok)

    return Lease(instance, 0.0, give_back)


def ask(batcher: Batcher, instance: ManagedModel, *tensors: torch.Tensor) -> list[Asked]:
    """One request for each tensor, in their order."""
    asked = [Asked(tensor) for tensor in tensors]
    for one in asked:
        batcher.submit(leased(instance), one, one.unpack(TensorCodec()))
    return asked


class Gate(nn.Module):
    """Runs a module once its gate is open; knows the batches that came."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0] if x.dim() else 0)
        self.entered.release()
        assert self.open.wait(PATIENCE_S), "nobody opened the gate"
        result: torch.Tensor = self.module(x)
        return result

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE_S), "no forward began"
