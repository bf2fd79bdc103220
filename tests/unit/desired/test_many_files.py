"""What keeps a directory of thousands of files cheap: each look works on what has changed, no more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import Instructions
from splitlearn_manager.desired.watch_paths import MOST_PATHS
from splitlearn_manager.desired.weights import LEAST_IN_TURN, SOURCES_A_LOOK, WeightsWatch
from splitlearn_manager.errors import WeightsNotFound
from support.desired_lab import ROOT, SETTLE_S, DesiredLab, model


@pytest.fixture
def lab() -> DesiredLab:
    lab = DesiredLab()
    lab.fs.lists_stats = True
    return lab


def accept(lab: DesiredLab, count: int) -> None:
    lab.accept(**{f"m{i:04}": model(f"m{i:04}") for i in range(count)})


# -- what a look works on


def test_a_look_at_which_nothing_has_changed_returns_the_very_same_state(lab: DesiredLab) -> None:
    accept(lab, 3)
    lab.accept(broken=b"model_id: [")
    state = lab.settle()
    assert all(lab.look(after=1.0) is state for _ in range(3))
    lab.suspend("m0001")
    suspended = lab.look(after=1.0)
    assert suspended is not state
    assert lab.look(after=1.0) is suspended


@pytest.mark.parametrize("away", [False, True])
def test_a_guard_and_an_outage_are_rest_too(lab: DesiredLab, away: bool) -> None:
    accept(lab, 3)
    lab.fs.rename(ROOT, "/elsewhere")
    if not away:
        lab.fs.mkdir(ROOT)
    state = lab.settle()
    assert (state.prune_guard is None) == away
    assert lab.look(after=1.0) is state


def test_an_unreadable_file_is_tried_again_and_changes_nothing_while_it_stays_so(
    lab: DesiredLab,
) -> None:
    accept(lab, 2)
    lab.fs.fail(lab.path("m0001.yaml"), 5)
    state = lab.settle()
    assert lab.look(after=1.0) is state
    lab.fs.heal(lab.path("m0001.yaml"))
    assert not lab.settle().problems


def test_models_that_did_not_change_are_the_very_same_objects_after_an_edit(
    lab: DesiredLab,
) -> None:
    accept(lab, 3)
    before = lab.settle().models
    after = lab.accept(m0001=model("m0001", priority=1)).models
    assert [before[i] is after[i] for i in sorted(before)] == [True, False, True]


def test_a_touched_file_gives_the_same_state_again(lab: DesiredLab, parsed: Counter[str]) -> None:
    accept(lab, 3)
    before = lab.settle()
    lab.pass_time(1.0)
    lab.fs.touch(lab.path("m0001.yaml"))
    assert lab.settle() == before
    assert parsed["m0001.yaml"] == 1


def test_each_file_is_parsed_once_and_after_an_edit_only_that_one(
    lab: DesiredLab, parsed: Counter[str]
) -> None:
    accept(lab, 5)
    assert set(parsed.values()) == {1}
    lab.accept(m0003=model("m0003", priority=1))
    assert (parsed["m0003.yaml"], parsed.total()) == (2, 6)


def test_a_quiet_look_stats_each_file_once_and_reads_none(lab: DesiredLab) -> None:
    accept(lab, 20)
    lab.settle()
    lab.fs.calls.update(list_dir=0, stat=0, read=0)
    lab.look(after=1.0)
    root_twice, weights = 2, 2
    assert lab.fs.calls == {"list_dir": 1, "stat": 20 + root_twice + weights, "read": 0}


def test_a_swap_to_the_same_content_parses_nothing(tmp_path: Path, parsed: Counter[str]) -> None:
    for revision in ("r1", "r2"):
        (tmp_path / revision).mkdir()
        for i in range(3):
            (tmp_path / revision / f"m{i}.yaml").write_bytes(model(f"m{i}"))
    (tmp_path / "current").symlink_to("r1")
    source = DesiredSource(tmp_path / "current")
    source.look(0.0)
    source.look(1.0)
    (tmp_path / "new").symlink_to("r2")
    (tmp_path / "new").replace(tmp_path / "current")
    source.look(2.0)
    assert len(source.look(3.0).models) == 3
    assert parsed.total() == 3


def test_progress_is_told_while_many_files_are_parsed_and_only_then() -> None:
    lab = DesiredLab()
    told: list[tuple[int, int]] = []
    lab.source = DesiredSource(
        ROOT, lab.fs, on_progress=lambda done, total: told.append((done, total))
    )
    for i in range(250):
        lab.write(f"m{i}.yaml", model(f"m{i}"))
    lab.settle()
    assert (told[0], told[-1]) == ((0, 250), (250, 250))
    assert told == sorted(told)
    assert len(told) <= 101
    told.clear()
    lab.accept(m1=model("m1", priority=1))
    assert told == []


# -- weights


class Weights:
    """Many sources, and who was asked for in each look."""

    def __init__(self, count: int) -> None:
        self.configs = {
            f"m{i:04}": ModelConfig(model_id=f"m{i:04}", model_path=f"/w{i:04}.pt")
            for i in range(count)
        }
        self.watch = WeightsWatch(SETTLE_S)
        self.now = 0.0
        self.content: dict[str, str] = {}
        self.missing: set[str] = set()
        self.asked: list[str] = []

    def _fingerprint(self, config: ModelConfig) -> str:
        self.asked.append(config.model_id)
        if config.model_id in self.missing:
            raise WeightsNotFound("nothing there")
        return self.content.get(config.model_id, "old")

    def look(self, *watched: str, upcoming: tuple[ModelConfig, ...] = ()) -> list[str]:
        self.asked = []
        self.now += SETTLE_S
        self.state = self.watch.observe(
            self.configs, self.now, self._fingerprint, upcoming, watched
        )
        return self.asked


def test_up_to_256_sources_are_all_looked_at_in_each_look() -> None:
    weights = Weights(SOURCES_A_LOOK)
    for _ in range(4):
        assert len(weights.look()) == SOURCES_A_LOOK


def test_new_sources_are_all_looked_at_until_they_have_settled() -> None:
    weights = Weights(1000)
    assert [len(weights.look()) for _ in range(3)] == [1000, 1000, SOURCES_A_LOOK]
    assert len(weights.state.by_id) == 1000


def test_settled_sources_take_turns_and_none_is_left_out() -> None:
    weights = Weights(1000)
    for _ in range(2):
        weights.look()
    turns = [weights.look() for _ in range(8)]
    assert all(len(turn) == len(set(turn)) == SOURCES_A_LOOK for turn in turns)
    counts = Counter(asked for turn in turns for asked in turn)
    assert counts.keys() == weights.configs.keys()
    assert set(counts.values()) <= {2, 3}


def test_watched_ids_and_upcoming_configs_are_looked_at_every_time() -> None:
    weights = Weights(1000)
    for _ in range(2):
        weights.look()
    upcoming = (ModelConfig(model_id="new", model_path="/new.pt"),)
    for _ in range(4):
        asked = weights.look("m0900", "unknown", upcoming=upcoming)
        assert {"m0900", "new"} <= {*asked}
        assert len(asked) == SOURCES_A_LOOK


def test_a_source_that_has_changed_is_looked_at_until_it_has_settled() -> None:
    weights = Weights(1000)
    for _ in range(2):
        weights.look()
    weights.content["m0500"] = "new"
    while "m0500" not in weights.look():
        assert weights.state.by_id["m0500"] == "old"
    assert weights.state.next_check_s == SETTLE_S
    assert "m0500" in weights.look()
    assert (weights.state.by_id["m0500"], weights.state.next_check_s) == ("new", None)


def test_others_take_their_turn_however_many_are_watched() -> None:
    weights = Weights(1000)
    for _ in range(2):
        weights.look()
    watched = tuple(weights.configs)[:600]
    seen = Counter(asked for _ in range(25) for asked in weights.look(*watched))
    assert seen.keys() == weights.configs.keys()
    assert len(weights.asked) == 600 + LEAST_IN_TURN


def test_missing_weights_wait_for_their_turn_like_others() -> None:
    weights = Weights(1000)
    weights.missing = {*weights.configs}
    weights.look()
    assert len(weights.state.problems) == 1000
    assert len(weights.look()) == SOURCES_A_LOOK


def test_what_is_known_of_the_weights_is_the_same_object_while_nothing_changes() -> None:
    weights = Weights(1000)
    for _ in range(2):
        weights.look()
    state = weights.state
    for _ in range(6):
        weights.look()
        assert weights.state is state


# -- what is watched


def test_of_many_paths_those_of_watched_ids_are_watched(lab: DesiredLab) -> None:
    count = 2 * MOST_PATHS
    for i in range(count):
        lab.write(f"m{i:04}.yaml", model(f"m{i:04}", model_path=f"/weights/w{i:04}.pt"))
    lab.settle()
    assert len(lab.source.watch_paths()) == MOST_PATHS
    last = f"/weights/w{count - 1:04}.pt"
    assert last not in lab.source.watch_paths()
    lab.instructions = Instructions(watched=frozenset({f"m{count - 1:04}"}))
    lab.look(after=1.0)
    assert last in lab.source.watch_paths()
    assert len(lab.source.watch_paths()) == MOST_PATHS


def test_watch_paths_costs_no_look_at_the_disk(lab: DesiredLab) -> None:
    accept(lab, 3)
    lab.settle()
    before = dict(lab.fs.calls)
    assert lab.source.watch_paths() is lab.source.watch_paths()
    assert lab.fs.calls == before
