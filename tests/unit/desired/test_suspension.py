"""A suspended model stays as it is, whatever the files say."""

from __future__ import annotations

import pytest

from splitlearn_manager.desired.state import SourceRef
from support.desired_lab import ROOT, DesiredLab, model


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def test_a_suspended_model_gets_no_new_generation_until_it_is_resumed(lab: DesiredLab) -> None:
    lab.accept(x=model("x"), y=model("y"))
    lab.suspend("x")
    state = lab.accept(x=model("x", priority=1), y=model("y", priority=1))
    held = state.models["x"]
    assert (held.generation, held.config.priority, held.suspended) == (1, 0, True)
    assert held.held == "suspended: stays at generation 1 until it is resumed"
    assert (state.models["y"].generation, state.models["y"].suspended) == (2, False)
    lab.pass_time(10.0)
    lab.suspend()
    resumed = lab.look().models["x"]
    assert (resumed.generation, resumed.config.priority) == (2, 1)
    assert (resumed.suspended, resumed.held) == (False, None)
    assert resumed.seen_at == resumed.accepted_at == lab.now


def test_suspending_a_model_whose_file_says_the_same_only_marks_it(lab: DesiredLab) -> None:
    before = lab.accept(x=model("x")).models["x"]
    lab.suspend("x")
    assert lab.look(after=1.0).models["x"].suspended
    lab.suspend()
    assert lab.look(after=1.0).models["x"] == before


def test_a_suspended_model_is_not_pruned_and_not_counted_as_going(lab: DesiredLab) -> None:
    ids = ("m0", "m1", "m2", "m3")
    lab.accept(**{i: model(i) for i in ids})
    lab.suspend("m0")
    for i in ("m0", "m1", "m2"):
        lab.delete(f"{i}.yaml")
    state = lab.settle()
    assert (list(state.models), state.prune_guard) == (["m0", "m3"], None)
    lab.suspend()
    assert list(lab.look(after=1.0).models) == ["m3"]


def test_a_suspended_model_is_not_forgotten_while_the_directory_is_away(lab: DesiredLab) -> None:
    lab.accept(x=model("x"))
    lab.suspend("x")
    lab.fs.rename(ROOT, "/elsewhere")
    assert lab.look(after=1.0).models["x"].suspended


def test_a_conflict_over_a_suspended_model_is_still_told(lab: DesiredLab) -> None:
    lab.accept(x=model("x"))
    lab.suspend("x")
    state = lab.accept(y=model("x", priority=1))
    assert state.conflicts == {"x": (SourceRef("x.yaml", 1), SourceRef("y.yaml", 1))}
    assert state.models["x"].suspended
    lab.delete("x.yaml")
    assert lab.settle().models["x"].generation == 1
    lab.suspend()
    assert lab.look(after=1.0).models["x"].generation == 2


def test_suspending_an_id_that_was_never_accepted_keeps_it_out(lab: DesiredLab) -> None:
    lab.suspend("x")
    assert not lab.accept(x=model("x")).models
    lab.suspend()
    assert lab.look(after=1.0).models["x"].generation == 1


def test_a_suspended_model_comes_back_suspended_after_a_restart_though_its_file_is_gone(
    lab: DesiredLab,
) -> None:
    lab.accept(x=model("x"))
    lab.suspend("x")
    lab.delete("x.yaml")
    lab.settle()
    lab.restart()
    first = lab.look(after=1.0)
    assert (first.models["x"].suspended, first.models["x"].generation) == (True, 1)
    assert lab.settle().models["x"].suspended
