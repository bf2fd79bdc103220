"""What a command loads: only those that load models load torch, and a look at a node is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_node import FakeNode, model

_LOADED = """
import sys
sys.argv = ["splitlearn-manager"]
from splitlearn_manager.cli import reconcile_main
try:
    reconcile_main({arguments!r})
except SystemExit:
    pass
print(*sorted({names!r} & set(sys.modules)))
"""
HEAVY = {
    "torch",
    "transformers",
    "grpc",
    "numpy",
    "watchdog",
    "prometheus_client",
    "ruamel.yaml",
    "splitlearn_manager.config",
}


def loaded(arguments: list[str], names: set[str]) -> list[str]:
    """Which of these modules the command has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED.format(arguments=arguments, names=names)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["validate"], ["apply", "--timeout", "0"], ["schema"], ["--help"]],
)
def test_what_needs_no_model_loads_neither_torch_nor_grpc(here: Path, arguments: list[str]) -> None:
    (here / "desired").mkdir()
    with FakeNode(here / "desired", model("bert")):
        assert loaded(arguments, {"torch", "transformers", "grpc"}) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["status", "bert"],
        ["wait"],
        ["events"],
        ["explain", "bert"],
        ["history", "bert"],
        ["suspend", "bert"],
        ["resume", "bert"],
        ["retry", "bert"],
        ["golden", "bert"],
    ],
)
def test_what_asks_a_node_loads_little_more_than_what_prints_the_answer(
    here: Path, arguments: list[str]
) -> None:
    (here / "desired").mkdir()
    with FakeNode(here / "desired", model("bert")):
        assert loaded(arguments, HEAVY) == []
