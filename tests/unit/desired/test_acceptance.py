"""What becomes desired state: settling, last good specs, conflicts, pruning. On a file system in memory."""

from __future__ import annotations

import errno

import pytest

from splitlearn_manager.desired.state import DesiredState, SourceRef
from support.desired_lab import ROOT, DesiredLab, model

INVALID = b"model_id: x\nmodel_path: /weights/m.pt\nmax_memory_mb: 4gb\n"


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def lines(state: DesiredState) -> list[str]:
    return [str(problem) for problem in state.problems]


# -- settling


def test_a_new_file_is_accepted_at_the_second_look_settle_s_after_the_first(
    lab: DesiredLab,
) -> None:
    lab.write("a.yaml", model("x"))
    first = lab.look()
    assert (dict(first.models), first.next_check_s, first.complete) == ({}, 0.25, False)
    assert not lab.look(after=0.2).models
    second = lab.look(after=0.05)
    accepted = second.models["x"]
    assert (accepted.generation, accepted.source, accepted.held) == (
        1,
        SourceRef("a.yaml", 1),
        None,
    )
    assert accepted.accepted_at == pytest.approx(lab.now)
    assert (second.next_check_s, second.complete) == (None, True)


def test_a_slow_in_place_write_is_not_acted_on_though_each_step_is_valid(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x"))
    for digit in b"12345":
        lab.fs.append(lab.path("a.yaml"), b"priority: " if digit == ord("1") else bytes([digit]))
        assert not lab.look(after=0.2).models
    assert lab.settle().models["x"].config.priority == 2345


def test_two_writes_within_one_tick_of_the_clock_end_with_the_second(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x", priority=1))
    lab.look()
    lab.write("a.yaml", model("x", priority=2))  # same size, same mtime, same ctime, same inode
    assert lab.settle().models["x"].config.priority == 2


def test_a_change_of_the_same_size_and_mtime_is_noticed_because_mtime_lies(lab: DesiredLab) -> None:
    mtime_ns = lab.fs.now_ns
    lab.accept(a=model("x", priority=1))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=2))
    lab.fs.touch(lab.path("a.yaml"), mtime_ns)
    assert lab.settle().models["x"].config.priority == 2


def test_a_file_that_changes_while_it_is_read_is_read_again_later(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x", priority=1))
    lab.look()
    lab.pass_time(0.25)

    def rewrite(call: str, path: str) -> None:
        if call == "read":
            lab.fs.before = None
            lab.write("a.yaml", model("x", priority=2))

    lab.fs.before = rewrite
    assert not lab.look().models
    assert lab.settle().models["x"].config.priority == 2


def test_a_file_that_vanishes_while_it_is_read_keeps_its_models(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=2))
    lab.look()
    lab.pass_time(0.25)
    lab.fs.before = lambda call, path: lab.delete("a.yaml") if call == "read" else None
    state = lab.look()
    lab.fs.before = None
    assert state.models["x"].generation == 1
    assert state.next_check_s is not None
    assert not lab.settle().models


def test_a_file_that_has_not_changed_is_neither_read_nor_parsed_again(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=INVALID)
    before = lab.fs.calls["read"]
    for _ in range(5):
        lab.look(after=1.0)
    assert lab.fs.calls["read"] == before


def test_settle_s_can_be_changed_while_running(lab: DesiredLab) -> None:
    lab.source.settle_s = 2.0
    lab.write("a.yaml", model("x"))
    lab.look()
    state = lab.look(after=0.5)
    assert (dict(state.models), state.next_check_s) == ({}, 1.5)
    lab.source.settle_s = 0.5
    assert "x" in lab.look(after=0.1).models


def test_even_without_settle_time_it_takes_two_looks(lab: DesiredLab) -> None:
    lab.source.settle_s = 0.0
    lab.write("a.yaml", model("x"))
    assert lab.look().next_check_s == 0.0
    assert "x" in lab.look().models


# -- what counts as a change


@pytest.mark.parametrize(
    "same",
    [
        b"# a comment\nmodel_id: x\nmodel_path: /weights/m.pt\n",
        b"model_path: /weights/m.pt\nmodel_id: x\n",
        b"model_id:    'x'\n\n\nmodel_path: /weights/m.pt   # here",
        b"{model_id: x, model_path: /weights/m.pt}\n",
        b"model_id: x\nmodel_path: /weights/m.pt\npriority: 0\n",
    ],
)
def test_comments_order_white_space_and_spelled_out_defaults_are_no_change(
    lab: DesiredLab, same: bytes
) -> None:
    before = lab.accept(a=model("x")).models["x"]
    after = lab.accept(a=same).models["x"]
    assert (after.generation, after.spec_hash) == (before.generation, before.spec_hash)
    assert after.accepted_at == before.accepted_at


def test_touching_a_file_is_no_change(lab: DesiredLab) -> None:
    before = lab.accept(a=model("x"))
    lab.pass_time(1.0)
    lab.fs.touch(lab.path("a.yaml"))
    assert lab.settle() == before


def test_generation_counts_accepted_specs_and_goes_on_after_a_prune(lab: DesiredLab) -> None:
    specs = [model("x"), model("x", priority=1), model("x")]
    assert [lab.accept(a=spec).models["x"].generation for spec in specs] == [1, 2, 3]
    lab.delete("a.yaml")
    assert not lab.settle().models
    assert lab.accept(a=model("x")).models["x"].generation == 4


# -- last good spec


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (INVALID, "a.yaml is invalid"),
        (b"", "a.yaml is invalid"),
        (b"model_id: [", "a.yaml is invalid"),
        (b"\xff\xfe", "a.yaml is invalid"),
    ],
)
def test_invalid_file_keeps_last_good_spec_serving(
    lab: DesiredLab, broken: bytes, why: str
) -> None:
    good = lab.accept(a=model("x"), b=model("y")).models["x"]
    state = lab.accept(a=broken, b=model("y", priority=5))
    held = state.models["x"]
    assert (held.config, held.generation, held.held) == (good.config, good.generation, why)
    assert state.models["y"].generation == 2
    assert any(line.startswith("a.yaml:") for line in lines(state))
    fixed = lab.accept(a=model("x", priority=1))
    assert (fixed.models["x"].generation, fixed.models["x"].held) == (2, None)
    assert not fixed.problems


def test_the_problem_shows_file_line_column_key_and_what_was_expected(lab: DesiredLab) -> None:
    assert lines(lab.accept(a=INVALID)) == [
        'a.yaml:3:16  max_memory_mb: expected an integer, got "4gb"'
    ]


def test_an_unreadable_file_keeps_its_models_and_is_listed(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.fs.fail(lab.path("a.yaml"), errno.EACCES)
    lab.delete("b.yaml")
    state = lab.settle()
    assert state.models["x"].held == "a.yaml cannot be read: Permission denied"
    assert lines(state) == ["a.yaml  cannot be read: Permission denied"]
    lab.fs.heal(lab.path("a.yaml"))
    assert lab.settle().models["x"].held is None


def test_a_file_whose_reading_fails_is_tried_again_at_each_look(lab: DesiredLab) -> None:
    failing = True

    def fail_reads(call: str, path: str) -> None:
        if call == "read" and failing:
            raise OSError(errno.EIO, "Input/output error", path)

    lab.fs.before = fail_reads
    state = lab.accept(a=model("x"))
    assert not state.models
    assert lines(state) == ["a.yaml  cannot be read: Input/output error"]
    failing = False
    assert "x" in lab.look(after=1.0).models


def test_one_bad_document_holds_its_own_model_and_the_others_proceed(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x"), model("y"))
    lab.settle()
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=7), model("y", priority="high"))
    state = lab.settle()
    assert state.models["x"].config.priority == 7
    assert (state.models["y"].generation, state.models["y"].held) == (1, "a.yaml is invalid")
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=7))
    assert list(lab.settle().models) == ["x"]


def test_a_model_whose_document_is_missing_is_kept_while_another_document_is_bad(
    lab: DesiredLab,
) -> None:
    lab.write("a.yaml", model("x"), model("y"))
    lab.settle()
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x"), b"nonsense: 1\n")
    assert list(lab.settle().models) == ["x", "y"]


def test_a_link_that_leads_nowhere_keeps_the_model(lab: DesiredLab) -> None:
    lab.fs.write("/weights/real.yaml", model("x"))
    lab.fs.symlink("/weights/real.yaml", lab.path("a.yaml"))
    lab.settle()
    lab.fs.delete("/weights/real.yaml")
    state = lab.settle()
    assert state.models["x"].held == "a.yaml cannot be read: the link leads nowhere"
    lab.delete("a.yaml")
    assert not lab.settle().models


# -- conflicts


def test_two_files_with_one_id_are_both_in_conflict_and_the_id_stays_as_it_was(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("x", priority=1))
    state = lab.accept(b=b"# other\n" + model("x", priority=2))
    assert state.models["x"].config.priority == 1
    assert state.models["x"].held == "declared more than once: a.yaml:1 and b.yaml:2"
    assert state.conflicts == {"x": (SourceRef("a.yaml", 1), SourceRef("b.yaml", 2))}
    assert lines(state) == [
        "a.yaml:1  model_id: x is declared by b.yaml:2 too; keep one of them",
        "b.yaml:2  model_id: x is declared by a.yaml:1 too; keep one of them",
    ]
    lab.delete("a.yaml")
    solved = lab.settle()
    assert (solved.models["x"].config.priority, solved.models["x"].generation) == (2, 2)
    assert (solved.conflicts, solved.problems) == ({}, ())


def test_a_new_id_in_conflict_is_not_accepted_until_one_goes(lab: DesiredLab) -> None:
    state = lab.accept(a=model("x"), b=model("x"), c=model("y"))
    assert (list(state.models), list(state.conflicts)) == (["y"], ["x"])
    lab.delete("b.yaml")
    assert list(lab.settle().models) == ["x", "y"]


def test_two_documents_of_one_file_with_one_id_are_in_conflict(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=1), model("x", priority=2))
    state = lab.settle()
    assert state.models["x"].config.priority == 0
    assert state.conflicts == {"x": (SourceRef("a.yaml", 1), SourceRef("a.yaml", 5))}
    assert len(state.problems) == 1
    assert "line 1" in state.problems[0].message
    assert state.problems[0].line == 5


def test_editing_one_side_of_a_conflict_does_not_let_the_other_through(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.accept(b=model("x", priority=2))
    lab.pass_time(1.0)
    lab.write("a.yaml", model("x", priority=3))
    during = lab.look()
    assert during.models["x"].config.priority == 0
    assert list(during.conflicts) == ["x"]
    assert lab.settle().models["x"].config.priority == 0


def test_an_id_is_not_taken_over_from_a_file_that_has_become_invalid(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    state = lab.accept(a=INVALID, b=model("x", priority=9))
    assert state.models["x"].config.priority == 0
    assert state.conflicts == {"x": (SourceRef("a.yaml", 1), SourceRef("b.yaml", 1))}


# -- moving


@pytest.mark.parametrize("new", ["b.yaml", "0.yml", "team/a.yaml"])
def test_renaming_or_moving_a_file_never_unloads_and_is_no_new_generation(
    lab: DesiredLab, new: str
) -> None:
    before = lab.accept(a=model("x")).models["x"]
    lab.fs.mkdir(lab.path("team"))
    lab.settle()
    lab.pass_time(1.0)
    lab.rename("a.yaml", new)
    for wait in (0.0, 0.1, 0.1, 0.1, 0.1):
        assert lab.look(after=wait).models["x"].generation == before.generation
    after = lab.settle().models["x"]
    assert (after.source.file, after.spec_hash, after.held) == (new, before.spec_hash, None)
    assert after.accepted_at == before.accepted_at


def test_a_rename_seen_as_delete_and_create_waits_for_the_new_file(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    lab.look()
    lab.pass_time(0.2)
    lab.write("b.yaml", b"model_id: ")
    state = lab.look(after=0.1)
    assert state.models["x"].held == "no file declares it, but b.yaml is still changing"
    lab.write("b.yaml", model("x"))
    settled = lab.settle().models["x"]
    assert (settled.generation, settled.source.file) == (1, "b.yaml")


def test_an_id_that_moves_between_two_files_in_two_steps_is_not_unloaded(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x"), model("y"))
    lab.write("b.yaml", model("z"))
    lab.settle()
    lab.pass_time(1.0)
    lab.write("a.yaml", model("y"))
    lab.look()
    lab.pass_time(0.2)
    lab.write("b.yaml", model("z"), model("x"))
    for wait in (0.0, 0.05, 0.1, 0.1):
        assert "x" in lab.look(after=wait).models
    state = lab.settle()
    assert (state.models["x"].generation, state.models["x"].source) == (1, SourceRef("b.yaml", 4))


def test_a_moved_file_means_the_weights_beside_its_new_place(lab: DesiredLab) -> None:
    lab.fs.mkdir(lab.path("one"))
    lab.fs.mkdir(lab.path("two"))
    lab.write("one/a.yaml", model("x", model_path="m.pt"))
    assert lab.settle().models["x"].generation == 1
    lab.pass_time(1.0)
    lab.rename("one/a.yaml", "two/a.yaml")
    moved = lab.settle().models["x"]
    assert moved.generation == 2
    assert moved.config.resolved_model_path == f"{ROOT}/two/m.pt"


# -- absence


def test_a_model_is_pruned_only_when_two_complete_scans_agree(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.delete("a.yaml")
    first = lab.look(after=1.0)
    assert first.models["x"].held == "a.yaml is gone, for too short a time to be sure"
    assert first.next_check_s == 0.25
    assert list(lab.look(after=0.25).models) == ["y"]


def test_a_document_that_was_removed_is_pruned(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x"), model("y"))
    lab.settle()
    lab.pass_time(1.0)
    lab.write("a.yaml", model("y"))
    assert list(lab.look().models) == ["x", "y"]
    assert list(lab.look(after=0.25).models) == ["y"]


def test_a_missing_directory_keeps_everything(lab: DesiredLab) -> None:
    before = lab.accept(a=model("x"), b=model("y"))
    lab.fs.rename(ROOT, "/elsewhere")
    for _ in range(5):
        state = lab.look(after=1.0)
        assert list(state.models) == list(before.models)
        assert not state.source_available
        assert state.source_message == "/desired does not exist"
        assert state.models["x"].held == "/desired does not exist"
    lab.fs.rename("/elsewhere", ROOT)
    assert lab.look(after=1.0).models == before.models


def test_a_directory_that_returns_empty_needs_two_complete_scans_again(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.fs.rename(ROOT, "/elsewhere")
    lab.look(after=1.0)
    lab.fs.mkdir(ROOT)
    assert "x" in lab.look(after=1.0).models
    assert "x" in lab.look(after=0.2).models
    assert not lab.look(after=0.05).models


def test_a_directory_that_was_replaced_starts_the_count_of_absence_anew(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    lab.look()
    lab.fs.rename(ROOT, "/elsewhere")
    lab.fs.mkdir(ROOT)
    lab.pass_time(0.25)
    assert "x" in lab.look().models
    assert "x" in lab.look(after=0.2).models
    assert not lab.look(after=0.05).models


def test_absence_seen_in_another_directory_does_not_make_a_file_gone(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    lab.look()
    lab.fs.rename(ROOT, "/elsewhere")
    lab.fs.mkdir(ROOT)
    lab.look(after=0.25)
    lab.write("a.yaml", b"")
    assert lab.settle().models["x"].held == "a.yaml is invalid"


def test_a_file_that_came_and_went_unread_counts_as_one_that_could_declare_the_id(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    lab.write("b.yaml", model("x"))
    lab.look()
    lab.delete("b.yaml")
    between = lab.look(after=0.25)
    assert between.models["x"].held == (
        "no file declares it, but b.yaml is gone, for too short a time to be sure"
    )
    lab.write("c.yaml", model("x"))
    assert lab.settle().models["x"].generation == 1


def test_a_remount_of_the_same_files_changes_nothing(lab: DesiredLab) -> None:
    before = lab.accept(a=model("x")).models["x"]
    lab.fs.dev = 2
    for wait in (0.0, 0.25, 1.0):
        state = lab.look(after=wait)
        assert state.models["x"].generation == before.generation
    assert state.models["x"].held is None


def test_a_scan_torn_by_a_swap_is_no_proof_of_absence(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.delete("a.yaml")
    lab.look()
    lab.pass_time(0.25)
    lab.write("c.yaml", model("z"))

    def tear(call: str, path: str) -> None:
        if (call, path) == ("stat", lab.path("b.yaml")):
            lab.delete("c.yaml")

    lab.fs.before = tear
    torn = lab.look()
    lab.fs.before = None
    assert "x" in torn.models
    assert torn.next_check_s is not None
    assert torn.source_available
    assert list(lab.settle().models) == ["y"]


def test_an_unreadable_subdirectory_stops_all_pruning_and_nothing_else(lab: DesiredLab) -> None:
    lab.fs.mkdir(lab.path("sub"))
    lab.accept(a=model("x"), b=model("y"))
    lab.fs.fail(lab.path("sub"), errno.EACCES)
    lab.delete("a.yaml")
    lab.pass_time(1.0)
    lab.write("b.yaml", model("y", priority=1))
    for _ in range(4):
        state = lab.look(after=1.0)
    assert state.models["x"].held == "a.yaml cannot be seen at the moment"
    assert state.models["y"].generation == 2
    assert state.source_available
    assert lines(state) == [
        "sub  cannot be read: Permission denied; nothing is unloaded until it can"
    ]
    assert state.next_check_s is None
    lab.fs.heal(lab.path("sub"))
    assert list(lab.settle().models) == ["y"]


def test_models_behind_a_dead_directory_link_are_kept(lab: DesiredLab) -> None:
    lab.fs.mkdir("/mnt")
    lab.fs.write("/mnt/t.yaml", model("x"))
    lab.fs.symlink("/mnt", lab.path("team"))
    lab.accept(a=model("y"))
    lab.fs.rename("/mnt", "/unmounted")
    lab.delete("a.yaml")
    assert list(lab.settle().models) == ["x"]
    lab.delete("team")
    assert not lab.settle().models


def test_an_invalid_file_that_was_never_valid_blocks_only_ids_that_it_mentions(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("bert"), b=model("gpt2"))
    lab.accept(broken=b"model_id: bert\nmodel_path: [\n")
    lab.delete("a.yaml")
    lab.delete("b.yaml")
    state = lab.settle()
    assert list(state.models) == ["bert"]
    assert state.models["bert"].held == (
        "no file declares it, but broken.yaml is invalid and mentions it; correct that file"
    )
    lab.delete("broken.yaml")
    assert not lab.settle().models


def test_a_broken_file_with_a_new_name_keeps_what_it_mentions_and_an_empty_one_nothing(
    lab: DesiredLab,
) -> None:
    lab.accept(a=model("bert"), b=model("gpt2"))
    lab.delete("a.yaml")
    assert list(lab.accept(renamed=b"model_id: bert\nmodel_path: [\n").models) == ["bert", "gpt2"]
    assert list(lab.accept(renamed=b"").models) == ["gpt2"]


def test_an_id_that_is_moved_into_a_file_with_a_mistake_is_not_unloaded(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=model("y"))
    lab.delete("a.yaml")
    state = lab.accept(b=model("y") + b"---\n" + model("x", priority="soon"))
    assert list(state.models) == ["x", "y"]


def test_a_mention_in_utf16_is_a_mention(lab: DesiredLab) -> None:
    lab.accept(a=model("bert"))
    lab.accept(b="model_id: bert\nfoo: 1\n".encode("utf-16"))
    lab.delete("a.yaml")
    assert list(lab.settle().models) == ["bert"]


def test_a_file_that_could_never_be_read_could_declare_anything(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.write("b.yaml", b"?")
    lab.fs.fail(lab.path("b.yaml"), errno.EACCES)
    lab.delete("a.yaml")
    state = lab.settle()
    assert state.models["x"].held == (
        "no file declares it, but b.yaml cannot be read: Permission denied"
    )
    lab.fs.heal(lab.path("b.yaml"))
    assert not lab.settle().models


def test_a_link_to_nothing_that_never_declared_anything_blocks_nothing(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.fs.symlink("/nowhere", lab.path("dead.yaml"))
    lab.delete("a.yaml")
    assert not lab.settle().models


def test_a_file_that_never_stops_changing_blocks_pruning_and_says_so(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.delete("a.yaml")
    for _ in range(6):
        lab.write("log.yaml", str(lab.now).encode())
        state = lab.look(after=0.2)
    assert state.models["x"].held == "no file declares it, but log.yaml is still changing"


# -- the whole


def test_an_empty_directory_is_complete_after_two_scans(lab: DesiredLab) -> None:
    assert not lab.look().complete
    assert lab.look(after=0.25).complete


def test_once_settled_nothing_is_ever_pending_again(lab: DesiredLab) -> None:
    lab.accept(a=model("x"), b=INVALID)
    lab.fs.symlink("/nowhere", lab.path("dead.yaml"))
    lab.settle()
    assert [lab.look(after=0.1).next_check_s for _ in range(5)] == [None] * 5


def test_complete_stays_true_while_later_changes_settle(lab: DesiredLab) -> None:
    lab.accept(a=model("x"))
    lab.write("b.yaml", model("y"))
    state = lab.look()
    assert state.complete
    assert state.next_check_s is not None


def test_a_directory_that_is_not_there_is_never_complete(lab: DesiredLab) -> None:
    lab.fs.delete(ROOT)
    for _ in range(3):
        state = lab.look(after=1.0)
    assert not state.complete
    assert state.next_check_s is None


def test_problems_are_sorted_by_file_and_line(lab: DesiredLab) -> None:
    lab.write("b.yaml", INVALID, INVALID)
    lab.write("a.yaml", INVALID)
    places = [(p.file, p.line) for p in lab.settle().problems]
    assert places == [("a.yaml", 3), ("b.yaml", 3), ("b.yaml", 7)]


# -- server.yaml


def test_server_config_is_accepted_when_settled_and_the_last_good_one_is_kept(
    lab: DesiredLab,
) -> None:
    lab.write("server.yaml", b"port: 6000\n")
    assert lab.look().server is None
    server = lab.look(after=0.25).server
    assert server is not None
    assert server.port == 6000
    lab.pass_time(1.0)
    lab.write("server.yaml", b"port: many\n")
    state = lab.settle()
    assert state.server == server
    assert lines(state) == ['server.yaml:1:7  port: expected an integer, got "many"']
    lab.fs.rename(ROOT, "/elsewhere")
    assert lab.look(after=1.0).server == server


def test_a_removed_server_file_means_defaults_after_two_complete_scans(lab: DesiredLab) -> None:
    lab.write("server.yaml", b"port: 6000\n")
    lab.settle()
    lab.delete("server.yaml")
    assert lab.look(after=1.0).server is not None
    assert lab.look(after=0.25).server is None
    lab.write("server.yaml", b"port: 7000\n")
    server = lab.settle().server
    assert server is not None
    assert server.port == 7000
