"""Whatever is joined with what, each request gets the answer that it would have got alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitlearn_manager.server.batching import Batcher
from splitlearn_manager.server.threads import ThreadPlan
from support.inferences import Gate, ask, instance_of

torch.manual_seed(0)
MODULES = {
    "mlp": nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5)).eval(),
    "attention": nn.TransformerEncoderLayer(
        6, nhead=2, dim_feedforward=8, dropout=0.0, batch_first=True
    ).eval(),
    "normalized": nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()).eval(),
}

requests = st.tuples(st.integers(1, 4), st.sampled_from((1, 2, 3)))
"""Rows, and length of the second dimension."""


@given(
    kind=st.sampled_from(sorted(MODULES)),
    shapes=st.lists(requests, min_size=1, max_size=12),
    batch_size=st.integers(1, 8),
    joins=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_joined_requests_are_answered_as_alone(
    kind: str, shapes: list[tuple[int, int]], batch_size: int, joins: bool, seed: int
) -> None:
    """Seen to fail with the parts of an output given out in reverse order, and with `batch_size` compared
    with the number of requests instead of their rows."""
    torch.manual_seed(seed)
    module = MODULES[kind]
    gate = Gate(module)
    batcher = Batcher(ThreadPlan(2, lambda: 1, {"OMP_NUM_THREADS": "1"}))
    instance = instance_of(gate, joins=joins, batch_size=batch_size)
    (first,) = ask(batcher, instance, torch.randn(1, 1, 6))
    gate.wait_entered()
    tensors = [torch.randn(rows, length, 6) for rows, length in shapes]
    asked = ask(batcher, instance, *tensors)
    gate.open.set()
    first.result()
    for one, tensor in zip(asked, tensors, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(one.result(), module(tensor))
    assert sum(gate.rows) == 1 + sum(rows for rows, _ in shapes)
    assert all(rows <= max(batch_size, *(r for r, _ in shapes), 1) for rows in gate.rows)
    batcher.stop()
