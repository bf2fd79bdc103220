"""What loads measured: reserved by the next load, kept over restarts, and told beside the estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import State
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.reconcile.actions import Mode, Verb
from splitlearn_manager.reconcile.described import Sizes, sizes_of
from splitlearn_manager.reconcile.observation import from_json, to_json
from splitlearn_manager.runtime.base import Activations
from support.fakes import FakeRunning
from support.loop_lab import LoopLab
from support.status_lab import NOTHING, SERVES, view, wanted

LINES = Activations(((5.0, 1.0),))
"""5 MB whatever the batch, and 1 MB for each input."""


class Lab(LoopLab):
    """A loop whose estimate is 10 MB, and whose loads measure `weights_mb` and `activations`."""

    weights_mb = 90.0
    activations: Activations | None = LINES
    budget_mb = 10_000.0

    def start(self) -> None:
        super().start()
        self.reserved: list[float] = []
        begin = self.runtime.start

        def start(config: ModelConfig, device: str) -> FakeRunning:
            self.reserved += [v.reserved_mb for v in self.loading(config.model_id)]
            running = begin(config, device)
            running.memory_mb, running.activations = self.weights_mb, self.activations
            return running

        self.runtime.start = start  # type: ignore[method-assign]
        self.manager.resources._fixed["cpu"] = self.budget_mb  # type: ignore[attr-defined]
        self.manager.set_limits(self.max_models)

    def loading(self, model_id: str) -> list[object]:
        views = self.manager.snapshot().instances
        return [v for v in views if v.model_id == model_id and v.state is State.LOADING]

    def reload(self, model_id: str) -> None:
        """Loads the model anew, as it is."""
        self.manager.begin_unload(model_id, "Requested")
        self.settle()

    def has(self, model_id: str) -> float:
        (held,) = (v for v in self.manager.snapshot().instances if v.model_id == model_id)
        return held.reserved_mb

    def told(self, model_id: str) -> tuple[object, ...]:
        status = self.loop.status.describe(model_id)
        assert status is not None
        keys = ("estimated_mb", "weights_mb", "activations_mb", "memory_mb", "reserved_mb")
        return tuple(status[key] for key in keys)

    def messages(self, model_id: str, reason: str) -> list[str]:
        events, _ = self.loop.status.events(model_id=model_id)
        return [str(event["message"]) for event in events if event["reason"] == reason]


def test_the_second_load_reserves_what_the_first_measured() -> None:
    lab = Lab()
    lab.write("a")
    lab.settle()
    lab.reload("a")
    assert lab.reserved == [10.0, 90.0 + 5.0 + 32.0]


def test_so_does_the_first_load_of_the_next_process() -> None:
    lab = Lab()
    lab.write("a")
    lab.write("b")
    lab.settle()
    lab.start()
    lab.settle()
    assert lab.reserved == [127.0, 127.0]
    assert lab.told("a") == (10.0, 90.0, 37.0, 127.0, 127.0)


def test_other_weights_are_estimated_and_those_that_come_back_are_known() -> None:
    lab = Lab()
    lab.write("a", update="recreate")
    lab.settle()
    lab.write("a", update="recreate", trusted=True)
    lab.settle()
    assert lab.reserved == [10.0, 10.0]
    lab.start()
    lab.write("a", update="recreate")
    lab.settle()
    assert lab.reserved == [127.0]
    lab.fs.replace("/weights/a.pt", b"other weights")
    lab.settle()
    assert lab.reserved == [127.0, 10.0]


def test_what_turned_out_too_large_is_known_to_be_so_after_a_restart() -> None:
    lab = Lab()
    lab.write("a", max_memory_mb=80)
    lab.settle()
    (sentence,) = lab.messages("a", "OverMemoryLimit")
    assert sentence == "model 'a' takes 90 MB, its max_memory_mb is 80"
    lab.start()
    lab.settle()
    assert lab.reserved == []
    status = lab.loop.status.describe("a")
    assert status is not None
    assert status["reason"] == "OverMemoryLimit"
    assert str(status["message"]).startswith(sentence)


def test_what_requests_take_is_no_part_of_a_models_own_limit() -> None:
    lab = Lab()
    lab.write("a", max_memory_mb=100)
    lab.settle()
    assert lab.has("a") == 127.0


def test_what_does_not_fit_its_device_is_told_with_its_parts() -> None:
    lab = Lab()
    lab.budget_mb = 100.0
    lab.start()
    lab.write("a")
    lab.settle()
    assert lab.messages("a", "InsufficientMemory")[0] == (
        "model 'a' turned out to take 127 MB (90 MB of weights, 37 MB of activations for batches of 32), "
        "which does not fit on cpu"
    )
    # Known now, so that no further load is tried.
    lab.pass_time(5.0)
    lab.settle()
    status = lab.loop.status.describe("a")
    assert status is not None
    assert (status["phase"], status["reason"]) == ("Pending", "InsufficientMemory")
    assert lab.reserved == [10.0]
    why = lab.loop.status.explain("a")
    assert why is not None
    assert why["waits_for"] == "a larger budget"
    assert "its last load measured 127 MB (90 MB of weights" in str(why["because"])


def test_a_model_that_is_gone_is_forgotten() -> None:
    lab = Lab()
    lab.write("a")
    lab.settle()
    lab.start()
    lab.delete("a")
    lab.settle()
    assert lab.manager.measurements("a") == ()
    assert b"measured" not in b"".join(lab.state.held.values())


def test_a_plan_beside_the_node_knows_earlier_versions_and_other_batches() -> None:
    lab = Lab()
    lab.write("a", update="recreate")
    lab.settle()
    lab.write("a", update="recreate", trusted=True)
    lab.settle()
    seen = from_json(to_json(lab.loop.observe()))
    lab.write("a", update="recreate", batch_size=8)
    other = Lab()
    other.fs = lab.fs
    other.start()
    _, made = other.loop.preview(0.25, seen)
    assert [(a.verb, a.mb) for a in made.actions] == [(Verb.UPDATE, 90.0 + 5.0 + 8.0)]


# Larger batches of what serves.


def test_larger_batches_reserve_more_and_smaller_ones_less_without_a_load() -> None:
    lab = Lab()
    lab.write("a")
    lab.settle()
    for batch_size in (64, 1):
        lab.write("a", batch_size=batch_size)
        lab.settle()
        assert lab.has("a") == 95.0 + batch_size
        assert lab.told("a") == (10.0, 90.0, 5.0 + batch_size, lab.has("a"), lab.has("a"))
    assert lab.reserved == [10.0]


def test_larger_batches_than_there_is_room_for_wait_for_it() -> None:
    lab = Lab()
    lab.budget_mb = 300.0
    lab.start()
    lab.write("a")
    lab.write("b")
    lab.settle()
    lab.write("a", batch_size=100)
    lab.settle()
    status = lab.loop.status.describe("a")
    assert status is not None
    assert status["phase"] == "Ready"
    assert status["reason"] == "InsufficientMemory"
    assert str(status["message"]).startswith(
        "batches of 100 need 68 MB more on cpu, which are not free; generation 1 goes on serving"
    )
    assert lab.has("a") == 127.0
    lab.delete("b")
    lab.settle()
    assert lab.has("a") == 195.0
    assert lab.reserved == [10.0, 10.0]


def test_the_room_that_smaller_batches_leave_is_there_for_an_update_beside_what_serves() -> None:
    lab = Lab()
    lab.budget_mb = 290.0
    lab.start()
    lab.write("a")
    lab.write("b", batch_size=64)
    lab.settle()
    assert (lab.has("a"), lab.has("b")) == (127.0, 159.0)
    lab.weights_mb, lab.activations = 10.0, None  # of the new version of a
    lab.write("a", trusted=True)
    lab.write("b", batch_size=32)
    lab.loop.turn()
    lab.pass_time(0.3)
    turn = lab.loop.turn()
    assert [(a.verb, a.model_id, a.mode) for a in turn.executed] == [
        (Verb.ADJUST, "b", None),
        (Verb.UPDATE, "a", Mode.SURGE),
    ]


# What takes more than was estimated, where there is hardly room for it.


def test_what_has_room_for_its_weights_alone_serves_and_reserves_the_rest_once_there_is_room() -> (
    None
):
    """Seen: on a node with room for just so many models, each one's first load failed for a few MB."""
    lab = Lab()
    lab.budget_mb = 200.0
    lab.start()
    lab.write("a", priority=1)
    lab.settle()
    lab.weights_mb = 10.0  # of b, which fits as it was estimated
    lab.write("b", batch_size=100)
    lab.settle()
    assert (lab.has("a"), lab.has("b")) == (127.0, 10.0)
    assert lab.told("b") == (10.0, 10.0, 105.0, 115.0, 10.0)
    lab.write("b", batch_size=100, priority=2)  # what needs no room is not kept waiting for it
    lab.settle()
    assert lab.loop.status.phases["b"] == "Ready"
    assert lab.told("b")[-1] == 10.0
    lab.delete("a")
    lab.settle()
    assert lab.has("b") == 115.0
    assert "115 MB, as measured" in lab.messages("b", "Adjusted")[-1]
    assert lab.reserved == [10.0, 10.0]


def test_what_could_not_be_given_its_forwards_by_any_room_is_refused() -> None:
    lab = Lab()
    lab.budget_mb = 100.0
    lab.start()
    lab.write("a")
    lab.settle()
    assert lab.served() == {}


# What is told.

MEASURED = Measurement("l", "w", "cpu", 88.0, 90.0, LINES)


def test_sizes_are_those_of_what_serves_else_of_what_would_be_loaded() -> None:
    serves = replace(SERVES, views=(view(State.READY, measured=MEASURED),))
    assert sizes_of(serves) == Sizes(88.0, 90.0, 37.0, 127.0)
    known = replace(NOTHING, wanted=wanted(mb=127.0, measured=MEASURED))
    assert sizes_of(known) == Sizes(88.0, 90.0, 37.0, None)
    assert sizes_of(NOTHING) == Sizes(estimated_mb=10.0)


@pytest.mark.parametrize("mb", [0.0])
def test_a_size_that_nothing_tells_is_not_told(mb: float) -> None:
    assert sizes_of(replace(NOTHING, wanted=wanted(mb=mb))) == Sizes()


def test_what_served_without_a_measured_forward_has_its_weights_told() -> None:
    plain = Measurement("l", "w", "cpu", None, 90.0)
    serves = replace(SERVES, views=(view(State.READY, measured=plain),))
    assert sizes_of(serves) == Sizes(None, 90.0, None, 90.0)
