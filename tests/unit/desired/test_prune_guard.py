"""Too many models that would go at once stay until somebody confirms it."""

from __future__ import annotations

import pytest

from splitlearn_manager.desired.state import DesiredState, PruneGuard
from support.desired_lab import ROOT, DesiredLab, model

IDS = ("m0", "m1", "m2", "m3", "m4")


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def accept(lab: DesiredLab, *model_ids: str) -> DesiredState:
    return lab.accept(**{model_id: model(model_id) for model_id in model_ids})


def delete(lab: DesiredLab, *model_ids: str) -> None:
    for model_id in model_ids:
        lab.delete(f"{model_id}.yaml")


def guard_of(state: DesiredState) -> PruneGuard:
    assert state.prune_guard is not None
    return state.prune_guard


def test_more_than_half_of_the_models_stay_until_their_digest_is_confirmed(lab: DesiredLab) -> None:
    before = accept(lab, *IDS)
    delete(lab, "m0", "m1", "m2")
    state = lab.settle()
    guard = guard_of(state)
    assert (guard.model_ids, guard.managed, len(guard.digest)) == (("m0", "m1", "m2"), 5, 12)
    assert list(state.models) == list(IDS)
    assert state.models["m0"].held == (
        "no file declares it, but 3 of 5 models would be unloaded at once: to let them go, run "
        f"`splitlearn-manager reconcile apply {ROOT} --confirm-prune {guard.digest}`"
    )
    assert state.models["m0"].generation == before.models["m0"].generation
    assert state.models["m3"].held is None
    assert (state.next_check_s, state.complete) == (None, True)
    lab.confirm("0" * 12)
    assert guard_of(lab.look(after=1.0)) == guard
    lab.confirm(guard.digest)
    confirmed = lab.look(after=1.0)
    assert (list(confirmed.models), confirmed.prune_guard) == (["m3", "m4"], None)


@pytest.mark.parametrize(
    ("managed", "gone", "percent", "guarded"),
    [
        (2, 2, 50, False),
        (3, 1, 50, False),
        (3, 2, 50, True),
        (4, 2, 50, False),
        (4, 3, 50, True),
        (5, 5, 99.9, True),
        (5, 5, 100, False),
        (5, 1, 0, True),
        (5, 1, 19.9, True),
        (5, 1, 20, False),
    ],
)
def test_the_guard_is_for_more_than_its_percentage_of_three_models_or_more(
    lab: DesiredLab, managed: int, gone: int, percent: float, guarded: bool
) -> None:
    lab.source.prune_guard_percent = percent
    accept(lab, *IDS[:managed])
    delete(lab, *IDS[:gone])
    state = lab.settle()
    assert (state.prune_guard is not None) == guarded
    assert list(state.models) == list(IDS[:managed] if guarded else IDS[gone:managed])


def test_the_digest_changes_when_one_more_file_goes_and_an_old_one_confirms_nothing(
    lab: DesiredLab,
) -> None:
    accept(lab, *IDS)
    delete(lab, "m0", "m1", "m2")
    first = guard_of(lab.settle())
    delete(lab, "m3")
    lab.confirm(first.digest)
    assert lab.look(after=1.0).prune_guard is None
    second = guard_of(lab.settle())
    assert second.digest != first.digest
    assert second.model_ids == ("m0", "m1", "m2", "m3")


def test_the_digest_depends_on_the_specs_that_would_go(lab: DesiredLab) -> None:
    digests = []
    for priority in (1, 2, 1):
        lab.accept(**{i: model(i, priority=priority) for i in IDS[:3]})
        delete(lab, *IDS[:3])
        digests.append(guard_of(lab.settle()).digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_deletion_under_way_is_decided_about_as_a_whole(lab: DesiredLab) -> None:
    accept(lab, *IDS)
    for model_id in IDS:
        delete(lab, model_id)
        for _ in range(2):
            assert list(lab.look(after=0.12).models) == list(IDS)
    assert guard_of(lab.settle()).model_ids == IDS


def test_exchanging_all_files_for_others_at_once_is_guarded(lab: DesiredLab) -> None:
    accept(lab, "m0", "m1", "m2")
    lab.pass_time(1.0)
    delete(lab, "m0", "m1", "m2")
    for new in ("n0", "n1", "n2"):
        lab.write(f"{new}.yaml", model(new))
    state = lab.settle()
    assert list(state.models) == ["m0", "m1", "m2", "n0", "n1", "n2"]
    assert (guard_of(state).model_ids, guard_of(state).managed) == (("m0", "m1", "m2"), 3)


def test_exchanging_all_documents_of_one_file_is_guarded(lab: DesiredLab) -> None:
    lab.write("all.yaml", *(model(i) for i in ("m0", "m1", "m2")))
    lab.settle()
    lab.pass_time(1.0)
    lab.write("all.yaml", *(model(i) for i in ("n0", "n1", "n2")))
    assert guard_of(lab.settle()).model_ids == ("m0", "m1", "m2")


def test_files_that_come_back_one_by_one_do_not_make_the_rest_few_enough_to_go(
    lab: DesiredLab,
) -> None:
    accept(lab, *IDS)
    lab.fs.rename(ROOT, "/elsewhere")
    lab.fs.mkdir(ROOT)
    assert guard_of(lab.settle()).model_ids == IDS
    for count, model_id in enumerate(IDS, start=1):
        lab.fs.rename(f"/elsewhere/{model_id}.yaml", lab.path(f"{model_id}.yaml"))
        state = lab.settle()
        assert list(state.models) == list(IDS)
        assert state.models[model_id].held is None
        left = state.prune_guard.model_ids if state.prune_guard else ()
        assert left == IDS[count:]
    delete(lab, "m0")
    assert list(lab.settle().models) == ["m1", "m2", "m3", "m4"]


def test_new_models_do_not_make_the_guarded_few_enough_to_go(lab: DesiredLab) -> None:
    accept(lab, "m0", "m1", "m2")
    delete(lab, "m0", "m1", "m2")
    before = guard_of(lab.settle())
    assert guard_of(accept(lab, "n0", "n1", "n2", "n3", "n4")) == before


def test_the_guard_stays_in_sight_while_another_file_is_edited(lab: DesiredLab) -> None:
    accept(lab, *IDS)
    delete(lab, "m0", "m1", "m2")
    guard = guard_of(lab.settle())
    lab.pass_time(1.0)
    lab.write("m3.yaml", model("m3", priority=1))
    lab.confirm(guard.digest)
    during = lab.look()
    assert guard_of(during) == guard
    assert list(during.models) == list(IDS)
    assert list(lab.look(after=0.25).models) == ["m3", "m4"]


def test_guarded_models_whose_files_return_are_as_they_were(lab: DesiredLab) -> None:
    before = accept(lab, *IDS)
    delete(lab, *IDS)
    lab.settle()
    after = accept(lab, *IDS)
    assert after.prune_guard is None
    assert {i: m.generation for i, m in after.models.items()} == dict.fromkeys(IDS, 1)
    assert before.models.keys() == after.models.keys()
    assert not any(m.guarded or m.held for m in after.models.values())


def test_held_models_are_not_counted_as_going(lab: DesiredLab) -> None:
    accept(lab, *IDS)
    lab.accept(broken=b"model_id: m0\nmodel_path: [\n")
    delete(lab, "m0", "m1", "m2")
    state = lab.settle()
    assert state.prune_guard is None
    assert list(state.models) == ["m0", "m3", "m4"]


def test_raising_the_percentage_to_100_lets_them_go(lab: DesiredLab) -> None:
    accept(lab, *IDS)
    delete(lab, *IDS)
    lab.settle()
    lab.source.prune_guard_percent = 100
    assert not lab.look(after=1.0).models


def test_a_guard_needs_proof_again_when_the_directory_is_another_one(lab: DesiredLab) -> None:
    accept(lab, *IDS)
    delete(lab, *IDS)
    lab.confirm(guard_of(lab.settle()).digest)
    lab.fs.rename(ROOT, "/elsewhere")
    lab.look(after=1.0)
    lab.fs.mkdir(ROOT)
    assert len(lab.look(after=1.0).models) == 5
    assert not lab.look(after=0.25).models


def test_models_count_though_other_files_never_come_to_rest(lab: DesiredLab) -> None:
    """Files that are rewritten all the time leave it open how many were managed: then either count holds."""
    lab.accept(**{i: model(i) for i in IDS[:2]})
    lab.write(f"{IDS[2]}.yaml", model(IDS[2]))

    def look(turn: int) -> DesiredState:
        lab.write("busy.yaml", f"# {turn}\n".encode())
        return lab.look(after=0.2)

    for turn in range(4):
        state = look(turn)
    assert list(state.models) == list(IDS[:3])
    for i in IDS[:2]:
        lab.delete(f"{i}.yaml")
    guard = guard_of(lab.settle())
    assert (guard.model_ids, guard.managed) == (IDS[:2], 3)
