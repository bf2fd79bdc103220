"""The state directory is impossible, read-only, full, deleted or damaged: the node serves on, and says so."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.faults import SETTINGS, full, mounted, served, wait_ready, wait_state_kept
from splitlearn_manager.server.state_dir import record_of, state_dir_for
from support.node import Node
from support.served import answer_of, constant, declare, loads, replace_file
from support.waiting import eventually

MODELS = {f"m{n}": float(n) for n in range(1, 5)}


def with_state(path: Path) -> dict[str, object]:
    return {**SETTINGS, "state_dir": str(path)}


def edit(node: Node, model_id: str, value: float) -> None:
    declare(node.directory, model_id, config=constant(value))
    eventually(lambda: answer_of(node, model_id) == value, f"{model_id} answers {value}")


def breaks(directory: Path, model_id: str) -> None:
    replace_file(directory / f"{model_id}.yaml", f"model_id: {model_id}\nmodel_path: [\n")


def kept(state_dir: Path) -> set[str]:
    """The ids of the models that are kept."""
    return {m for path in shards(state_dir) for m in json.loads(path.read_text())["models"]}


def shards(state_dir: Path) -> list[Path]:
    """The files that models are kept in."""
    return sorted(record_of(state_dir).glob("models-*.json"))


def unfinished(state_dir: Path) -> list[str]:
    """Files that were begun and not put in place."""
    return [path.name for path in record_of(state_dir).iterdir() if path.name.endswith(".tmp")]


def assert_last_good_specs_are_kept(directory: Path, settings: dict[str, object]) -> None:
    """A start with broken files brings every model up as it was."""
    for model_id in MODELS:
        breaks(directory, model_id)
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
        for model_id, value in MODELS.items():
            assert answer_of(node, model_id) == value + 10
            assert loads(node, model_id) == 1


def serve_edit_and_kill(directory: Path, settings: dict[str, object]) -> None:
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
        for model_id, value in MODELS.items():
            edit(node, model_id, value + 10)
        node.kill()


def test_a_state_dir_that_cannot_be_made_is_done_without(tmp_path: Path) -> None:
    """A file stands where its parent should be: not even root can write there."""
    directory = served(tmp_path / "desired", MODELS)
    (tmp_path / "file").write_text("")
    with Node(directory, with_state(tmp_path / "file" / "state")) as node:
        wait_ready(node, MODELS)
        wait_state_kept(node, False)
        (said,) = node.find("event=StateNotKept")
        assert str(tmp_path / "file" / "state") in said
        edit(node, "m1", 11.0)
        assert not node.find("Traceback")
        assert node.stop() == 0


def test_a_read_only_state_dir_is_done_without(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", MODELS)
    with (
        mounted(tmp_path / "state", read_only=True) as state,
        Node(directory, with_state(state)) as node,
    ):
        wait_ready(node, MODELS)
        wait_state_kept(node, False)
        edit(node, "m1", 11.0)
        assert not node.find("Traceback")
        assert node.stop() == 0


def test_a_full_disk_stops_nothing_and_what_was_missed_is_written_when_there_is_room(
    tmp_path: Path,
) -> None:
    directory = served(tmp_path / "desired", MODELS)
    with mounted(tmp_path / "state", size="256k") as state:
        settings = with_state(state)
        with Node(directory, settings) as node:
            wait_ready(node, MODELS)
            wait_state_kept(node, True)
            with full(state):
                for model_id, value in MODELS.items():
                    edit(node, model_id, value + 10)
                wait_state_kept(node, False)
                assert "No space left" in node.find("event=StateNotKept")[0]
            wait_state_kept(node, True)
            assert not unfinished(state)
            node.kill()
        assert_last_good_specs_are_kept(directory, settings)


def test_a_disk_that_is_full_at_the_start_stops_nothing(tmp_path: Path) -> None:
    directory = served(tmp_path / "desired", MODELS)
    with mounted(tmp_path / "state", size="256k") as state:
        settings = with_state(state)
        with full(state), Node(directory, settings) as node:
            wait_ready(node, MODELS)
            wait_state_kept(node, False)
            edit(node, "m1", 11.0)
            assert node.stop() == 0
        serve_edit_and_kill(directory, settings)
        assert_last_good_specs_are_kept(directory, settings)


def test_a_quota_on_written_files_stops_nothing_and_heals(tmp_path: Path) -> None:
    """The kernel refuses to let any file of the node grow: a fault without a mount."""
    directory, state = served(tmp_path / "desired", MODELS), tmp_path / "state"
    settings = with_state(state)
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
        wait_state_kept(node, True)
        before = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (16, before[1]))
        for model_id, value in MODELS.items():
            edit(node, model_id, value + 10)
        wait_state_kept(node, False)
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, before)
        wait_state_kept(node, True)
        assert not unfinished(state)
        node.kill()
    assert_last_good_specs_are_kept(directory, settings)


def test_a_state_dir_that_is_deleted_while_the_node_runs_is_made_anew(tmp_path: Path) -> None:
    directory, state = served(tmp_path / "desired", MODELS), tmp_path / "state"
    settings = with_state(state)
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
        for model_id, value in MODELS.items():
            edit(node, model_id, value + 10)
        # Moved first: the node would write into the directory while it is being emptied.
        shutil.rmtree(state.rename(tmp_path / "deleted"))
        eventually(lambda: kept(state) == set(MODELS), "all is kept again")
        assert not node.find("Traceback")
        node.kill()
    assert_last_good_specs_are_kept(directory, settings)


def test_a_state_dir_that_is_deleted_before_a_start_loses_only_what_no_file_says(
    tmp_path: Path,
) -> None:
    directory = served(tmp_path / "desired", MODELS)
    serve_edit_and_kill(directory, SETTINGS)
    shutil.rmtree(state_dir_for(directory))
    breaks(directory, "m1")
    with Node(directory, SETTINGS) as node:
        for model_id in ("m2", "m3", "m4"):
            node.wait_phase(model_id, "Ready")
            assert answer_of(node, model_id) == MODELS[model_id] + 10
        assert not node.status("m1").get("observed_generation")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff not json")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 999}))


def _another_kind(path: Path) -> None:
    path.write_text("[1, 2, 3]")


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [_garbage, _truncated, _empty, _newer, _another_kind, _a_directory]
)
def test_damaged_state_is_reported_and_never_fatal(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    directory, state = served(tmp_path / "desired", MODELS), tmp_path / "state"
    settings = with_state(state)
    serve_edit_and_kill(directory, settings)
    damaged = shards(state)
    assert damaged
    for shard in damaged:
        damage(shard)
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
        for model_id, value in MODELS.items():
            assert answer_of(node, model_id) == value + 10
        assert node.find(damaged[0].name), "the damage is not reported"
        assert not node.find("Traceback")
        assert node.stop() == 0
    with Node(directory, settings) as node:
        wait_ready(node, MODELS)
