"""Watching fails, at the start or later: the node looks by itself, and says so."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from chaos.faults import (
    PRELOAD,
    SETTINGS,
    node_condition,
    served,
    wait_condition,
    wait_ready,
    without_inotify,
)
from support.node import Node
from support.served import X, answer_of, constant, declare, replace_file
from support.waiting import eventually

MODELS = {"one": 1.0, "two": 2.0}


def assert_edits_are_found(node: Node, value: float) -> None:
    declare(node.directory, "one", config=constant(value))
    eventually(lambda: answer_of(node, "one") == value, "the edit is served")


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("max_inotify_instances", "max_user_instances"), ("max_inotify_watches", "max_user_watches")],
)
def test_without_inotify_the_node_polls_and_says_so(
    tmp_path: Path, limit: str, reason: str
) -> None:
    directory = served(tmp_path / "desired", MODELS)
    with Node(directory, SETTINGS, launcher=without_inotify(limit, 0)) as node:
        wait_ready(node, MODELS)
        condition = node_condition(node, "Watching")
        assert (condition["status"], condition["reason"]) == ("False", "Polling")
        assert reason in condition["message"]
        assert 'splitlearn_watch_mode{mode="polling"} 1.0' in node.get("/metrics")[1]
        assert_edits_are_found(node, 10.0)
        assert not node.find("Traceback")


def test_with_too_few_watches_the_rest_is_polled(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", MODELS)
    for number in range(5):
        served(directory / f"below-{number}", {f"deep-{number}": float(number)})
    with Node(directory, SETTINGS, launcher=without_inotify("max_inotify_watches", 3)) as node:
        wait_ready(node, {f"deep-{n}": 0.0 for n in range(5)})
        declare(directory / "below-4", "deep-4", config=constant(44.0))
        eventually(lambda: answer_of(node, "deep-4") == 44.0, "the edit is served")
        assert not node.find("Traceback")


@pytest.mark.parametrize("thread", ["InotifyObserver", "InotifyEmitter", "InotifyFD"])
def test_when_a_watching_thread_ends_the_node_polls_and_says_so(
    tmp_path: Path, thread: str
) -> None:
    directory, ends = served(tmp_path / "desired", MODELS), tmp_path / "ends"
    environment = {"PYTHONPATH": str(PRELOAD), "CHAOS_ENDS": str(ends)}
    path = os.environ.get("PYTHONPATH")
    if path:
        environment["PYTHONPATH"] += os.pathsep + path
    with Node(directory, SETTINGS, environment=environment) as node:
        wait_ready(node, MODELS)
        assert node_condition(node, "Watching")["status"] == "True"
        replace_file(ends, thread)
        declare(directory, "two", config=constant(3.0))  # wakes the thread, which ends
        condition = wait_condition(node, "Watching", "False")
        assert condition["reason"] == "Polling"
        assert_edits_are_found(node, 10.0)
        assert_edits_are_found(node, 11.0)


def test_no_file_descriptor_left_does_not_stop_the_node(tmp_path: Path) -> None:
    """While none can be opened nothing is accepted and nothing unloaded; then all goes on."""
    directory = served(tmp_path / "desired", MODELS)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MODELS)
        with node.client() as client:
            pid = node.process.pid
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, before[1]))
            declare(directory, "one", config=constant(10.0))
            for _ in range(200):
                assert float(client.compute(X, model_id="two")[0, 0]) == 2.0
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        eventually(lambda: answer_of(node, "one") == 10.0, "the edit is served")
        assert node.process.poll() is None
