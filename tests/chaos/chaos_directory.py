"""The directory itself goes: moved away, deleted, replaced, taken down bit by bit. Models stay by default."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.faults import (
    SETTINGS,
    mounted,
    served,
    swap_link,
    wait_condition,
    wait_ready,
)
from splitlearn_manager.cli.asking import ask
from splitlearn_manager.server.state_dir import socket_of
from support.node import Node
from support.served import Callers, answer_of, constant, declare, loads
from support.waiting import eventually

FEW = {"one": 1.0, "two": 2.0}
ROUNDS = 5
MANY = {f"m{n}": float(n) for n in range(1, 7)}


def assert_serves(node: Node, values: dict[str, float]) -> None:
    for model_id, value in values.items():
        assert answer_of(node, model_id) == value
        assert loads(node, model_id) == 1, f"{model_id} was loaded again"


def settings_file(directory: Path) -> None:
    """What `Node` wrote there at first, for a directory that is made anew."""
    values = {"port": 0, "metrics_port": 0, **SETTINGS}
    (directory / "server.yaml").write_text(json.dumps(values))


@pytest.mark.parametrize("values", [FEW, MANY], ids=["two models", "six models"])
def test_moved_away_and_back_changes_nothing(tmp_path: Path, values: dict[str, float]) -> None:
    directory, away = served(tmp_path / "desired", values), tmp_path / "away"
    with Node(directory, SETTINGS) as node, ExitStack() as stack:
        wait_ready(node, values)
        callers: list[Callers] = []
        for model_id in values:
            callers.append(stack.enter_context(Callers(node, model_id)))
        for _ in range(ROUNDS):
            directory.rename(away)
            wait_condition(node, "SourceAvailable", "False")
            assert node.status("m1" if "m1" in values else "one")["sync"] == "Unknown"
            away.rename(directory)
            wait_condition(node, "SourceAvailable", "True")
        assert_serves(node, values)
        declare(directory, "late", config=constant(9.0))
        node.wait_phase("late", "Ready")
        assert_serves(node, values)
    answers = sum(len(caller.answers[0]) for caller in callers)
    print(
        f"\n{ROUNDS} times away and back: {answers} requests answered, none failed, nothing loaded"
    )


def test_deleted_and_recreated_empty_is_held_by_the_prune_guard_until_confirmed(
    tmp_path: Path,
) -> None:
    directory = served(tmp_path / "desired", MANY)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MANY)
        shutil.rmtree(directory)
        wait_condition(node, "SourceAvailable", "False")
        directory.mkdir()
        settings_file(directory)
        held = wait_condition(node, "PruneGuard", "True")
        assert "--confirm-prune" in held["message"]
        assert_serves(node, MANY)
        served(directory, MANY)
        wait_condition(node, "PruneGuard", "False")
        for model_id in MANY:
            node.wait_phase(model_id, "Ready")
            assert answer_of(node, model_id) == MANY[model_id]
        for model_id in MANY:
            (directory / f"{model_id}.yaml").unlink()
        message = wait_condition(node, "PruneGuard", "True")["message"]
        digest = re.search(r"--confirm-prune (\w+)", message)
        assert digest is not None
        assert all(answer_of(node, model_id) == value for model_id, value in MANY.items())
        ask(socket_of(node.state_dir), "confirm_prune", digest=digest[1])
        for model_id in MANY:
            node.wait_gone(model_id)


def test_deleted_and_recreated_empty_prunes_where_no_guard_applies(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", FEW)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, FEW)
        shutil.rmtree(directory)
        wait_condition(node, "SourceAvailable", "False")
        assert_serves(node, FEW)
        directory.mkdir()
        settings_file(directory)
        for model_id in FEW:
            node.wait_gone(model_id)


def test_a_deletion_that_takes_its_time_is_not_pruned_piece_by_piece(tmp_path: Path) -> None:
    """File after file goes, slower than the node looks, faster than files settle."""
    directory, pause = served(tmp_path / "desired", MANY), threading.Event()
    with Node(directory, {**SETTINGS, "settle_s": 0.5}) as node:
        wait_ready(node, MANY)
        for model_id in MANY:
            (directory / f"{model_id}.yaml").unlink()
            pause.wait(0.2)
        wait_condition(node, "PruneGuard", "True")
        assert_serves(node, MANY)


def test_a_guard_over_a_restart_still_holds(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", MANY)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MANY)
        for model_id in MANY:
            (directory / f"{model_id}.yaml").unlink()
        wait_condition(node, "PruneGuard", "True")
        node.kill()
    with Node(directory, SETTINGS) as node:
        wait_condition(node, "PruneGuard", "True")
        wait_ready(node, MANY)
        assert_serves(node, MANY)


def test_files_that_went_while_the_node_was_down_are_held_by_the_guard_too(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", MANY)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MANY)
        node.kill()
    for model_id in MANY:
        (directory / f"{model_id}.yaml").unlink()
    with Node(directory, SETTINGS) as node:
        wait_condition(node, "PruneGuard", "True")
        wait_ready(node, MANY)
        assert_serves(node, MANY)


def test_what_is_away_at_the_start_stays_desired_and_is_served_when_it_is_back(
    tmp_path: Path,
) -> None:
    """A mount point without its volume: there is a directory, but nothing that it had."""
    directory, away = served(tmp_path / "desired", MANY), tmp_path / "away"
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MANY)
        node.kill()
    directory.rename(away)
    with Node(directory, SETTINGS) as node:
        wait_condition(node, "PruneGuard", "True")
        # Their code is away as well: they are desired still, and cannot be loaded.
        for model_id in MANY:
            node.wait_phase(model_id, "Failed")
        shutil.rmtree(directory)
        away.rename(directory)
        wait_condition(node, "PruneGuard", "False")
        wait_ready(node, MANY)
        assert_serves(node, MANY)


def test_an_unmounted_volume_is_served_from_memory_until_it_is_back(tmp_path: Path) -> None:
    place = tmp_path / "volume"
    with ExitStack() as volume:
        volume.enter_context(mounted(place))
        served(place, MANY)
        with Node(place, SETTINGS) as node:
            wait_ready(node, MANY)
            files = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
            volume.close()
            wait_condition(node, "PruneGuard", "True")
            assert_serves(node, MANY)
            with mounted(place):
                for name, data in files.items():
                    (place / name).write_bytes(data)
                wait_condition(node, "PruneGuard", "False")
                wait_ready(node, MANY)
                declare(place, "late", config=constant(9.0))
                node.wait_phase("late", "Ready")


def test_a_replaced_parent_is_followed(tmp_path: Path) -> None:
    """The path leads to another directory from one moment to the next, and is heard from then on."""
    parent = tmp_path / "parent"
    directory = served(parent / "desired", MANY)
    with Node(directory, SETTINGS) as node:
        wait_ready(node, MANY)
        later = tmp_path / "later"
        served(later / "desired", {m: value + 100 for m, value in MANY.items()})
        settings_file(later / "desired")
        parent.rename(tmp_path / "earlier")
        later.rename(parent)
        for model_id, value in MANY.items():
            eventually(
                lambda m=model_id, v=value: answer_of(node, m) == v + 100, f"{model_id} follows"
            )
        declare(directory, "late", config=constant(9.0))
        node.wait_phase("late", "Ready")


def test_a_linked_directory_follows_its_link(tmp_path: Path) -> None:
    for number in (1, 2):
        served(tmp_path / f"tree-{number}", {m: value + number for m, value in MANY.items()})
        settings_file(tmp_path / f"tree-{number}")
    swap_link(tmp_path / "desired", "tree-1")
    with Node(tmp_path / "desired", SETTINGS) as node:
        wait_ready(node, MANY)
        for number in (2, 1, 2):
            swap_link(tmp_path / "desired", f"tree-{number}")
            for model_id, value in MANY.items():
                eventually(
                    lambda m=model_id, v=value + number: answer_of(node, m) == v, "it follows"
                )
        os.unlink(tmp_path / "desired")
        wait_condition(node, "SourceAvailable", "False")
        for model_id, value in MANY.items():
            assert answer_of(node, model_id) == value + 2
