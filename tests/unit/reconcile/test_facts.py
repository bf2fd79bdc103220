"""Phase, sync and health of a model, from the facts of one moment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.reconcile.status import Health, Phase, Sync, health_of, phase_of, sync_of
from support.status_lab import ATTEMPT, NOTHING, OLD, SITUATIONS, view, wanted

_WAITS = (Phase.PENDING, Sync.OUT_OF_SYNC, Health.MISSING)
_FAILED = (Phase.FAILED, Sync.OUT_OF_SYNC, Health.DEGRADED)
_SERVES = (Phase.READY, Sync.SYNCED, Health.HEALTHY)
_BEHIND = (Phase.READY, Sync.OUT_OF_SYNC, Health.DEGRADED)
_IN_DOUBT = (Phase.READY, Sync.UNKNOWN, Health.HEALTHY)
_UPDATING = (Phase.UPDATING, Sync.OUT_OF_SYNC, Health.PROGRESSING)
_LOADING = (Phase.LOADING, Sync.OUT_OF_SYNC, Health.PROGRESSING)
_PARKED = (Phase.EVICTED, Sync.OUT_OF_SYNC, Health.SUSPENDED)

EXPECTED = {
    "comes next": _WAITS,
    "waits for memory": _WAITS,
    "waits for a place": _WAITS,
    "waits for memory on its way back": _WAITS,
    "waits for its turn": _WAITS,
    "waits for its device": _WAITS,
    "its files still change": _WAITS,
    "its files are missing": _FAILED,
    "loads": _LOADING,
    "serves": _SERVES,
    "serves until it is idle": _SERVES,
    "is updated by surge": _UPDATING,
    "is updated by recreate": _UPDATING,
    "old one drains after a surge": _SERVES,
    "is declared anew while its old copy goes": _WAITS,
    "goes back after a failed update": _LOADING,
    "is being evicted": _PARKED,
    "was evicted": _PARKED,
    "failed and is tried again": _FAILED,
    "failed and waits for its turn": _FAILED,
    "failed for good": _FAILED,
    "failed too often": _FAILED,
    "its load hangs": _FAILED,
    "is sure to fail": _FAILED,
    "failed in another version": _WAITS,
    "serves the old version after a failed update": _BEHIND,
    "serves the old version and is not tried again": _BEHIND,
    "serves the old version until there is room": (
        Phase.READY,
        Sync.OUT_OF_SYNC,
        Health.HEALTHY,
    ),
    "serves, and its new limit does not hold": _BEHIND,
    "serves while its file is invalid": _IN_DOUBT,
    "serves while its file is in doubt": _IN_DOUBT,
    "serves while the directory is away": _IN_DOUBT,
    "serves while it is in conflict": _IN_DOUBT,
    "serves while the prune guard holds it": (Phase.READY, Sync.OUT_OF_SYNC, Health.HEALTHY),
    "serves while it is suspended": (Phase.READY, Sync.UNKNOWN, Health.SUSPENDED),
    "failed while it is suspended": (Phase.FAILED, Sync.UNKNOWN, Health.SUSPENDED),
    "is declared no more": (Phase.TERMINATING, Sync.OUT_OF_SYNC, Health.PROGRESSING),
    "was loaded through the Python API": _SERVES,
    "is taken by the Python API": _WAITS,
}


def test_every_situation_is_expected_to_be_something() -> None:
    assert EXPECTED.keys() == SITUATIONS.keys()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_situation_has_its_phase_sync_and_health(situation: str) -> None:
    facts = SITUATIONS[situation]
    assert (phase_of(facts), sync_of(facts), health_of(facts)) == EXPECTED[situation]


def test_what_is_left_of_a_failed_load_is_no_update() -> None:
    left = view(State.UNLOADING, ready_since_s=None)
    assert phase_of(replace(NOTHING, views=(left,))) is Phase.PENDING
    failed = SITUATIONS["failed and is tried again"]
    assert phase_of(replace(failed, views=(left,))) is Phase.FAILED


def test_a_recreate_of_the_same_version_is_an_update() -> None:
    facts = replace(NOTHING, views=(view(State.UNLOADING),), fallback=wanted(OLD))
    assert phase_of(facts) is Phase.UPDATING


@pytest.mark.parametrize(
    ("state", "parked", "phase"),
    [
        (State.LOADING, False, Phase.LOADING),
        (State.UNLOADING, False, Phase.TERMINATING),
        (State.UNLOADING, True, Phase.EVICTED),
        (State.FAILED, False, Phase.FAILED),
    ],
)
def test_a_model_of_the_python_api_has_a_phase_in_every_state(
    state: State, parked: bool, phase: Phase
) -> None:
    facts = replace(
        NOTHING, wanted=None, views=(view(state, owner=Owner.API),), parked=parked, source=None
    )
    assert phase_of(facts) is phase
    assert sync_of(facts) is Sync.SYNCED


def test_what_the_python_api_loaded_does_not_serve_for_a_file_of_the_same_id() -> None:
    facts = SITUATIONS["is taken by the Python API"]
    assert facts.generation == facts.views[0].spec.generation
    assert facts.observed_generation is None
    assert not facts.up_to_date


def test_a_load_that_has_just_failed_does_not_hang() -> None:
    """Seen: `OverMemoryLimit … not tried again before that loader returns` of a load that had returned."""
    hangs = SITUATIONS["its load hangs"]
    assert hangs.hung is not None
    assert hangs.attempt is not None
    failed = replace(hangs, attempt=replace(hangs.attempt, reason="OverMemoryLimit"))
    assert failed.hung is None
    other_version = replace(failed, attempt=replace(ATTEMPT, spec=OLD))
    assert other_version.hung is not None, "that it was another version that failed says nothing"
