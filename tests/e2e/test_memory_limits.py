"""A node whose process may not have the memory that its models would take survives, and serves them all."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_manager.core.others_use import floor_mb
from support.big_models import X, declare_big, write_factory
from support.memory_cap import ADDRESS_SPACE, CGROUP, MemoryCap, cgroups_permitted
from support.node import Node
from support.served import history
from support.waiting import eventually

MODELS, EACH_MB = 15, 100
ROOM_MB = {CGROUP: 630, ADDRESS_SPACE: 485}
"""What is left for models beside the node itself and what the node keeps free."""
SETTINGS = {"max_models": 100, "settle_s": 0.1, "resync_s": 0.2}
IN_A_GROUP = pytest.mark.skipif(
    not cgroups_permitted(), reason="no control groups may be made here"
)

# Takes as many MB more as each line of its input says, and tells when it has them.
HOG = """
import sys
held = []
for line in sys.stdin:
    held.append(b"x" * (int(line) << 20))
    print("taken", flush=True)
"""


def patient(node: Node) -> GRPCComputeClient:
    """A client that tries again while its model is loaded, as those of version 1.0 do."""
    return GRPCComputeClient(
        node.address, timeout=60, retry_strategy=FixedDelay(max_attempts=600, delay_s=0.1)
    )


def limit_for(tmp_path: Path, kind: str) -> float:
    """The limit, in MB, that leaves models their room: a node takes more with a PyTorch for GPUs."""
    directory = tmp_path / "base" / "desired"
    directory.mkdir(parents=True)
    write_factory(directory)
    declare_big(directory, "small", 1, 1.0)
    with Node(directory, SETTINGS) as node, patient(node) as client:
        node.wait_phase("small", "Ready")
        client.compute(X, model_id="small")
        memory = psutil.Process(node.process.pid).memory_info()
    # Pages of libraries are charged to the group that read them first, which is another one.
    base_mb = (memory.rss - memory.shared if kind == CGROUP else memory.vms) / 2**20
    wanted_mb = base_mb + ROOM_MB[kind]
    return wanted_mb + floor_mb(wanted_mb / 0.95)


@pytest.mark.parametrize("kind", [pytest.param(CGROUP, marks=IN_A_GROUP), ADDRESS_SPACE])
def test_more_models_than_fit_are_all_served_and_the_node_survives(
    tmp_path: Path, kind: str
) -> None:
    limit_mb = limit_for(tmp_path, kind)
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    for number in range(MODELS):
        declare_big(directory, f"m{number}", EACH_MB, 1.0 + number)
    order = [*range(MODELS)] * 2
    random.Random(5).shuffle(order)
    with (
        MemoryCap(kind, limit_mb) as cap,
        Node(directory, {**SETTINGS, "max_memory_percent": 100}, launcher=cap.launcher) as node,
        patient(node) as client,
    ):
        eventually(
            lambda: all(node.status(f"m{n}") for n in range(MODELS)), "all models are declared"
        )
        for number in order:
            answer = client.compute(X, model_id=f"m{number}")
            assert answer.tolist() == [[1.0 + number] * 4]
        assert node.process.poll() is None
        assert cap.kills() == 0
        # For each new thread the C library reserves 128 MB of address space for a moment: a load that meets
        # such a moment is tried again.
        forgiven = "reason=OutOfMemory" if kind == ADDRESS_SPACE else "nothing"
        assert not [line for line in node.find("event=LoadFailed") if forgiven not in line]
        assert node.find("event=Evicted")
        # It makes use of what it has, too.
        assert sum(node.status(f"m{n}").get("phase") == "Ready" for n in range(MODELS)) >= 3


def limit_now_mb(node: Node) -> float:
    """What models may take at this moment."""
    devices = json.loads(node.get("/api/v1/node")[1])["devices"]
    return float(next(d["limit_mb"] for d in devices if d["device"] == "cpu"))


@IN_A_GROUP
def test_idle_models_go_for_a_neighbour_that_grows_and_come_back_when_it_ends(
    tmp_path: Path,
) -> None:
    limit_mb = limit_for(tmp_path, CGROUP)
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    declare_big(directory, "pinned", EACH_MB, 7.0, pinned=True)
    for number in range(3):
        declare_big(directory, f"m{number}", EACH_MB, 1.0 + number)
    hog = [sys.executable, "-c", HOG]
    with (
        MemoryCap(CGROUP, limit_mb) as cap,
        Node(directory, {**SETTINGS, "max_memory_percent": 100}, launcher=cap.launcher) as node,
        patient(node) as client,
    ):
        ids = ["pinned", *(f"m{n}" for n in range(3))]
        for model_id in ids:
            node.wait_phase(model_id, "Ready")
            client.compute(X, model_id=model_id)
        with subprocess.Popen(
            [*cap.launcher, *hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as neighbour:
            assert neighbour.stdin is not None
            assert neighbour.stdout is not None
            for _ in range(9):
                before = limit_now_mb(node)
                neighbour.stdin.write("40\n")
                neighbour.stdin.flush()
                assert neighbour.stdout.readline() == "taken\n", "the neighbour was killed"
                # Nobody takes memory faster than it is looked at, or nobody could make way.
                eventually(lambda b=before: limit_now_mb(node) <= b - 30, "the node has seen it")
                assert client.compute(X, model_id="pinned").tolist() == [[7.0] * 4]
            gone = [m for m in ids if "MemoryPressure" in dict(history(node.status(m)))]
            assert gone
            assert "pinned" not in gone
            assert cap.kills() == 0
            neighbour.stdin.close()
        for model_id, value in zip(ids, (7.0, 1.0, 2.0, 3.0), strict=True):
            assert client.compute(X, model_id=model_id).tolist() == [[value] * 4]
        assert node.process.poll() is None
        assert cap.kills() == 0
        assert not node.find("event=LoadFailed")
