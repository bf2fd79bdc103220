"""Watching fails, at the start or later: the node looks by itself, and says so."""

from __future__ import annotations

import os
import resource
import signal
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
from splitlearn_manager.cli.asking import ask
from splitlearn_manager.server.state_dir import socket_of
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


def ending(ends: Path) -> dict[str, str]:
    """The environment of a node whose threads end once their classes are named in that file."""
    path = [str(PRELOAD), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "CHAOS_ENDS": str(ends)}


def end_threads(node: Node, ends: Path, kind: str) -> None:
    """Ends the node's threads of that class; returns when they have ended."""
    replace_file(ends, kind)
    ended = ends.with_name(f"{ends.name}.ended")

    def has_ended() -> bool:
        for directory in (node.directory, node.directory.parent):
            (directory / "noise").touch()  # wakes its thread, which ends once it is told to
        return ended.exists()

    eventually(has_ended, f"every {kind} has ended")


@pytest.mark.parametrize("thread", ["InotifyObserver", "InotifyFD"])
def test_when_the_thread_that_hears_all_ends_the_node_polls_and_says_so(
    tmp_path: Path, thread: str
) -> None:
    directory, ends = served(tmp_path / "desired", MODELS), tmp_path / "ends"
    with Node(directory, SETTINGS, environment=ending(ends)) as node:
        wait_ready(node, MODELS)
        assert node_condition(node, "Watching")["status"] == "True"
        end_threads(node, ends, thread)
        condition = wait_condition(node, "Watching", "False")
        assert condition["reason"] == "Polling"
        assert_edits_are_found(node, 10.0)
        assert_edits_are_found(node, 11.0)


def test_when_the_thread_of_a_directory_ends_the_directory_is_watched_anew(tmp_path: Path) -> None:
    """No look is due for a minute: an edit is found by who hears of it, or not in time."""
    directory, ends = served(tmp_path / "desired", MODELS), tmp_path / "ends"
    settings = {**SETTINGS, "resync_s": 60.0}
    with Node(directory, settings, environment=ending(ends)) as node:
        wait_ready(node, MODELS)
        end_threads(node, ends, "InotifyEmitter")
        ask(socket_of(node.state_dir), "look")
        assert node_condition(node, "Watching")["status"] == "True"
        assert_edits_are_found(node, 10.0)
        assert_edits_are_found(node, 11.0)


def test_when_the_kernel_drops_events_nothing_is_missed(tmp_path: Path) -> None:
    """More happens than inotify keeps, while the process is stopped. No look is due for a minute."""
    directory = served(tmp_path / "desired", MODELS)
    kept = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Node(directory, {**SETTINGS, "resync_s": 60.0}) as node:
        wait_ready(node, MODELS)
        os.kill(node.process.pid, signal.SIGSTOP)
        try:
            for number in range(kept):
                (directory / f"noise-{number % 2}").touch()
            declare(directory, "one", config=constant(10.0))  # of which no event tells
        finally:
            os.kill(node.process.pid, signal.SIGCONT)
        eventually(lambda: answer_of(node, "one") == 10.0, "the edit is served")
        assert_edits_are_found(node, 11.0)
        assert node_condition(node, "Watching")["status"] == "True"
        assert not node.find("Traceback")


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
            eventually(lambda: node.find("Too many open files"), "it cannot look, and says so")
            for _ in range(200):
                assert float(client.compute(X, model_id="two")[0, 0]) == 2.0
            assert float(client.compute(X, model_id="one")[0, 0]) == 1.0
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        eventually(lambda: answer_of(node, "one") == 10.0, "the edit is served")
        assert node.process.poll() is None
