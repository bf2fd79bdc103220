"""What people ask of a running loop, and what it then does, over a directory in memory."""

from __future__ import annotations

import errno
import itertools
import threading

import pytest

from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.reconcile.backoff import MOST_FAILURES, WINDOW_S
from splitlearn_manager.reconcile.observation import from_json, to_json
from splitlearn_manager.reconcile.reconciler import Reconciler
from splitlearn_manager.reconcile.status import Phase
from splitlearn_manager.reconcile.store import Store
from support.fakes import Bench
from support.loop_lab import ROOT, SETTLE_S, STEP_S, LoopLab
from support.waiting import eventually

BROKEN = {"config": {"kwargs": {"broken": True}}}
DEADLINE_S = 20.0


def lab_with(*model_ids: str) -> LoopLab:
    lab = LoopLab()
    for model_id in model_ids:
        lab.write(model_id)
    lab.settle()
    return lab


def test_a_suspended_model_ignores_its_files_until_it_is_resumed() -> None:
    lab = lab_with("a", "b")
    before = lab.served()
    lab.loop.suspend("a")
    lab.write("a", trusted=True)
    lab.write("b", trusted=True)
    lab.settle()
    assert lab.served()["a"] == before["a"]
    assert lab.served()["b"] != before["b"]
    shown = lab.loop.status.describe("a")
    assert shown is not None
    assert shown["suspended"] is True
    assert shown["generation"] == 1
    lab.loop.resume("a")
    lab.settle()
    assert lab.served()["a"] != before["a"]


def lab_that_tries(for_s: float, *, is_loaded: bool = True) -> LoopLab:
    """Its model `a` gets a new version with a rollout of one step: tried, or on its way to that."""
    lab = lab_with("a")
    lab.write("a", trusted=True, rollout=rollout(for_s))
    lab.loop.turn()
    lab.pass_time(STEP_S)
    lab.loop.turn()
    assert len(lab.executor.waiting) == 1
    if is_loaded:
        lab.executor.run_one()
        assert lab.manager.table.trials
    return lab


def rollout(for_s: float) -> dict[str, object]:
    return {"canary": [{"percent": 50, "for_s": for_s}], "min_requests": 0}


def test_a_rollout_does_not_take_over_once_its_model_is_suspended() -> None:
    lab = lab_that_tries(for_s=10.0)
    before = lab.served()
    lab.pass_time(20.0)
    lab.loop.suspend("a")
    for _ in range(3):
        lab.loop.turn()
        lab.pass_time(STEP_S)
    assert lab.served() == before
    lab.loop.resume("a")
    lab.settle()
    assert lab.served() != before


def test_a_rollout_that_begins_while_its_model_is_suspended_goes_no_further() -> None:
    lab = lab_that_tries(for_s=0.0, is_loaded=False)
    before = lab.served()
    lab.loop.suspend("a")
    lab.loop.turn()
    lab.executor.run_one()
    for _ in range(3):
        lab.loop.turn()
        lab.pass_time(STEP_S)
    assert lab.served() == before
    lab.loop.resume("a")
    lab.settle()
    assert lab.served() != before


def test_a_version_that_nobody_wants_any_more_does_not_take_over_when_its_model_is_resumed() -> (
    None
):
    lab = lab_that_tries(for_s=10.0)
    before = lab.served()
    lab.loop.suspend("a")
    lab.loop.turn()
    lab.write("a", trusted=True, rollout=rollout(10.0), config={"kwargs": {"v": 2}})
    for _ in range(3):
        lab.pass_time(20.0)
        lab.loop.turn()
    lab.loop.resume("a")
    lab.loop.turn()
    assert lab.served() == before
    assert not lab.manager.table.trials


def aborted(lab: LoopLab) -> None:
    """Its version that is tried is taken back."""
    lab.loop.abort("a")
    lab.settle()
    assert lab.loop.status.in_short("a") == "Ready (RolloutAborted)"


def turns(lab: LoopLab) -> None:
    """Some of them, as many as an edit takes to be followed."""
    for _ in range(4):
        lab.loop.turn()
        lab.executor.run_all()
        lab.pass_time(STEP_S)


def tried(lab: LoopLab) -> list[int]:
    """The generations that are tried after a while, a step of ten seconds not over."""
    turns(lab)
    return [one.version.spec.generation for one in lab.manager.table.trials.values()]


@pytest.mark.parametrize("starts_anew", [False, True])
def test_a_version_that_was_taken_back_is_tried_when_an_edit_asks_for_it_again(
    starts_anew: bool,
) -> None:
    """Seen to say `not tried again before its file changes`, which it had done twice."""
    lab = lab_that_tries(for_s=10.0)
    aborted(lab)
    lab.write("a")
    lab.settle()
    if starts_anew:
        lab.start()
        lab.settle()
    assert "failed load" in lab.loop.retry("a"), "what serves has not failed"
    lab.write("a", trusted=True, rollout=rollout(10.0))
    assert tried(lab) == [4]
    history = [(entry.generation, entry.outcome) for entry in lab.loop.history("a")]
    assert history == [(1, "Ready"), (2, "RolloutAborted"), (3, "Ready"), (4, "")]
    aborted(lab)
    assert "generation 4" in str((lab.loop.status.describe("a") or {})["message"])
    if starts_anew:
        lab.start()
    assert tried(lab) == [], "nobody has asked for it again"


def test_new_weights_that_were_taken_back_are_tried_when_they_are_put_there_again() -> None:
    """As a link is, that names the one directory and then the other again."""
    lab = LoopLab()
    for name in ("one", "two"):
        lab.fs.write(f"/weights/{name}.pt", name.encode())

    def point_to(target: str) -> None:
        if lab.fs.exists("/weights/a.pt"):
            lab.fs.delete("/weights/a.pt")
        lab.fs.symlink(target, "/weights/a.pt")

    point_to("one.pt")
    lab.write("a", rollout=rollout(10.0))
    lab.settle()
    point_to("two.pt")
    assert tried(lab) == [1]
    aborted(lab)
    assert tried(lab) == []
    point_to("one.pt")
    assert tried(lab) == []
    point_to("two.pt")
    assert tried(lab) == [1]


def test_a_request_that_hangs_in_a_version_that_was_taken_back_holds_no_update_up() -> None:
    """Seen to hold all updates up until the node was started anew."""
    lab = lab_that_tries(for_s=10.0)
    (trial,) = lab.manager.table.trials.values()
    lease = lab.manager.try_lease(trial.version)
    assert lease is not None
    lab.loop.abort("a")
    lab.loop.turn()
    lab.write("a", config={"kwargs": {"v": 3}})
    turns(lab)
    assert lab.loop.status.in_short("a") == "Ready (Unloading)"
    lab.pass_time(30.0)
    lab.settle()
    assert lab.manager.table.by_model["a"].spec.generation == 3
    said = lab.loop.status.explain("a")
    assert said is not None
    kept = "a former copy keeps 10 MB on cpu until 1 running request has ended, which takes longer"
    assert any(kept in line for line in said["because"])  # type: ignore[attr-defined]
    assert "start the node anew" in str(said["would_help"])
    assert len(lab.runtime.open_models) == 2, "it is never closed under a request"
    lease.release()
    lab.settle()
    lab.end_state()


@pytest.mark.parametrize("has_room", [False, True])
def test_a_request_that_hangs_in_a_version_that_is_replaced_does_not_keep_the_model_down(
    has_room: bool,
) -> None:
    lab = LoopLab(max_models=2 if has_room else 1)
    lab.write("a", update="recreate")
    lab.settle()
    lease = lab.manager.lease("a")
    lab.write("a", update="recreate", trusted=True)
    turns(lab)
    assert lab.loop.status.in_short("a") == "Updating (Unloading)"
    lab.pass_time(30.0)
    lab.settle()
    assert bool(lab.served()) is has_room
    if not has_room:
        assert lab.loop.status.in_short("a") == "Pending (MaxModels)"
        said = lab.loop.status.explain("a")
        assert said is not None
        assert "start the node anew" in str(said["would_help"])
    lease.release()
    lab.settle()
    assert len(lab.served()) == 1
    lab.end_state()


def test_room_that_a_request_keeps_for_too_long_is_not_waited_for() -> None:
    """Seen to let a request run into its deadline, while an idle model had the room that it needs."""
    lab = LoopLab(max_models=2)
    lab.write("a")
    lab.write("b")
    lab.settle()
    lab.manager.lease("a")
    lab.delete("a")
    lab.write("c")
    turns(lab)
    assert lab.loop.status.in_short("c") == "Pending (AwaitingMemory)"
    waiter = lab.loop.join("c", 60.0)
    lab.pass_time(30.0)
    turns(lab)
    assert sorted(lab.served()) == ["c"]
    lab.loop.leave(waiter)


def test_new_weights_that_are_tried_are_told_from_those_that_serve() -> None:
    """Seen to say that generation 1 was aborted, and that generation 1 goes on serving."""
    lab = LoopLab()
    lab.write("a", rollout=rollout(10.0))
    lab.settle()
    lab.fs.replace("/weights/a.pt", b"others")
    assert tried(lab) == [1]
    new = "generation 1 with new weights"
    shown = lab.loop.status.describe("a")
    assert shown is not None
    assert str(shown["message"]).startswith(f"{new} is tried: canary: step 1 of 1")
    assert lab.loop.abort("a").startswith(f"{new} of a is taken back")
    lab.settle()
    shown = lab.loop.status.describe("a")
    assert shown is not None
    assert f"{new} was aborted by somebody; generation 1 goes on serving" in str(shown["message"])
    events = [event["message"] for event in lab.loop.status.events()[0]]
    assert [said for said in events if "generation 1 is tried" in str(said)] == []
    lab.start()
    assert tried(lab) == []
    said = lab.loop.status.explain("a")
    assert said is not None
    assert said["headline"] == (
        "a is not served: its version was taken back while it was tried, and there is no other"
    )
    assert "took the place of those that served" in str(said["because"])
    lab.order(lambda: lab.loop.retry("a"))
    assert lab.served(), said["would_help"]


def test_a_version_that_was_taken_back_is_no_other_one_while_its_weights_are_away() -> None:
    lab = lab_that_tries(for_s=10.0)
    served = lab.served()
    aborted(lab)
    lab.fs.fail("/weights/a.pt", errno.ENOENT)
    lab.start()
    assert tried(lab) == []
    lab.fs.heal("/weights/a.pt")
    assert tried(lab) == []
    assert lab.served() == served


def test_a_suspended_model_is_not_unloaded_when_its_file_goes_but_when_it_is_resumed() -> None:
    lab = lab_with("a", "b", "c")
    lab.loop.suspend("a")
    lab.delete("a")
    lab.settle()
    assert "a" in lab.served()
    lab.loop.resume("a")
    lab.settle()
    assert "a" not in lab.served()


def test_a_model_that_does_not_exist_cannot_be_asked_for() -> None:
    lab = lab_with("a")
    for ask in (lab.loop.suspend, lab.loop.resume, lab.loop.retry):
        with pytest.raises(ModelNotFound, match="'b'"):
            ask("b")


def test_a_retry_does_not_wait_for_the_backoff() -> None:
    lab = LoopLab()
    lab.write("a", **BROKEN)
    lab.settle()
    tries = len(lab.runtime.started)
    lab.loop.turn()
    assert len(lab.runtime.started) == tries
    assert "tried again at once" in lab.loop.retry("a")
    lab.loop.turn()
    lab.executor.run_all()
    assert len(lab.runtime.started) == tries + 1


def test_whatever_asks_for_it_no_more_than_ten_loads_of_a_model_fail_in_a_minute() -> None:
    """New specs, new weights, `retry` and a file that goes and comes back."""
    lab = LoopLab()
    lab.write("other")
    failed_at: list[float] = []
    number = 0
    while lab.clock.now() < 1000.0 + 3 * WINDOW_S:
        number += 1
        if number % 7 == 0:
            lab.delete("a")
        else:
            lab.write("a", config={"kwargs": {"broken": True, "number": number}})
        if number % 3 == 0 and lab.fs.exists("/weights/a.pt"):
            lab.fs.replace("/weights/a.pt", f"{number}".encode())
        lab.loop.turn()
        if number % 5 == 0 and "a" in lab.loop.status.phases:
            lab.loop.retry("a")
        for _ in range(3):
            tries = len(lab.runtime.started)
            lab.loop.turn()
            lab.executor.run_all()
            failed_at += [lab.clock.now()] * sum(
                model_id == "a" for model_id, _ in lab.runtime.started[tries:]
            )
            lab.pass_time(0.2)
    assert len(failed_at) > 2 * MOST_FAILURES
    for first, eleventh in zip(failed_at, failed_at[MOST_FAILURES:], strict=False):
        assert eleventh - first >= WINDOW_S - 1e-6
    assert "other" in lab.served()


def test_the_limit_on_failures_is_told_with_its_end() -> None:
    lab = LoopLab()
    for number in range(MOST_FAILURES + 1):
        lab.write("a", config={"kwargs": {"broken": True, "number": number}})
        lab.settle()
    shown = lab.loop.status.describe("a")
    assert shown is not None
    assert (shown["phase"], shown["reason"]) == ("Failed", "RateLimited")
    assert isinstance(shown["next_retry_at"], float)
    assert "not sooner: 10 loads of it failed within 60 s" in lab.loop.retry("a")


def test_many_models_go_only_when_that_is_confirmed() -> None:
    lab = lab_with("a", "b", "c", "d")
    for model_id in ("a", "b", "c"):
        lab.delete(model_id)
    guard = lab.settle().desired.prune_guard
    assert guard is not None
    assert lab.served().keys() == {"a", "b", "c", "d"}
    with pytest.raises(SplitlearnError) as refused:
        lab.loop.confirm_prune("000000000000")
    assert refused.value.reason == "DigestMismatch"
    assert "3 models are unloaded: a, b, c" in lab.loop.confirm_prune(guard.digest)
    lab.settle()
    assert lab.served().keys() == {"d"}
    with pytest.raises(SplitlearnError) as refused:
        lab.loop.confirm_prune(guard.digest)
    assert refused.value.reason == "NothingToConfirm"


def test_a_confirmation_does_not_stand_for_the_next_time() -> None:
    lab = lab_with("a", "b", "c", "d")
    for _ in range(2):
        for model_id in ("a", "b", "c"):
            lab.delete(model_id)
        guard = lab.settle().desired.prune_guard
        assert guard is not None
        lab.loop.confirm_prune(guard.digest)
        lab.settle()
        for model_id in ("a", "b", "c"):
            lab.write(model_id)
        lab.settle()
    for model_id in ("a", "b", "c"):
        lab.delete(model_id)
    lab.settle()
    assert lab.served().keys() == {"a", "b", "c", "d"}


def test_the_history_says_what_was_accepted_and_how_it_went() -> None:
    lab = lab_with("a")
    lab.write("a", priority=2)
    lab.settle()
    lab.fs.replace("/weights/a.pt", b"other weights")
    lab.settle()
    lab.write("a", priority=2, **BROKEN)
    lab.settle()
    assert [(h.generation, h.what, h.source, h.outcome) for h in lab.loop.history("a")] == [
        (1, "declared", "a.yaml:1", "Ready"),
        (2, "priority 0 → 2", "a.yaml:1", "Ready"),
        (2, "weights changed", "a.yaml:1", "Ready"),
        (3, 'kwargs {} → {"broken": true}', "a.yaml:1", "LoadFailed"),
    ]
    assert lab.loop.history("b") == ()


def test_the_history_keeps_the_latest() -> None:
    lab = lab_with("a")
    for priority in range(1, 30):
        lab.write("a", priority=priority)
        lab.settle()
    assert [h.generation for h in lab.loop.history("a")] == list(range(11, 31))


def test_weights_are_watched_of_what_runs_is_tried_or_asked_for() -> None:
    lab = LoopLab(max_models=1)
    lab.write("runs")
    lab.settle()
    lab.write("fails", priority=-1, **BROKEN)
    lab.write("waits", priority=-1)
    lab.settle()
    looked: list[frozenset[str]] = []
    look = lab.source.look
    lab.source.look = lambda now, i: looked.append(i.watched) or look(now, i)  # type: ignore[assignment, func-returns-value]
    lab.loop.turn()
    assert looked[-1] == {"runs"}
    lab.loop.join("waits", 30.0)
    lab.loop.turn()
    assert looked[-1] == {"runs", "waits"}


def test_a_full_disk_stops_nothing_is_said_once_and_is_over_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "splitlearn_manager")
    lab = lab_with("a")
    lab.state.error = errno.ENOSPC
    lab.write("a", trusted=True)
    lab.write("b")
    lab.settle()
    assert lab.served().keys() == {"a", "b"}
    assert "No space left on device" in lab.loop.status.node_facts.state_problem
    assert caplog.text.count("event=StateNotKept") == 1
    lab.state.error = None
    lab.pass_time(1.0)
    lab.loop.turn()
    assert lab.loop.status.node_facts.state_problem == ""
    assert caplog.text.count("event=StateKept") == 1
    assert Store(lab.state).load()[0].models.keys() == {"a", "b"}


def test_what_cannot_be_written_is_tried_at_most_once_a_second() -> None:
    lab = lab_with("a")
    lab.state.error = errno.ENOSPC
    lab.write("a", priority=1)
    tries: list[float] = []
    lab.state.before = lambda name: tries.append(lab.clock.now())
    for _ in range(100):
        lab.pass_time(0.05)
        turn = lab.loop.turn()
        assert turn.next_s is None or turn.next_s >= 0.0
    assert len(tries) > 2
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(tries))


def test_waiting_for_a_turn_does_not_count_the_one_that_is_under_way() -> None:
    lab = lab_with("a")
    results: list[bool] = []
    waiter: list[threading.Thread] = []
    look = lab.source.look

    def ask_within_a_turn(now: float, instructions: object) -> object:
        if not waiter:
            thread = threading.Thread(
                target=lambda: results.append(lab.loop.await_turn(DEADLINE_S))
            )
            waiter.append(thread)
            thread.start()
            eventually(lambda: lab.loop._wake._waiters, "somebody waits")  # type: ignore[attr-defined]
        return look(now, instructions)  # type: ignore[arg-type]

    lab.source.look = ask_within_a_turn  # type: ignore[assignment, method-assign]
    lab.loop.turn()
    assert results == []
    lab.loop.turn()
    waiter[0].join(DEADLINE_S)
    assert results == [True]
    assert lab.loop.await_turn(0.0) is False


def elsewhere(lab: LoopLab, store: Store | None = None) -> Reconciler:
    """A loop in another process, as `plan` makes it."""
    from splitlearn_manager.desired.source import DesiredSource

    bench = Bench(budgets_mb={"cpu": 10_000.0}, max_models=20)
    bench.clock.advance(lab.clock.now() - bench.clock.now())
    return Reconciler(
        DesiredSource(ROOT, lab.fs, SETTLE_S), bench.manager, bench.clock, store=store
    )


@pytest.mark.parametrize("trouble", ["broken", "in conflict", "unreadable", "suspended", "guarded"])
def test_what_the_node_holds_is_not_planned_to_go(trouble: str) -> None:
    """Seen to fail with a source of one's own that does not take over what the node has accepted."""
    lab = lab_with("a", "b", "c", "d")
    if trouble == "broken":
        lab.write_bytes("a", b"model_id: [")
    elif trouble == "in conflict":
        lab.write_bytes("b", b"---\n".join(lab.fs.content(f"{ROOT}/{i}.yaml") for i in ("a", "b")))
        lab.write_bytes("a", b"---\n".join((lab.fs.content(f"{ROOT}/a.yaml"), b"model_id: [\n")))
    elif trouble == "unreadable":
        lab.fs.fail(ROOT, errno.EACCES)
    elif trouble == "suspended":
        lab.loop.suspend("a")
        lab.delete("a")
    else:
        for model_id in ("a", "b", "c"):
            lab.delete(model_id)
    its_own = lab.settle()
    node = from_json(to_json(lab.loop.observe()))
    desired, made = elsewhere(lab).preview(SETTLE_S, node)
    assert made.actions == its_own.plan.actions == ()
    assert desired.models.keys() == its_own.desired.models.keys()
    assert desired.models["a"].held
    assert desired.models["a"].generation == 1
    assert desired.prune_guard == its_own.desired.prune_guard
    assert (desired.prune_guard is not None) == (trouble == "guarded")


def test_without_a_node_what_is_planned_is_what_a_start_would_do_and_nothing_is_written() -> None:
    lab = lab_with("a", "b")
    lab.write_bytes("a", b"model_id: [")
    lab.write("b", priority=3)
    lab.state.held["models-63.json"] = b"damaged"
    lab.state.log.clear()
    loop = elsewhere(lab, Store(lab.state))
    desired, made = loop.preview(SETTLE_S)
    assert [(a.verb, a.model_id) for a in made.actions] == [("load", "b"), ("load", "a")]
    assert desired.models["a"].held
    assert desired.models["b"].generation == 2
    assert lab.state.log == []


def test_a_model_is_ready_when_a_process_that_knows_it_starts_with_its_file_broken() -> None:
    lab = lab_with("a")
    lab.write_bytes("a", b"\0\0\0")
    lab.start()
    lab.settle()
    assert lab.loop.status.phases == {"a": Phase.READY}
