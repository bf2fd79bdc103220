"""The facade on real files: the ways in which directories are really changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitlearn_manager.desired import DesiredSource, DesiredState
from support.desired_lab import WEIGHTS, DesiredLab, model

MODEL = "model_id: x\nmodel_path: m.pt\n"


class Turns:
    """Looks at a real directory with a clock that only the test moves."""

    def __init__(self, root: Path) -> None:
        self.source = DesiredSource(root)
        self.now = 0.0

    def settle(self) -> DesiredState:
        for _ in range(20):
            state = self.source.look(self.now)
            if state.next_check_s is None:
                return state
            self.now += state.next_check_s
        raise AssertionError(f"still pending: {state}")

    def look(self, after: float) -> DesiredState:
        self.now += after
        return self.source.look(self.now)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "desired").mkdir()
    (tmp_path / "desired" / "m.pt").write_bytes(b"weights")
    return tmp_path / "desired"


def test_a_file_and_the_weights_beside_it_are_accepted_within_one_settle_time(root: Path) -> None:
    (root / "a.yaml").write_text(MODEL)
    turns = Turns(root)
    assert turns.look(0.0).next_check_s == 0.25
    state = turns.look(0.25)
    assert state.models["x"].weights is not None
    assert state.models["x"].config.resolved_model_path == str(root / "m.pt")
    assert state.next_check_s is None


def test_a_configmap_swap_is_one_change_and_never_an_unload(root: Path) -> None:
    for version, priority in (("..1", 1), ("..2", 2)):
        (root / version).mkdir()
        (root / version / "a.yaml").write_text(MODEL + f"priority: {priority}\n")
    (root / "..data").symlink_to("..1")
    (root / "a.yaml").symlink_to("..data/a.yaml")
    turns = Turns(root)
    assert turns.settle().models["x"].config.priority == 1
    (root / "..tmp").symlink_to("..2")
    os.replace(root / "..tmp", root / "..data")
    shutil.rmtree(root / "..1")
    assert turns.look(1.0).models["x"].config.priority == 1
    after = turns.settle().models["x"]
    assert (after.config.priority, after.generation) == (2, 2)


def test_a_git_sync_swap_changes_only_what_differs(tmp_path: Path) -> None:
    for revision, text in (("r1", MODEL), ("r2", MODEL + "# comment\n")):
        (tmp_path / revision).mkdir()
        (tmp_path / revision / "a.yaml").write_text(text)
    (tmp_path / "r1" / "old.yaml").write_text(MODEL.replace("x", "old"))
    link = tmp_path / "current"
    link.symlink_to("r1")
    turns = Turns(link)
    assert list(turns.settle().models) == ["old", "x"]
    (tmp_path / "tmp").symlink_to("r2")
    os.replace(tmp_path / "tmp", link)
    assert list(turns.look(1.0).models) == ["old", "x"]
    after = turns.settle()
    assert list(after.models) == ["x"]
    assert after.models["x"].generation == 1


def test_a_deleted_and_recreated_root_is_no_mass_deletion(root: Path) -> None:
    (root / "a.yaml").write_text(MODEL)
    turns = Turns(root)
    before = turns.settle().models["x"]
    shutil.rmtree(root)
    assert not turns.look(1.0).source_available
    root.mkdir()
    assert "x" in turns.look(1.0).models
    (root / "a.yaml").write_text(MODEL)
    after = turns.settle().models["x"]
    assert (after.generation, after.held) == (before.generation, None)


def test_a_slow_in_place_write_is_taken_only_when_it_is_finished(root: Path) -> None:
    turns = Turns(root)
    with (root / "a.yaml").open("w", buffering=1) as file:
        for line in ("model_id: x\n", "model_path: m.pt\n", "priority: 7\n"):
            file.write(line)
            file.flush()
            assert not turns.look(0.2).models
    assert turns.settle().models["x"].config.priority == 7


def test_a_change_that_no_event_told_of_is_found_by_the_next_looks(root: Path) -> None:
    turns = Turns(root)
    turns.settle()
    (root / "a.yaml").write_text(MODEL)
    assert turns.look(1.0).next_check_s == 0.25
    assert "x" in turns.look(0.25).models


def test_a_fifo_named_like_a_model_does_not_block(root: Path) -> None:
    os.mkfifo(root / "pipe.yaml")
    state = Turns(root).settle()
    assert [str(p) for p in state.problems] == ["pipe.yaml  cannot be read: Not a regular file"]


def test_a_file_beyond_the_size_limit_is_a_problem_and_is_not_read_whole(root: Path) -> None:
    (root / "big.yaml").write_bytes(b"#" * (2 << 20))
    state = Turns(root).settle()
    assert [p.file for p in state.problems] == ["big.yaml"]


def test_listing_order_does_not_matter() -> None:
    states = []
    for reverse in (False, True):
        lab = DesiredLab()
        lab.fs.order = lambda entries, r=reverse: sorted(entries, key=lambda e: e.name, reverse=r)
        lab.fs.mkdir(lab.path("sub"))
        for name in ("b", "a", "sub/c"):
            lab.write(f"{name}.yaml", model("same"), model(name.replace("/", "-")))
        states.append(lab.settle())
    assert states[0] == states[1]


def test_watch_paths_name_links_weights_and_what_is_about_to_be_accepted() -> None:
    lab = DesiredLab()
    lab.fs.write("/weights/far.yaml", model("far", model_path="/weights/far.pt"))
    lab.fs.symlink("/weights/far.yaml", lab.path("far.yaml"))
    lab.write("a.yaml", model("x"))
    lab.look()
    expected = (lab.path("far.yaml"), "/weights/far.pt", WEIGHTS)
    assert lab.source.watch_paths() == expected
    lab.settle()
    assert lab.source.watch_paths() == expected


def test_a_relative_root_is_fixed_when_the_source_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.yaml").write_text(MODEL)
    monkeypatch.chdir(root.parent)
    turns = Turns(Path("desired"))
    monkeypatch.chdir("/")
    assert turns.settle().models["x"].config.base_dir == root


def test_desired_state_needs_no_torch_transformers_or_grpc() -> None:
    code = (
        "import sys, splitlearn_manager.desired as d; d.DesiredSource('/nowhere').look(0.0);"
        "print([m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
