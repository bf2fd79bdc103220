"""What a new process makes of what the old one had accepted."""

from __future__ import annotations

import errno

import pytest

from splitlearn_manager.desired.state import SourceRef
from support.desired_lab import ROOT, DesiredLab, model

INVALID = b"model_id: x\nmodel_path: /weights/m.pt\nmax_memory_mb: 4gb\n"


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def test_a_spec_that_is_still_the_same_keeps_its_generation_and_time(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    before = lab.accept(a=model("x", priority=1)).models["x"]
    lab.restart()
    first = lab.look(after=1.0)
    assert (dict(first.models), list(first.undecided), first.complete) == ({}, ["x"], False)
    second = lab.look(after=0.25)
    assert second.models == {"x": before}
    assert (second.undecided, second.next_check_s, second.complete) == ({}, None, True)


def test_a_file_that_was_edited_in_between_counts_one_generation_on(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.write("a.yaml", model("x", priority=5))
    lab.restart()
    after = lab.settle().models["x"]
    assert (after.generation, after.config.priority) == (2, 5)


@pytest.mark.parametrize("broken", [INVALID, b"", b"model_id: [", b"\xff\xfe"])
def test_a_model_whose_file_is_broken_at_the_start_comes_up_from_its_last_good_spec(
    lab: DesiredLab, broken: bytes
) -> None:
    good = lab.accept(a=model("x", priority=3)).models["x"]
    lab.write("a.yaml", broken)
    lab.restart()
    assert not lab.look(after=1.0).models
    held = lab.look(after=0.25).models["x"]
    assert (held.config, held.generation, held.held) == (good.config, 1, "a.yaml is invalid")
    fixed = lab.accept(a=model("x", priority=4)).models["x"]
    assert (fixed.generation, fixed.held) == (2, None)


def test_a_model_whose_file_cannot_be_read_at_the_start_comes_up_all_the_same(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("x"))
    lab.fs.fail(lab.path("a.yaml"), errno.EACCES)
    lab.restart()
    assert lab.settle().models["x"].held == "a.yaml cannot be read: Permission denied"


def test_a_model_whose_file_is_gone_is_never_desired_again(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.delete("a.yaml")
    lab.restart()
    seen = [lab.look(after=after) for after in (1.0, 0.1, 0.2, 0.3)]
    assert not any("x" in state.models for state in seen)
    assert list(lab.settle().models) == ["y"]
    assert not lab.settle().undecided


def test_a_model_in_conflict_whose_files_are_gone_is_never_desired_again(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), c=model("y"))
    lab.accept(b=model("x", priority=1))
    assert lab.settle().models["x"].contested
    lab.delete("a.yaml")
    lab.delete("b.yaml")
    lab.restart()
    seen = [lab.look(after=after) for after in (1.0, 0.1, 0.2, 0.3)]
    assert list(seen[0].undecided) == ["x", "y"]
    assert not any("x" in state.models for state in seen)
    assert list(lab.settle().models) == ["y"]


def test_a_file_that_was_renamed_in_between_keeps_the_generation(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.accept(a=model("x", priority=1))
    lab.rename("a.yaml", "b.yaml")
    lab.restart()
    after = lab.settle().models["x"]
    assert (after.generation, after.source, after.held) == (2, SourceRef("b.yaml", 1), None)


def test_a_missing_directory_means_that_everything_is_desired_as_it_was(lab: DesiredLab) -> None:
    before = lab.accept(a=model("x"), b=model("y"))
    lab.fs.rename(ROOT, "/elsewhere")
    lab.restart()
    state = lab.settle()
    assert {i: m.generation for i, m in state.models.items()} == {"x": 1, "y": 1}
    assert (state.source_available, state.complete) == (False, False)
    assert state.models["x"].held == "/desired does not exist"
    assert state.models["x"].weights == before.models["x"].weights
    lab.fs.rename("/elsewhere", ROOT)
    assert lab.settle().models == before.models


def test_an_unreadable_subdirectory_keeps_the_models_of_its_files(lab: DesiredLab) -> None:
    lab.fs.mkdir(lab.path("sub"))
    lab.write("sub/a.yaml", model("x"))
    lab.settle()
    lab.fs.fail(lab.path("sub"), errno.EACCES)
    lab.restart()
    assert lab.settle().models["x"].held == "sub/a.yaml cannot be seen at the moment"


def test_a_directory_that_comes_back_empty_is_guarded_and_the_models_come_up(
    lab: DesiredLab,
) -> None:
    ids = ("m0", "m1", "m2")
    lab.accept(**{i: model(i) for i in ids})
    lab.fs.rename(ROOT, "/elsewhere")
    lab.fs.mkdir(ROOT)
    lab.restart()
    first = lab.look(after=1.0)
    assert (dict(first.models), list(first.undecided)) == ({}, list(ids))
    second = lab.look(after=0.25)
    assert (list(second.models), second.undecided) == (list(ids), {})
    assert second.prune_guard is not None
    lab.confirm(second.prune_guard.digest)
    assert not lab.look(after=1.0).models


def test_an_empty_directory_after_a_restart_prunes_two_models_without_asking(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.delete("a.yaml")
    lab.delete("b.yaml")
    lab.restart()
    assert not lab.settle().models


def test_a_guard_holds_over_a_restart_whatever_was_accepted_since(lab: DesiredLab) -> None:
    lab.accept(**{i: model(i) for i in ("m0", "m1", "m2")})
    for i in ("m0", "m1", "m2"):
        lab.delete(f"{i}.yaml")
    before = lab.settle().prune_guard
    assert before is not None
    lab.accept(**{i: model(i) for i in ("n0", "n1", "n2", "n3")})
    lab.restart()
    after = lab.settle()
    assert after.prune_guard is not None
    assert after.prune_guard.digest == before.digest
    assert len(after.models) == 7


def test_a_conflict_holds_over_a_restart_at_the_last_good_spec(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.accept(b=model("x", priority=1))
    before = lab.accept(a=model("x", priority=2))
    lab.restart()
    first = lab.look(after=1.0)
    assert list(first.conflicts) == ["x"]
    assert list(first.undecided) == ["x"]  # until its files have been read
    assert lab.settle() == before
    assert before.models["x"].generation == 1


def test_a_conflict_with_a_file_that_is_broken_by_then_stays_one(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.accept(b=model("x", priority=1))
    before = lab.accept(b=b"model_path: 3\n", a=model("x", priority=2))
    assert list(before.conflicts) == ["x"]
    lab.restart()
    assert lab.settle() == before


def test_a_change_that_never_ends_elsewhere_keeps_a_restored_model_out_only_for_a_while(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    lab.restart()
    counts = []
    for _ in range(30):
        lab.write("log.yaml", str(lab.now).encode())
        counts.append(len(lab.look(after=0.2).models))
    assert counts[:20] == [0] * 20
    assert counts[-1] == 1


def test_a_name_that_is_not_utf8_is_found_again(lab: DesiredLab) -> None:
    lab.write("\udcff.yaml", model("x"))
    lab.settle()
    lab.write("\udcff.yaml", b"")
    lab.restart()
    assert lab.settle().models["x"].held == "\\udcff.yaml is invalid"


def test_the_weights_settle_together_with_the_restored_spec(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.write("a.yaml", INVALID)
    lab.restart()
    lab.look(after=1.0)
    assert lab.look(after=0.25).models["x"].weights is not None


def test_a_restart_in_the_midst_of_a_change_ends_where_none_does(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=1))
    lab.delete("b.yaml")
    lab.look()
    lab.restart()
    state = lab.settle()
    assert {i: (m.generation, m.config.priority) for i, m in state.models.items()} == {"x": (2, 1)}


def test_the_change_of_a_generation_was_seen_before_it_was_accepted(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=1))
    seen_at = lab.now
    lab.look()
    after = lab.look(after=0.25).models["x"]
    assert (after.seen_at, after.accepted_at) == (seen_at, pytest.approx(seen_at + 0.25))
