"""When weights count as changed."""

from __future__ import annotations

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.desired.weights import WeightsWatch
from splitlearn_manager.errors import WeightsNotFound
from support.desired_lab import WEIGHTS, DesiredLab, model


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def test_weights_settle_together_with_the_spec(lab: DesiredLab) -> None:
    lab.write("a.yaml", model("x"))
    first = lab.look()
    assert not first.models
    second = lab.look(after=0.25)
    assert second.models["x"].weights is not None
    assert second.next_check_s is None


def test_a_model_directory_that_is_being_copied_is_not_picked_up_half_way(lab: DesiredLab) -> None:
    lab.fs.mkdir("/weights/m")
    lab.fs.write("/weights/m/config.json", b"{}")
    lab.write("a.yaml", model("x", model_path="/weights/m"))
    for part in range(5):
        lab.fs.append("/weights/m/config.json", b" ")
        lab.fs.write(f"/weights/m/part{part}", b"half")
        assert all(m.weights is None for m in lab.look(after=0.2).models.values())
    assert lab.settle().models["x"].weights is not None


def test_rewritten_weights_count_once_they_have_settled(lab: DesiredLab) -> None:
    old = lab.accept(a=model("x")).models["x"]
    lab.pass_time(1.0)
    lab.fs.write(WEIGHTS, b"WEIGHTS")
    changing = lab.look()
    assert changing.models["x"].weights == old.weights
    assert changing.next_check_s == pytest.approx(0.25)
    new = lab.look(after=0.25).models["x"]
    assert new.weights != old.weights
    assert new.generation == old.generation


def test_weights_of_the_same_size_and_mtime_are_still_seen_to_change(lab: DesiredLab) -> None:
    mtime_ns = lab.fs.stat(WEIGHTS).mtime_ns
    old = lab.accept(a=model("x")).models["x"].weights
    lab.pass_time(1.0)
    lab.fs.write(WEIGHTS, b"WEIGHTS")
    lab.fs.touch(WEIGHTS, mtime_ns)
    assert lab.settle().models["x"].weights != old


def test_missing_weights_are_a_problem_of_that_model_and_it_is_accepted_all_the_same(
    lab: DesiredLab,
) -> None:
    state = lab.accept(a=model("x", model_path="/weights/none.pt"), b=model("y"))
    assert state.models["x"].weights is None
    assert "/weights/none.pt" in (state.models["x"].weights_problem or "")
    assert state.models["y"].weights_problem is None
    assert state.next_check_s is None
    lab.fs.write("/weights/none.pt", b"here")
    appeared = lab.look()
    assert (appeared.models["x"].weights, appeared.models["x"].weights_problem) == (None, None)
    assert lab.look(after=0.25).models["x"].weights is not None


def test_weights_that_vanish_keep_the_last_settled_fingerprint(lab: DesiredLab) -> None:
    old = lab.accept(a=model("x")).models["x"]
    lab.fs.delete(WEIGHTS)
    gone = lab.settle().models["x"]
    assert gone.weights == old.weights
    assert gone.weights_problem is not None


def test_one_look_a_source_however_many_models_share_it() -> None:
    asked: list[str] = []

    def fingerprint(config: ModelConfig) -> str:
        asked.append(config.model_path)
        return "f"

    configs = {f"m{i}": ModelConfig(model_id=f"m{i}", model_path="/w.pt") for i in range(9)}
    WeightsWatch(0.25).observe(configs, 0.0, fingerprint)
    assert asked == ["/w.pt"]


def test_a_source_that_nobody_wants_any_more_is_forgotten() -> None:
    watch = WeightsWatch(0.25)
    config = {"m": ModelConfig(model_id="m", model_path="/w.pt")}
    for now in (0.0, 1.0):
        settled = watch.observe(config, now, lambda _: "old")
    assert settled.by_id == {"m": "old"}
    watch.observe({}, 2.0, lambda _: "old")

    def missing(config: ModelConfig) -> str:
        raise WeightsNotFound("nothing there")

    back = watch.observe(config, 3.0, missing)
    assert (back.by_id, back.problems) == ({}, {"m": "nothing there"})


def test_the_wait_is_the_shortest_of_all_sources() -> None:
    watch = WeightsWatch(1.0)
    one = ModelConfig(model_id="a", model_path="/a.pt")
    two = ModelConfig(model_id="b", model_path="/b.pt")
    watch.observe({"a": one}, 0.0, lambda c: c.model_path)
    state = watch.observe({"a": one, "b": two}, 0.7, lambda c: c.model_path)
    assert state.next_check_s == pytest.approx(0.3)
