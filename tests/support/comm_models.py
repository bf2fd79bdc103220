"""Small models and compute functions with answers that a test can work out itself."""

from __future__ import annotations

import threading

import torch
from torch import nn

from splitlearn_comm.core import ComputeFunction


class Attention(nn.Module):
    """One layer of causal attention over [batch, seq, 4] with a key/value cache of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(
        self,
        x: torch.Tensor,
        past_key_values: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[tuple[torch.Tensor, torch.Tensor], ...]]:
        batch, seq, _ = x.shape
        query, key, value = (
            part.reshape(batch, seq, 2, 2).transpose(1, 2) for part in self.project(x).chunk(3, -1)
        )
        if past_key_values is not None:
            key = torch.cat([past_key_values[0][0], key], 2)
            value = torch.cat([past_key_values[0][1], value], 2)
        visible = torch.ones(seq, key.shape[2], dtype=torch.bool).tril(key.shape[2] - seq)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        output = mixed.transpose(1, 2).reshape(batch, seq, 4)
        return (output, ((key, value),)) if use_cache else output


class Doubler(ComputeFunction):
    """Takes nothing but the tensor; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.events: list[str] = []

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return input_tensor * 2

    def setup(self) -> None:
        self.events.append("setup")

    def teardown(self) -> None:
        self.events.append("teardown")


class Gate(ComputeFunction):
    """Holds every call until the test lets it go.

    Attributes:
        entered: released once for each call that began.
        open: set it to let all calls go.
    """

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.calls = 0

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.entered.release()
        assert self.open.wait(60), "the test never opened the gate"
        return input_tensor

    def wait_entered(self, count: int = 1) -> None:
        """Wait until `count` more calls have begun."""
        for _ in range(count):
            assert self.entered.acquire(timeout=60), "no call began"


class Raising(ComputeFunction):
    """Raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        raise self.error


class RaisingInTraining(Raising):
    """The same, and it can be trained as far as it says."""

    def forward_for_training(self, input_tensor: torch.Tensor, forward_id: str) -> torch.Tensor:
        raise self.error

    def backward(
        self, forward_id: str, grad_output: torch.Tensor, learning_rate: float | None = None
    ) -> torch.Tensor:
        raise self.error
