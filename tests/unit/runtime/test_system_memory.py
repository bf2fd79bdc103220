"""What the C library keeps of memory that a batch has freed, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, threading
import psutil, torch
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch, trim_heap

keep_for_the_next_batch()

def batch():
    pieces = [torch.ones(512 * 1024) for _ in range(10)]

def faults_of_batches():
    for _ in range(5):
        batch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        batch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    found["faults"] = faults_of_batches()
    kept = psutil.Process().memory_info().rss
    trim_heap()
    found["given_back"] = kept - psutil.Process().memory_info().rss

found = {}
torch.set_num_threads(1)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
print(json.dumps(found))
"""
BATCH_BYTES = 20 * 2**20
PAGES_OF_BATCHES = 20 * BATCH_BYTES // os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")


def measured(**environment: str) -> dict[str, int]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        capture_output=True,
        text=True,
        env={**own, **environment},
    )
    return dict(json.loads(done.stdout))


def test_the_next_batch_finds_the_memory_of_the_one_before() -> None:
    kept = measured()
    assert kept["faults"] < PAGES_OF_BATCHES / 20


def test_what_is_kept_is_returned_when_the_heap_is_trimmed() -> None:
    kept = measured()
    assert kept["given_back"] > BATCH_BYTES * 0.9


def test_the_environment_goes_first() -> None:
    told = measured(MALLOC_TRIM_THRESHOLD_="131072")
    assert told["faults"] > PAGES_OF_BATCHES / 2
