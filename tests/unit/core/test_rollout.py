"""What is to be done about a version that is tried, from what is known of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lease import Lease
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.rollout import Progress, Traffic, Trial, Verdict, judge
from support.fakes import model

STEPS = [{"percent": 10, "for_s": 60}, {"percent": 50, "for_s": 60}]
RULES = {"canary": STEPS, "min_requests": 10, "max_error_rate": 0.1, "max_latency_ratio": 2.0}
NOBODY = Traffic()


def config(**rules: object) -> ModelConfig:
    return model("m", rollout={**RULES, **rules})


def progress(
    step: int = 0, in_step_s: float = 0.0, new: Traffic = NOBODY, **known: object
) -> Progress:
    old = Traffic(100, 0, 1.0)
    return Progress(step, in_step_s, new, old, new, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (progress(0, 59.9, Traffic(100, 0, 1.0)), Verdict.GO_ON),
        (progress(0, 60.0, Traffic(9, 0, 0.1)), Verdict.GO_ON),
        (progress(0, 60.0, Traffic(10, 0, 0.1)), Verdict.NEXT_STEP),
        (progress(1, 60.0, Traffic(10, 0, 0.1)), Verdict.TAKE_OVER),
        (progress(1, 60.0, Traffic(10, 1, 0.1)), Verdict.TAKE_OVER),
        (progress(0, 0.0, Traffic(10, 2, 0.1)), Verdict.TAKE_BACK),
        (progress(0, 0.0, Traffic(9, 9, 0.1)), Verdict.GO_ON),
        (progress(0, 0.0, Traffic(10, 0, 0.21)), Verdict.TAKE_BACK),
        (progress(0, 0.0, Traffic(10, 0, 0.2)), Verdict.GO_ON),
        (progress(0, 0.0, NOBODY, alone=True), Verdict.TAKE_OVER),
        (progress(1, 600.0, Traffic(100, 0, 1.0), paused=True), Verdict.GO_ON),
        (progress(0, 0.0, Traffic(10, 2, 0.1), paused=True), Verdict.TAKE_BACK),
    ],
)
def test_its_requests_and_its_time_decide(now: Progress, verdict: Verdict) -> None:
    assert judge(config(), now)[0] is verdict


traffic = st.builds(Traffic, st.integers(0, 50), st.integers(0, 50), st.floats(0, 5))


@given(step=st.integers(0, 1), in_step_s=st.floats(0, 200), new=traffic)
def test_a_paused_one_goes_no_further_and_is_taken_back_as_ever(
    step: int, in_step_s: float, new: Traffic
) -> None:
    """Seen to fail when a step is looked at before the pause."""
    running = judge(config(), progress(step, in_step_s, new))
    paused = judge(config(), progress(step, in_step_s, new, paused=True))
    assert paused == (running if running[0] is Verdict.TAKE_BACK else (Verdict.GO_ON, ""))


def test_what_people_say_counts_for_a_paused_one_too() -> None:
    trial = Trial(config(), 0.0, NOBODY)
    trial.paused = True
    assert trial.judged(config(), 1000.0, Traffic(100, 0, 1.0), NOBODY)[0] is Verdict.GO_ON
    for order in (Verdict.TAKE_OVER, Verdict.TAKE_BACK):
        trial.ordered = order
        assert trial.judged(config(), 0.0, NOBODY, NOBODY)[0] is order


def test_a_request_whose_caller_has_given_up_has_failed_though_it_never_ends() -> None:
    """Seen to fail, with a version that hangs and is tried for ever, if only what has ended counts."""
    versions = [
        ManagedModel(
            key, ModelSpec.of(config()), owner=Owner.DIRECTORY, device="cpu", loading_since_s=0
        )
        for key in ("m#1", "m#2")
    ]
    old, new = versions
    trial = Trial(config(), 0.0, NOBODY)
    leases = [Lease(instance, 0.0, lambda lease: None) for instance in (new, new, new, old)]
    given_up = [True, True, False, True]
    for lease, gave_up in zip(leases, given_up, strict=True):
        trial.watch(lease, lambda gave_up=gave_up: gave_up)  # type: ignore[misc]
    assert trial.traffic_of(new) == Traffic(2, 2, 0.0)
    assert trial.traffic_of(old) == Traffic(1, 1, 0.0)
    leases[0].release()
    assert trial.traffic_of(new) == Traffic(1, 1, 0.0)


def test_from_a_shadow_to_a_canary_and_back_the_first_step_begins_anew() -> None:
    """Seen to fail, with a version that takes over before it has answered anybody, when time goes on."""
    canary = config(canary=[{"percent": 1, "for_s": 60}, {"percent": 50, "for_s": 60}])
    longer = config(canary=[{"percent": 1, "for_s": 90}, {"percent": 50, "for_s": 60}])
    shadow = config(canary=None, shadow={"percent": 100, "for_s": 3600})
    seen = Traffic(1000, 0, 1.0)
    trial = Trial(shadow, 0.0, NOBODY)
    trial.adopt(canary, 1000.0, seen)
    assert (trial.shadow, trial.step, trial.percent) == (False, 0, 1.0)
    more = Traffic(1010, 0, 1.0)
    assert trial.judged(canary, 1059.0, more, NOBODY)[0] is Verdict.GO_ON
    assert trial.judged(canary, 1060.0, Traffic(1009, 0, 1.0), NOBODY)[0] is Verdict.GO_ON
    assert trial.judged(canary, 1060.0, more, NOBODY)[0] is Verdict.NEXT_STEP
    # Other times of the same kind count from when the step began.
    trial.adopt(longer, 1060.0, more)
    assert trial.judged(longer, 1090.0, more, NOBODY)[0] is Verdict.NEXT_STEP
    trial.next_step(longer, 1090.0, more)
    trial.adopt(shadow, 2000.0, more)
    assert (trial.shadow, trial.step, trial.percent) == (True, 0, 100.0)
    assert trial.step_ends_s(shadow) == 5600.0


def test_what_only_the_old_version_is_asked_is_not_compared() -> None:
    """Seen to fail, with an old version that short requests with a cache make look fast, when all counts."""
    instance = ManagedModel(
        "m#1", ModelSpec.of(config()), owner=Owner.DIRECTORY, device="cpu", loading_since_s=0
    )
    instance.open_for_leases()
    for plain, ok in [(True, True), (False, True), (False, False)]:
        assert instance.acquire(0.0)
        instance.release(0.0, duration_s=1.0 if plain else 0.01, ok=ok, plain=plain)
    assert (instance.requests, instance.errors) == (3, 1)
    traffic = instance.traffic
    assert (traffic.requests, traffic.errors) == (1, 0)
    assert traffic.mean_s == pytest.approx(1.0)
