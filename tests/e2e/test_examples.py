"""Every example, run as a person would run it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from support.node import Node

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_basic_server_is_called_by_client_and_stops_when_interrupted() -> None:
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "basic_server.py"), "--port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("serving my_model on ")
        ran = run("client.py", line.split()[-1], "my_model")
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert ran.returncode == 0, ran.stderr
    assert "output shape: (1, 10, 768)" in ran.stdout
    assert "requests: 10" in ran.stdout


def test_client_says_so_if_nobody_answers() -> None:
    ran = run("client.py", "127.0.0.1:1")
    assert ran.returncode == 1
    assert "nobody answers on 127.0.0.1:1" in ran.stderr


def test_multi_model_server_routes_by_model_and_by_endpoint() -> None:
    ran = run("multi_model_server.py")
    assert ran.returncode == 0, ran.stderr
    answers = dict(line.split(": ") for line in ran.stdout.splitlines())
    assert answers["model_a"] == "[4.0, 4.0, 4.0, 4.0]"
    assert answers["model_c"] == "[12.0, 12.0, 12.0, 12.0]"
    assert "shared" in answers


def test_dynamic_models_fails_no_request() -> None:
    ran = run("dynamic_models.py")
    assert ran.returncode == 0, ran.stderr
    assert "none failed, versions in order: True" in ran.stdout
    assert "models loaded: 0" in ran.stdout


def test_sentence_similarity_finds_the_right_sentences_on_a_running_node(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    shutil.copy(ROOT / "desired" / "minilm.yaml", directory)
    with Node(directory) as node:
        node.wait_phase("minilm", "Ready", 90)
        ran = run("sentence_similarity.py", node.address)
    assert ran.returncode == 0, ran.stderr
    assert "nearest sentence right for 6 of 6" in ran.stdout


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "basic_server.py",
        "client.py",
        "dynamic_models.py",
        "multi_model_server.py",
        "sentence_similarity.py",
    }
