"""How many forwards run at a time, and on how many processors, for each kind of node."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from splitlearn_manager.server.threads import ThreadPlan, processors

AVAILABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("max 100000\n", AVAILABLE),
        ("10000000 100000\n", AVAILABLE),
        ("not a limit", AVAILABLE),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, expected: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    assert processors(file) == expected


def test_without_such_a_file_the_processors_of_the_process_count(tmp_path: Path) -> None:
    assert processors(tmp_path / "none") == AVAILABLE


@pytest.mark.parametrize(
    ("ready", "threads"), [(0, 8), (1, 8), (2, 4), (3, 2), (4, 2), (8, 1), (100, 1)]
)
def test_ready_models_share_the_processors(ready: int, threads: int) -> None:
    plan = ThreadPlan(8, lambda: ready, {})
    assert (plan.forwards, plan.intra_op_threads) == (8, threads)


def test_what_an_operator_says_counts_and_can_be_taken_back() -> None:
    plan = ThreadPlan(8, lambda: 1, {})
    plan.configure(2, 3)
    assert (plan.forwards, plan.intra_op_threads) == (2, 3)
    plan.configure(2, None)
    assert (plan.forwards, plan.intra_op_threads) == (2, 8)
    plan.configure(None, None)
    assert plan.forwards == 8


def test_with_omp_num_threads_pytorch_is_left_alone_unless_an_operator_says_otherwise() -> None:
    plan = ThreadPlan(8, lambda: 1, {"OMP_NUM_THREADS": "1"})
    assert plan.intra_op_threads is None
    plan.configure(None, 4)
    assert plan.intra_op_threads == 4


def test_a_thread_is_set_up_for_its_next_forward() -> None:
    usual = torch.get_num_threads()
    plan = ThreadPlan(8, lambda: 1, {})
    seen: list[int] = []

    def forwards() -> None:
        for threads in (1, 3, 2):
            plan.configure(None, threads)
            plan.prepare()
            seen.append(torch.get_num_threads())

    thread = threading.Thread(target=forwards)
    thread.start()
    thread.join()
    torch.set_num_threads(usual)
    assert seen == [1, 3, 2]
