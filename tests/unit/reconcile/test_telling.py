"""What the log says of a node: each matter once, with what happens meanwhile and what comes next."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.desired.state import DesiredModel, DesiredState, PruneGuard, SourceRef
from splitlearn_manager.reconcile.telling import ProblemLog, SituationLog
from support.fakes import model
from support.status_lab import ATTEMPT, NO_PLACE, NOON, NOTHING, RETRY, SITUATIONS, view, wanted

MISTAKE = Problem("m.yaml", 3, 16, "max_memory_mb", 'expected an integer, got "4gb"')
GUARD = PruneGuard("3f1c0a9be2d4", ("a", "b", "c"), 4)


@pytest.fixture(autouse=True)
def _all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "splitlearn_manager")


def accepted(held: str | None = "m.yaml is invalid") -> DesiredModel:
    config = model("m")
    return DesiredModel(
        config, 2, config.spec_hash(), config.load_hash(), SourceRef("m.yaml", 1), held=held
    )


def problems_said(caplog: pytest.LogCaptureFixture, **state: object) -> list[str]:
    log = ProblemLog()
    for _ in range(2):
        log.say(replace(DesiredState(source_available=True), **state))  # type: ignore[arg-type]
    return caplog.messages


def test_an_invalid_file_whose_model_was_accepted_before(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = problems_said(caplog, problems=(MISTAKE,), models={"m": accepted()})
    assert line.startswith(
        'event=Problem meanwhile="m stays at generation 2" msg="m.yaml:3:16  max_memory_mb: '
    )


def test_an_invalid_file_that_was_never_accepted(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = problems_said(caplog, problems=(MISTAKE,))
    assert line.startswith('event=Problem meanwhile="left out until that is corrected" msg=')


def test_a_conflict_is_said_of_both_files_with_the_model_that_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refs = (SourceRef("m.yaml", 1), SourceRef("other.yaml", 3))
    both = tuple(
        Problem(r.file, r.line, None, "model_id", "m is declared twice; keep one") for r in refs
    )
    held = replace(accepted(), claimed_by=refs)
    lines = problems_said(caplog, problems=both, models={"m": held})
    assert ['meanwhile="m stays at generation 2"' in line for line in lines] == [True, True]


def test_an_invalid_server_file_leaves_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem("server.yaml", 1, 7, "port", 'expected an integer, got "many"')
    (line,) = problems_said(caplog, problems=(problem,))
    assert 'meanwhile="the settings in force stay"' in line


def test_a_directory_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = problems_said(
        caplog, source_available=False, source_message="/desired does not exist"
    )
    assert line == (
        'event=Problem meanwhile="everything stays as it is until it can be read" '
        'msg="/desired does not exist"'
    )


def test_the_prune_guard_is_said_once_with_both_ways_out(caplog: pytest.LogCaptureFixture) -> None:
    log = ProblemLog()
    held = DesiredState(source_available=True, prune_guard=GUARD)
    for state in (held, held, replace(held, prune_guard=None)):
        log.say(state)
    said, over = caplog.messages
    text = "prune guard 3f1c0a9be2d4: no file declares 3 of 4 models any more (a, b, c)"
    assert said == (
        'event=Problem meanwhile="all of them stay; put their files back, or confirm with '
        f'`apply DIRECTORY --confirm-prune 3f1c0a9be2d4`" msg="{text}"'
    )
    assert over == f'event=Resolved msg="{text}"'


def test_after_a_failed_load_it_is_said_when_it_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = SituationLog()
    failed = SITUATIONS["failed and is tried again"]
    loading = replace(failed, views=(view(State.LOADING),), waiting=None)
    again = replace(failed, attempt=replace(ATTEMPT, failures=4))
    for facts in (failed, failed, loading, again):
        log.say([facts], NOON)
    text = 'event=NotAsDeclared model=m reason=LoadFailed failed={} msg="it is tried again at 12:00:09"'
    assert caplog.messages == [text.format(3), text.format(4)]


def test_after_a_failed_update_it_is_said_who_goes_on_serving(
    caplog: pytest.LogCaptureFixture,
) -> None:
    SituationLog().say([SITUATIONS["serves the old version after a failed update"]], NOON)
    (line,) = caplog.messages
    assert line.endswith('msg="generation 1 goes on serving; it is tried again at 12:00:09"')


def test_a_wait_that_people_end_is_said_once_and_again_after_it_was_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = SituationLog()
    waits = replace(NOTHING, waiting=NO_PLACE)
    for facts in (waits, waits, SITUATIONS["serves"], waits):
        log.say([facts], NOON)
    assert len(caplog.messages) == 2
    assert all("reason=MaxModels" in line for line in caplog.messages)


def test_what_passes_by_itself_and_what_is_well_is_not_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("serves", "waits for its turn", "was evicted", "loads"):
        SituationLog().say([SITUATIONS[name]], NOON)
    assert caplog.messages == []


def test_of_many_waits_that_begin_at_once_some_are_said_and_the_others_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = [
        replace(NOTHING, model_id=f"m{n}", wanted=wanted(), waiting=NO_PLACE) for n in range(1000)
    ]
    log = SituationLog()
    for _ in range(2):
        log.say(many, NOON)
    assert len(caplog.messages) == 21
    assert caplog.messages[-1] == (
        'event=NotAsDeclared msg="980 more models wait; `status` lists them"'
    )


def test_a_try_that_is_under_way_does_not_make_the_same_failure_new(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = SituationLog()
    first = replace(NOTHING, attempt=ATTEMPT, waiting=RETRY)
    log.say([first], NOON)
    log.say([replace(first, views=(view(State.LOADING),))], NOON)
    log.say([first], NOON)
    assert len(caplog.messages) == 1, "the same failure is said once"
