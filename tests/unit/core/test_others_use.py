"""What others use of a device: exact at rest, unmoved by noise and by our own loads, quick to rise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.core.lifecycle import ModelSpec, State
from splitlearn_manager.core.others_use import (
    HOLD_S,
    Held,
    OthersUse,
    Reading,
    first_use,
    floor_mb,
    held_on,
    next_use,
    slack_mb,
)
from splitlearn_manager.core.snapshot import InstanceView
from support.fakes import model
from support.status_lab import view

TOTAL = 10_240.0  # a slack of 40 MB, a floor of 512
AT_REST = Held(100, 100)


def read(used_mb: float, stalled_percent: float | None = None) -> Reading:
    return Reading(TOTAL, used_mb, stalled_percent)


def known(mb: float, *, sure: bool = True) -> OthersUse:
    return OthersUse(mb, TOTAL, sure)


def test_at_rest_it_is_what_is_used_less_what_models_hold() -> None:
    assert first_use(read(3000), AT_REST).mb == 2900
    assert first_use(read(3000), Held()).mb == 3000
    assert first_use(read(50), AT_REST).mb == 0


@pytest.mark.parametrize("noise_mb", [-40, -7, 0, 13, 40])
def test_noise_changes_nothing_at_all(noise_mb: float) -> None:
    use = known(2900)
    assert next_use(use, read(3000 + noise_mb), AT_REST, 0.0) is use


def test_it_rises_at_once() -> None:
    assert next_use(known(2900), read(3041), AT_REST, 0.0).mb == 2941


def test_it_falls_when_that_has_lasted_and_to_the_highest_since() -> None:
    use, now = known(2900), 50.0
    for used in (2000, 2300, 2100):
        use = next_use(use, read(used), AT_REST, now)
        assert use.mb == 2900
        now += HOLD_S / 3
    assert next_use(use, read(1500), AT_REST, now + 0.01).mb == 2200


def test_a_moment_of_more_use_begins_the_waiting_anew() -> None:
    use = next_use(known(2900), read(2000), AT_REST, 0.0)
    use = next_use(use, read(3000), AT_REST, HOLD_S - 1)
    assert next_use(use, read(2000), AT_REST, HOLD_S + 1).mb == 2900


def test_a_load_under_way_moves_nothing_however_far_it_is() -> None:
    use, loading = known(2900), Held(100, 100 + 1.25 * 800, settled=False)
    for used in (3000, 3400, 3800, 4000):
        assert next_use(use, read(used), loading, 0.0) is use
    # Whatever the load may hold, others must have taken the rest.
    assert next_use(use, read(4100), loading, 0.0).mb == 3000


def test_what_rose_during_a_load_falls_as_soon_as_the_load_is_over() -> None:
    loading = Held(100, 200, settled=False)
    use = next_use(known(2900), read(4000), loading, 0.0)
    assert (use.mb, use.sure) == (3800, False)
    assert next_use(use, read(4000), Held(1000, 1000), 0.5).mb == 3000


def test_another_limit_of_the_container_is_read_afresh() -> None:
    use = next_use(known(2900), Reading(5000, 3000), AT_REST, 0.0)
    assert (use.mb, use.total_mb) == (2900, 5000)


def test_stalls_count_from_a_fifth_of_the_time_until_they_are_rare() -> None:
    use, seen = known(2900), []
    for percent in (19.9, 20.0, 12.0, 5.0, 4.9, 12.0, None):
        use = next_use(use, read(3000, percent), AT_REST, 0.0)
        seen.append(use.stalled)
    assert seen == [False, True, True, True, False, False, False]
    assert use == known(2900)


def test_floor_and_slack_follow_the_size_within_bounds() -> None:
    assert [floor_mb(mb) for mb in (100, 2048, 24_000, 80_000)] == [64, 102.4, 512, 512]
    assert [slack_mb(mb) for mb in (100, 2048, 80_000)] == [4, 8, 128]
    for mb in (100, 600, 2048, 8000, 24_000, 500_000):
        assert slack_mb(mb) <= floor_mb(mb) / 4  # it may be off by that much, either way


# What our own models hold.


def instance(
    state: State, mb: float = 100.0, *, key: str = "m", leases: int = 0, **keys: object
) -> InstanceView:
    spec = ModelSpec.of(model("m"))
    measured = None if state in (State.LOADING, State.FAILED) else mb
    values = {"reserved_mb": mb, "measured_mb": measured, "leases": leases, **keys}
    return view(state, spec, key=key, **values)  # type: ignore[arg-type]


def held(*views: InstanceView, after: tuple[InstanceView, ...] | None = None) -> Held:
    return held_on("cpu", views, views if after is None else after)


def test_what_serves_holds_what_was_measured() -> None:
    assert held(instance(State.READY, 100), instance(State.READY, 50, key="n")) == Held(150, 150)
    assert held_on("cuda:0", (instance(State.READY),), ()) == Held()


@pytest.mark.parametrize("state", [State.LOADING, State.FAILED, State.UNLOADING])
def test_what_is_on_its_way_may_hold_nothing_or_all_and_some_more(state: State) -> None:
    assert held(instance(state, 100)) == Held(0, 125, settled=False)


def test_what_came_or_went_while_the_device_was_read_may_have_been_there_or_not() -> None:
    ready = instance(State.READY, 100)
    assert held(ready, after=()) == Held(0, 125, settled=False)
    assert held(after=(ready,)) == Held(0, 125, settled=False)
    assert held(instance(State.LOADING, 80), after=(ready,)) == Held(0, 125, settled=False)


def test_what_is_tried_is_in_memory_like_what_serves() -> None:
    tried = instance(State.LOADING, measured_mb=100, trial="canary: step 1 of 2")
    assert held(tried) == Held(100, 100)
    assert held(replace(tried, leases=1, reserved_mb=130)) == Held(100, 130)
    still_read = instance(State.LOADING)
    assert held(still_read, after=(tried,)) == Held(0, 125, settled=False)


def test_what_others_take_and_leave_during_a_trial_is_not_thought_theirs_for_as_long() -> None:
    tried = held(instance(State.LOADING, measured_mb=100, trial="shadow: asked a copy"))
    use, now = first_use(read(100), tried), 0.0
    for used in (5100, 100):
        for _ in range(3):
            use = next_use(use, read(used), tried, now)
            now += HOLD_S / 2
    assert use.mb == 0


def test_a_model_in_use_may_hold_all_that_is_reserved_for_it() -> None:
    idle = instance(State.READY, measured_mb=60.0, reserved_mb=100.0)
    busy = instance(State.READY, measured_mb=60.0, reserved_mb=100.0, leases=1)
    assert held(idle) == Held(60, 60)
    assert held(busy) == held(idle, after=(busy,)) == Held(60, 100)
