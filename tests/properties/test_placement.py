"""Which device a model goes to: the same whatever the order, one in which it fits, the largest hole kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitlearn_manager.core.eviction import (
    AdmissionRequest,
    Admitted,
    AwaitRoom,
    MakeRoom,
    Refused,
    Resident,
    admit,
)
from splitlearn_manager.core.ledger import Ceiling, Ledger
from splitlearn_manager.core.placement import by_room, placed_on

GPUS = ("cuda:0", "cuda:1", "cuda:2", "cuda:10")
DEVICES = (*GPUS, "cpu")


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Ledger, list[Resident]]:
    """Up to four GPUs beside the CPU, nearly full, as equal as GPUs of one machine often are."""
    devices = ["cpu", *draw(st.permutations(GPUS))[: draw(st.sampled_from((0, 2, 3, 4)))]]
    residents = [
        Resident(
            key=f"m{number}#1",
            model_id=f"m{number}",
            device=draw(st.sampled_from(devices)),
            mb=draw(st.sampled_from((5, 10, 10, 30))),
            priority=draw(st.sampled_from((0, 0, 1))),
            last_used_s=draw(st.integers(0, 5)),
            evictable=kind == "idle",
            freeing=kind == "freeing",
        )
        for number in range(draw(st.integers(0, 6)))
        for kind in [draw(st.sampled_from(("idle", "idle", "held", "freeing")))]
    ]
    used = {d: sum(r.mb for r in residents if r.device == d) for d in devices}
    ledger = Ledger(
        {device: used[device] + draw(st.sampled_from((0, 5, 10, 20))) for device in devices},
        len(residents) + draw(st.integers(0, 2)),
    )
    for resident in residents:
        ledger = ledger.reserve(resident.key, resident.device, resident.mb)
    # Of some devices others take what models have a budget for, or even what models hold already.
    ceilings = {
        device: Ceiling(
            used[device] + 40,
            draw(st.sampled_from((0, 15, 35, 45))),
            0,
            draw(st.sampled_from((False,) * 4 + (True,))),
        )
        for device in draw(st.lists(st.sampled_from(devices), unique=True))
    }
    return ledger.with_ceilings(ceilings), residents


requests = st.builds(
    AdmissionRequest,
    model_id=st.just("new"),
    devices=st.one_of(
        st.permutations(DEVICES), st.lists(st.sampled_from(DEVICES), min_size=1, unique=True)
    ).map(tuple),
    mb=st.sampled_from((0, 3, 5, 8, 10, 25, 100)),
    priority=st.sampled_from((0, 1)),
    demanded_s=st.integers(0, 8),
    may_evict=st.booleans(),
)


def holes(ledger: Ledger) -> dict[str, float]:
    return {device: ledger.free_mb(device) for device in ledger.budgets_mb if device != "cpu"}


def open_to(request: AdmissionRequest, ledger: Ledger) -> list[str]:
    """The devices that the node has, and that are not under pressure, of those that the model may go to."""
    return [d for d in request.devices if d in ledger.budgets_mb and not ledger.under_pressure(d)]


def turned_round(ledger: Ledger) -> Ledger:
    def backwards(pairs: Mapping[str, object]) -> dict[str, object]:
        return dict(reversed(pairs.items()))

    return replace(
        ledger,
        budgets_mb=backwards(ledger.budgets_mb),
        reservations=backwards(ledger.reservations),
        ceilings=backwards(ledger.ceilings),
    )


@given(nodes(), requests, st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_a_decision_does_not_depend_on_any_order(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest, random: object
) -> None:
    """I1. Seen to fail with `_by_number` left out of what `by_room` compares."""
    ledger, residents = node
    decision = admit(ledger, residents, request)
    devices, others = list(request.devices), list(residents)
    random.shuffle(devices)  # type: ignore[attr-defined]
    random.shuffle(others)  # type: ignore[attr-defined]
    again = admit(turned_round(ledger), others, replace(request, devices=tuple(devices)))
    assert again == decision


@given(nodes(), requests)
@settings(max_examples=400)
def test_a_model_goes_where_it_fits_if_it_fits_anywhere(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """And to a GPU if it fits in one. Seen to fail with the emptiest device chosen before it is asked
    whether the model fits there, with `_is_cpu` left out of what `placed_on` compares, and with devices
    under pressure tried like any other.
    """
    ledger, residents = node
    fitting = {d for d in open_to(request, ledger) if not ledger.shortfall(d, request.mb)}
    decision = admit(ledger, residents, request)
    assert isinstance(decision, Admitted) == bool(fitting)
    if isinstance(decision, Admitted):
        assert decision.device in fitting
        assert decision.device != "cpu" or fitting == {"cpu"}


@given(nodes(), requests)
@settings(max_examples=400)
def test_the_largest_hole_that_is_left_is_as_large_as_it_can_be(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """Seen to fail with the GPU taken that has most free budget."""
    ledger, residents = node
    decision = admit(ledger, residents, request)
    if not isinstance(decision, Admitted) or decision.device == "cpu":
        return
    left = max(holes(ledger.reserve("new#1", decision.device, request.mb)).values())
    for other in open_to(request, ledger):
        if other != "cpu" and not ledger.shortfall(other, request.mb):
            assert left >= max(holes(ledger.reserve("new#1", other, request.mb)).values())


@given(nodes(), requests)
@settings(max_examples=400)
def test_a_model_of_unknown_size_goes_where_most_is_free(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """It may turn out to be large. Seen to fail with 0 MB placed as any other size is."""
    ledger, residents = node
    decision = admit(ledger, residents, replace(request, mb=0))
    asked = {d: mb for d, mb in holes(ledger).items() if d in open_to(request, ledger)}
    if isinstance(decision, Admitted) and decision.device != "cpu":
        assert asked[decision.device] == max(asked.values())


ONE_PLACE = Ledger({"cuda:0": 30, "cuda:1": 15}, 1).reserve("m0#1", "cuda:0", 10)
ITS_HOLDER = Resident("m0#1", "m0", "cuda:0", 10, 0, 0, evictable=True, freeing=False)


@given(nodes(), requests)
@example((ONE_PLACE, [ITS_HOLDER]), AdmissionRequest("new", DEVICES, 8, 0, 1))
@settings(max_examples=600)
def test_where_room_is_made_is_where_the_model_goes_once_it_is_there(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """What a plan says of a load that waits comes true.

    Seen to fail with the first device on which room can be made, whatever else the victims leave.
    """
    ledger, residents = node
    decision = admit(ledger, residents, request)
    if isinstance(decision, Refused | Admitted):
        return
    gone = [r for r in residents if r.freeing]
    if isinstance(decision, MakeRoom):
        gone += decision.victims
    if any(ledger.under_pressure(r.device) for r in gone):
        return  # which may end by their going, and make a device good that was left out
    then = admit(
        ledger.without(r.key for r in gone), [r for r in residents if r not in gone], request
    )
    assert then == Admitted(decision.device)


@given(nodes(), requests)
@settings(max_examples=400)
def test_nobody_is_evicted_from_a_gpu_for_what_fits_elsewhere(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """Nor waits for a GPU's memory. Seen to fail with the GPUs tried to the end before the CPU."""
    ledger, residents = node
    if isinstance(admit(ledger, residents, request), AwaitRoom | MakeRoom | Refused):
        assert placed_on(ledger, open_to(request, ledger), request.mb) is None


@given(nodes(), requests)
@settings(max_examples=400)
def test_a_refusal_tells_of_a_device_that_could_hold_the_model(
    node: tuple[Ledger, list[Resident]], request: AdmissionRequest
) -> None:
    """Where there is one. Seen to fail with the first device told of, whatever it has."""
    ledger, residents = node
    decision = admit(ledger, residents, request)
    devices = by_room(ledger, request.devices)
    if not isinstance(decision, Refused) or decision.reason == "DeviceNotFound":
        return
    told = {d for d in devices if f" on {d}," in decision.message}
    if decision.reason != "MaxModels":
        could = {d for d in devices if request.mb <= ledger.budgets_mb[d]}
        assert len(told) == 1
        assert told <= (could or set(devices))
    if decision.reason == "InsufficientMemory":
        assert not ledger.under_pressure(told.pop())
