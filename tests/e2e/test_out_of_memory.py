"""A request for which there is no memory fails alone, on the processor and, where there is one, on a GPU."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import torch

from splitlearn_comm.client import RemoteComputeError
from support.node import Node
from support.served import (
    Callers,
    condition,
    constant,
    declare,
    history,
    impatient,
    loads,
    write_factory,
)
from support.waiting import eventually

# Each row but the first asks for more than any machine has, from the allocator that models use.
HUNGRY = """
import torch
from torch import nn


class Hungry(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        rows = torch.ones(3, *x.shape, device=x.device)
        torch.empty((x.shape[0] - 1) * 2**50, dtype=torch.uint8, device=x.device)
        return rows[0] * x * self.two


def hungry():
    return Hungry()
"""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    ),
]


def batch(rows: int) -> torch.Tensor:
    return torch.ones(rows, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_it_fails_alone_and_smaller_batches_come_next(tmp_path: Path, device: str) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    (directory / "greedy.py").write_text(HUNGRY, encoding="utf-8")
    shape = {"input_shape": [-1, 4]}
    declare(directory, "hungry", model_path="greedy:hungry", device=device, config=shape)
    declare(directory, "good", config=constant(1.0), device=device)
    with Node(directory, {"settle_s": 0.1, "resync_s": 0.2}) as node:
        node.wait_phase("hungry", "Ready")
        node.wait_phase("good", "Ready")
        with Callers(node, "good"), impatient(node) as client:
            for rows in (40, 100, 40):
                with pytest.raises(RemoteComputeError) as refused:
                    client.compute(batch(rows), model_id="hungry")
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert f"model 'hungry' ran out of memory on a batch of {rows}" in str(
                    refused.value
                )
            # It is tried each time, whatever failed before: the memory may be back.
            answer = client.compute(batch(1), model_id="hungry")
            assert torch.equal(answer, torch.full((1, 4), 2.0))
        told = eventually(
            lambda: (
                "at most 20" in condition(node.status("hungry"), "Warmed")["message"]
                and node.status("hungry")
            ),
            "the status tells of smaller batches",
        )
        assert told["phase"] == "Ready"
        # Once: batches of 40 and more were known to be too large by then.
        assert [reason for reason, _ in history(told)].count("OutOfMemory") == 1
        assert len(node.find("event=OutOfMemory")) == 1
        assert loads(node, "hungry") == loads(node, "good") == 1
        assert not node.find("Traceback")
