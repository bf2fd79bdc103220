"""Requests for a batcher without a network, and instances of real modules that answer them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

import torch
from torch import nn

from splitlearn_comm.core import (
    ComputeError,
    ComputeFunction,
    DeadlinePassed,
    ModelComputeFunction,
    TensorCodec,
)
from splitlearn_comm.core.packed import Output, Packed, Rows, joined
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.runtime.base import BeginsForwards, Begun, TakesSequences
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
    """A running model that is a real module; `apart`: which runs elsewhere, as in a worker."""

    def __init__(
        self, module: nn.Module, *, joins: bool, apart: bool = False, **keys: object
    ) -> None:
        super().__init__(model("m", **keys), 1.0)
        takes_sequences = isinstance(module, TakesSequences)
        in_place = SequenceFunction if takes_sequences else ModelComputeFunction
        self.function = Apart(module) if apart else in_place(module)
        self.joins, self.joins_lengths = joins, joins and takes_sequences
        self.overlaps = apart

    @property
    def compute_function(self) -> object:
        return self.function


class Apart(BeginsForwards):
    """Runs a module's forwards on threads of their own, one at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.turn = threading.Lock()

    def begin(self, parts: Sequence[Packed]) -> Begun:
        return _ApartForward(self, joined(parts))


class _ApartForward(Begun):
    def __init__(self, function: Apart, tensor: torch.Tensor) -> None:
        self._ours, theirs = socket.socketpair()
        self._output: Output | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(function, tensor, theirs), daemon=True).start()

    def _run(self, function: Apart, tensor: torch.Tensor, theirs: socket.socket) -> None:
        try:
            with function.turn, torch.inference_mode():
                self._output = Output(function.module(tensor))
        except BaseException as error:
            self._error = error
        self._done.set()
        theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def take(self) -> Output | None:
        return self.finish() if self._done.is_set() and self._error is None else None

    def finish(self) -> Output:
        assert self._done.wait(PATIENCE_S), "it never ends"
        self._ours.close()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output


def instance_of(
    module: nn.Module,
    model_id: str = "m",
    *,
    joins: bool = True,
    device: str = "cpu",
    apart: bool = False,
    **keys: object,
) -> ManagedModel:
    """A READY instance, which says that it is on `device`; the module itself is on the processor."""
    spec = ModelSpec.of(model(model_id, **keys))
    instance = ManagedModel(
        f"{model_id}#1", spec, owner=Owner.API, device=device, loading_since_s=0
    )
    instance.running = OfModule(module, joins=joins, apart=apart, **keys)
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


def begun(function: ComputeFunction, parts: Sequence[Packed]) -> Begun:
    """A forward that a worker runs."""
    assert isinstance(function, BeginsForwards)
    return function.begin(parts)


def whole(begun: Begun) -> torch.Tensor:
    """Its answer to all rows."""
    output = begun.finish()
    assert isinstance(output, Output)
    return output.tensor()
