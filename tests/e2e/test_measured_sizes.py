"""What a node knows of the size of models: before it reads them, once it has loaded them, after a restart."""

from __future__ import annotations

import ctypes
import json
import mmap
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.command_line import reconcile
from support.node import Node
from support.waiting import eventually

NET = """
from torch import nn


def build(wide=8192):
    return nn.Sequential(nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, 64))
"""
SETTINGS = {"memory_quota_mb": {"cpu": 100}, "settle_s": 0.1, "resync_s": 0.2}
WEIGHTS_MB = (2 * 64 * 8192 + 8192 + 64) * 4 / 2**20
ACTIVATIONS_MB = 32 * (64 + 2 * 8192) * 4 / 2**20
"""A batch of 32: the input, and the hidden layer before and after its ReLU."""


def declare(directory: Path, model_id: str, weights: str, **keys: object) -> None:
    values = {
        "model_id": model_id,
        "model_path": weights,
        "config": {"factory": "net:build", "input_shape": [-1, 64]},
        **keys,
    }
    (directory / f"{model_id}.yaml").write_text(json.dumps(values))


@pytest.fixture
def desired(tmp_path: Path) -> Path:
    """A directory that declares one model, `small`."""
    directory = tmp_path / "desired"
    directory.mkdir()
    (directory / "net.py").write_text(NET)
    layers = {"0.weight": (8192, 64), "0.bias": (8192,), "2.weight": (64, 8192), "2.bias": (64,)}
    tensors = {name: torch.zeros(shape) for name, shape in layers.items()}
    save_file(tensors, directory / "small.safetensors")
    declare(directory, "small", "small.safetensors")
    return directory


def vast(path: Path, gigabytes: int) -> None:
    """A safetensors file with so much in it, of which nothing but the header takes room on the disk."""
    size = gigabytes * 2**30
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"w": tensor}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def bytes_in_memory(path: Path) -> int:
    """How much of a file has been read: its pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    states = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file:
        start = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0
        )
    try:
        assert not libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), states)
        return bytes(states).translate(_LOWEST_BIT).count(1) * mmap.PAGESIZE
    finally:
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))


_LOWEST_BIT = bytes(state & 1 for state in range(256))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in the page cache")
def test_a_model_larger_than_its_device_is_refused_before_its_weights_are_read(
    desired: Path,
) -> None:
    with Node(desired, SETTINGS) as node:
        node.wait_phase("small", "Ready")
        vast(desired / "vast.safetensors", 50)
        declare(desired, "vast", "vast.safetensors")
        status = node.wait_phase("vast", "Pending")
        refusal = eventually(lambda: node.find("model=vast reason=InsufficientMemory"), "refused")
        told = (
            "needs 51,200 MB on cpu, where all models together may take 100 MB; held by: small 6 MB"
        )
        assert told in str(status["message"])
        assert told in refusal[0]
        assert (status["estimated_mb"], status["memory_mb"]) == (51_200.0, None)
        assert not node.find("event=Loading model=vast")
        # What the kernel reads ahead of the header is all that it has read.
        assert bytes_in_memory(desired / "vast.safetensors") < 2 * 2**20
        assert node.status("small")["phase"] == "Ready"
    assert not node.find("event=LoadFailed")


def test_what_was_measured_is_told_beside_the_estimate_and_survives_a_kill(desired: Path) -> None:
    def sizes(node: Node) -> dict[str, object]:
        status = node.wait_phase("small", "Ready")
        keys = ("estimated_mb", "weights_mb", "activations_mb", "memory_mb", "reserved_mb")
        return {key: status[key] for key in keys}

    with Node(desired, SETTINGS) as node:
        first = sizes(node)
        assert first == {
            "estimated_mb": WEIGHTS_MB,
            "weights_mb": WEIGHTS_MB,
            "activations_mb": pytest.approx(ACTIVATIONS_MB),
            "memory_mb": pytest.approx(WEIGHTS_MB + ACTIVATIONS_MB),
            "reserved_mb": first["memory_mb"],
        }
        series = node.get("/metrics")[1]
        assert f'splitlearn_model_estimated_mb{{model_id="small"}} {WEIGHTS_MB}' in series
        assert f'measured_mb{{model_id="small",part="weights"}} {WEIGHTS_MB}' in series
        assert f'measured_mb{{model_id="small",part="activations"}} {ACTIVATIONS_MB}' in series
        told = reconcile("status", "small", str(desired)).stdout
        assert "4 MB of weights, 2 MB of activations for its largest batch" in told
        assert (
            "its weights were estimated at 4 MB"
            in reconcile("explain", "small", str(desired)).stdout
        )
        eventually(lambda: "measured" in _kept(node), "what was measured is kept")
        node.kill()
    # With a quota between the estimate and what was measured, only one that remembers refuses it.
    quota = {"cpu": WEIGHTS_MB + ACTIVATIONS_MB / 2}
    with Node(desired, {**SETTINGS, "memory_quota_mb": quota}) as node:
        status = node.wait_phase("small", "Pending")
        assert status["reason"] == "InsufficientMemory"
        assert not node.find("event=Loading")
    with Node(desired, SETTINGS) as node:
        assert sizes(node) == first


def _kept(node: Node) -> str:
    return "".join(path.read_text() for path in node.state_dir.rglob("models-*.json"))
