"""Which of several models a strategy chooses."""

from __future__ import annotations

import random
import textwrap
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.errors import ConfigError
from splitlearn_manager.routing.strategies import (
    LeastLoaded,
    Random,
    RoundRobin,
    RoutingStrategy,
    load_strategy,
)


@dataclass
class Model:
    model_id: str
    weight: float = 1.0
    in_flight: int = 0


def models(*weights: float) -> list[Model]:
    return [Model(f"m{i}", weight) for i, weight in enumerate(weights)]


def choices(strategy: RoutingStrategy, candidates: list[Model], times: int) -> list[str]:
    return [strategy.choose(candidates).model_id for _ in range(times)]


# In turn.


def test_equal_weights_rotate_strictly() -> None:
    assert choices(RoundRobin(), models(0.1, 0.1, 0.1), 7) == [
        "m0",
        "m1",
        "m2",
        "m0",
        "m1",
        "m2",
        "m0",
    ]


def test_equal_weights_never_leave_the_rotation() -> None:
    chosen = choices(RoundRobin(), models(0.1, 0.1, 0.1), 30_000)

    assert chosen == ["m0", "m1", "m2"] * 10_000


def test_weighted_turns_are_spread_evenly_not_in_bursts() -> None:
    chosen = choices(RoundRobin(), models(5, 1, 1), 7)

    assert Counter(chosen) == {"m0": 5, "m1": 1, "m2": 1}
    assert chosen == ["m0", "m0", "m1", "m0", "m2", "m0", "m0"]


@given(st.lists(st.integers(min_value=0, max_value=20), min_size=2, max_size=6).filter(any))
def test_shares_of_a_whole_round_equal_the_weights(weights: list[int]) -> None:
    candidates = models(*weights)

    chosen = Counter(choices(RoundRobin(), candidates, 2 * sum(weights)))

    assert [chosen[m.model_id] for m in candidates] == [2 * weight for weight in weights]


@given(st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=2, max_size=5))
def test_no_run_strays_from_its_share_by_more_than_a_round(weights: list[float]) -> None:
    candidates, runs = models(*weights), 500
    chosen = Counter(choices(RoundRobin(), candidates, runs))

    for model in candidates:
        expected = runs * model.weight / sum(weights)
        assert abs(chosen[model.model_id] - expected) <= len(weights)


def test_weight_zero_gets_no_traffic_unless_all_are_zero() -> None:
    assert set(choices(RoundRobin(), models(0, 1, 0, 2), 30)) == {"m1", "m3"}
    assert choices(RoundRobin(), models(0, 0), 4) == ["m0", "m1", "m0", "m1"]


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    strategy = RoundRobin()
    for i in range(100):
        choices(strategy, [Model("stays"), Model(f"goes-{i}")], 3)

    assert strategy._credits.keys() == {"stays", "goes-99"}


def test_a_lowered_weight_does_not_starve_the_others() -> None:
    strategy, candidates = RoundRobin(), models(1000, 1)
    while strategy.choose(candidates).model_id != "m1":
        pass
    candidates[0].weight = 1

    chosen = Counter(choices(strategy, candidates, 10))

    assert min(chosen["m0"], chosen["m1"]) >= 4


def test_threads_share_one_rotation() -> None:
    strategy, candidates = RoundRobin(), models(1, 1, 2)
    counts: list[Counter[str]] = []

    def work() -> None:
        counts.append(Counter(choices(strategy, candidates, 1000)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(counts, Counter()) == {"m0": 1000, "m1": 1000, "m2": 2000}


# By load.


def test_the_least_loaded_for_its_weight_is_chosen() -> None:
    busy, idle = Model("a", 1, in_flight=3), Model("b", 1, in_flight=1)
    assert LeastLoaded().choose([busy, idle]) is idle

    large, small = Model("a", 4, in_flight=3), Model("b", 1, in_flight=1)
    assert LeastLoaded().choose([large, small]) is large


def test_equally_loaded_models_take_turns() -> None:
    assert choices(LeastLoaded(), models(1, 1, 1), 6) == ["m0", "m1", "m2"] * 2


def test_least_loaded_gives_weight_zero_nothing() -> None:
    paused = Model("a", 0, in_flight=0)
    serving = Model("b", 1, in_flight=50)

    assert LeastLoaded().choose([paused, serving]) is serving
    assert LeastLoaded().choose([paused, Model("c", 0, in_flight=1)]) is paused


# By chance.


def test_random_follows_its_source_and_the_weights() -> None:
    candidates = models(1, 3, 0)

    first = choices(Random(random.Random(7)), candidates, 4000)

    assert first == choices(Random(random.Random(7)), candidates, 4000)
    counts = Counter(first)
    assert set(counts) == {"m0", "m1"}
    assert counts["m1"] / counts["m0"] == pytest.approx(3, rel=0.2)


# By name.


@pytest.mark.parametrize(
    ("name", "kind"),
    [("round_robin", RoundRobin), ("least_loaded", LeastLoaded), ("random", Random)],
)
def test_built_in_strategies_are_found_by_name(name: str, kind: type) -> None:
    assert isinstance(load_strategy(name), kind)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_routing.py").write_text(
        textwrap.dedent(
            """
            class Last:
                def choose(self, candidates):
                    return candidates[-1]

            class Needs:
                def __init__(self, argument):
                    pass

            class Idle:
                pass

            number = 3.5
            """
        ),
        encoding="utf-8",
    )
    (tmp_path / "own_broken.py").write_text("import no_such_module_here\n", encoding="utf-8")
    (tmp_path / "own_exit.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    (tmp_path / "own_late_exit.py").write_text(
        "class Ends:\n    def __init__(self):\n        raise SystemExit(3)\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own_module")
def test_your_own_class_is_imported() -> None:
    assert choices(load_strategy("own_routing:Last"), models(1, 1), 3) == ["m1"] * 3


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("round-robin", "routing: expected round_robin, .* did you mean round_robin"),
        ("", "routing: expected round_robin"),
        (":Last", "routing: expected package.module:Class"),
        ("own_routing:", "routing: expected package.module:Class"),
        ("no_such_pkg.mod:Class", "routing: 'no_such_pkg.mod' .* could not be imported"),
        ("own_broken:Class", "could not be imported: ModuleNotFoundError"),
        ("own_exit:Class", "could not be imported: SystemExit: 3"),
        ("own_late_exit:Ends", "could not be made without arguments: SystemExit: 3"),
        ("own_routing:Missing", "routing: own_routing has no class called 'Missing'"),
        ("own_routing:number", "routing: expected a class at own_routing:number, found a float"),
        ("own_routing:Needs", "routing: own_routing:Needs could not be made without arguments"),
        ("own_routing:Idle", r"routing: own_routing:Idle has no method choose\(candidates\)"),
    ],
)
def test_a_strategy_that_cannot_be_used_is_refused_with_the_key(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_strategy(name)
