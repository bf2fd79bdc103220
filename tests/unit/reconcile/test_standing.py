"""What a turn does not do again: a plan that would come out the same is not made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from splitlearn_manager.reconcile import turns
from splitlearn_manager.reconcile.plan import plan
from support.loop_lab import SETTLE_S, STEP_S, LoopLab


@pytest.fixture
def lab() -> LoopLab:
    lab = LoopLab(max_models=2)
    for model_id in ("a", "b", "c"):
        lab.write(model_id, priority=-ord(model_id))
    lab.settle()
    return lab


@pytest.fixture
def plans(lab: LoopLab, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The plans that are made from here on."""
    made: list[object] = []

    def counting(*arguments: object) -> object:
        made.append(plan(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(turns, "plan", counting)
    yield made
    monkeypatch.undo()


def test_a_quiet_turn_plans_nothing(lab: LoopLab, plans: list[object]) -> None:
    lab.pass_time(STEP_S)
    assert not lab.loop.turn().changed
    assert not plans


def test_a_file_that_is_being_edited_is_told_of_and_plans_nothing_until_it_has_settled(
    lab: LoopLab, plans: list[object]
) -> None:
    lab.pass_time(STEP_S)
    lab.write("a", priority=7)
    turn = lab.loop.turn()
    assert (turn.changed, turn.settled, plans) == (True, False, [])
    assert "still changing" in str(lab.loop.status.describe("a"))
    lab.pass_time(SETTLE_S)
    assert [action.verb for action in lab.loop.turn().plan.actions] == ["adjust"]
    assert len(plans) == 1


def test_a_new_file_changes_nothing_until_it_has_settled(lab: LoopLab, plans: list[object]) -> None:
    lab.pass_time(STEP_S)
    lab.write("d", priority=1)
    turn = lab.loop.turn()
    assert (turn.changed, turn.settled, plans) == (False, False, [])
    assert turn.next_s == pytest.approx(SETTLE_S)
    lab.pass_time(SETTLE_S)
    lab.loop.turn()
    assert "d" in lab.loop.status.entries
    assert len(plans) == 1


def test_a_plan_that_has_something_left_to_start_is_made_anew_while_a_file_is_being_edited(
    lab: LoopLab, plans: list[object]
) -> None:
    lab.pass_time(STEP_S)
    lab.write("c", priority=9)  # waits for room, and may now have that of another
    lab.loop.turn()
    lab.pass_time(SETTLE_S)
    assert lab.loop.turn().plan.actions
    lab.write("b", priority=-1)  # being edited while the eviction is under way
    lab.loop.turn()
    assert len(plans) == 2
    lab.settle()
    assert lab.loop.status.phases == {"a": "Evicted", "b": "Ready", "c": "Ready"}


def test_what_is_told_of_models_that_did_not_change_are_the_very_same_objects(
    lab: LoopLab,
) -> None:
    before = dict(lab.loop.status.entries)
    lab.write("a", priority=7)
    lab.settle()
    after = lab.loop.status.entries
    assert [after[i] is before[i] for i in sorted(after)] == [False, True, True]
