"""From a request's name to a model."""

from __future__ import annotations

import gc
import sys
import textwrap
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitlearn_manager.errors import ConfigError, ModelNotFound, ModelUnavailable
from splitlearn_manager.routing import ModelRouter, RoutingTable, build_table


@dataclass
class Model:
    model_id: str
    weight: float = 1.0
    in_flight: int = 0


def table(**endpoints: str) -> RoutingTable[Model]:
    """A table of model_id=endpoint."""
    return build_table([(Model(model_id), endpoint) for model_id, endpoint in endpoints.items()])


def routed(router: ModelRouter, name: str, to: RoutingTable[Model], times: int) -> list[str]:
    return [router.route(name, to).model_id for _ in range(times)]


def test_a_models_own_name_leads_to_it() -> None:
    assert ModelRouter().route("b", table(a="a", b="b")).model_id == "b"


def test_a_model_of_a_shared_endpoint_is_still_found_by_its_id() -> None:
    assert routed(ModelRouter(), "b", table(a="chat", b="chat"), 3) == ["b"] * 3


def test_models_of_an_endpoint_share_its_traffic_by_weight() -> None:
    to = build_table([(Model("a", 3), "chat"), (Model("b", 1), "chat"), (Model("c"), "c")])

    assert Counter(routed(ModelRouter(), "chat", to, 40)) == {"a": 30, "b": 10}


def test_an_endpoint_named_like_a_model_wins_over_the_model() -> None:
    to = table(a="b", b="chat", c="b")

    assert set(routed(ModelRouter(), "b", to, 4)) == {"a", "c"}


def test_no_name_means_any_ready_model() -> None:
    assert routed(ModelRouter(), "", table(a="a", b="chat", c="chat"), 6) == ["a", "b", "c"] * 2


def test_no_name_with_nothing_ready_is_unavailable() -> None:
    with pytest.raises(ModelUnavailable, match="no model is READY"):
        ModelRouter().route("", table())


def test_an_unknown_name_is_not_found_and_says_what_is_there() -> None:
    with pytest.raises(ModelNotFound) as caught:
        ModelRouter().route("gpt", table(a="chat"))
    assert caught.value.message == ("no READY model or endpoint is called 'gpt'; READY: a, chat")
    assert caught.value.reason == "ModelNotFound"

    with pytest.raises(ModelNotFound, match="and none is READY"):
        ModelRouter().route("gpt", table())


def test_a_long_list_of_names_is_cut_short() -> None:
    many = table(**{f"m{i:02}": f"m{i:02}" for i in range(15)})

    with pytest.raises(ModelNotFound, match="m09 and 5 more"):
        ModelRouter().route("gpt", many)


def test_a_lone_candidate_is_served_without_asking_the_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path, monkeypatch, "raise AssertionError('asked')")
    router, to = ModelRouter("own_strategy:Own"), table(a="a", b="b")

    assert [router.route(name, to).model_id for name in ("a", "b")] == ["a", "b"]
    with pytest.raises(AssertionError, match="asked"):
        router.route("", to)


def test_endpoints_do_not_disturb_each_others_turns() -> None:
    router = ModelRouter()
    to = table(a="x", b="x", c="y", d="y")

    alternating = [router.route(name, to).model_id for name in ("x", "y", "", "x", "y", "")]

    assert alternating == ["a", "c", "a", "b", "d", "b"]


def test_endpoints_that_are_gone_leave_nothing_behind() -> None:
    router = ModelRouter()
    for i in range(50):
        router.route(f"e{i}", table(a=f"e{i}", b=f"e{i}"))
    router.route("", table(a="z", b="z"))

    assert len(router._routing.of_endpoint) == 1


def test_a_routed_table_is_not_kept() -> None:
    router = ModelRouter()
    to = table(a="x", b="x")
    watched = weakref.ref(to.all[0])

    router.route("x", to)
    router.route("", to)
    del to
    gc.collect()

    assert watched() is None


def test_the_strategy_changes_live() -> None:
    router = ModelRouter()
    to = build_table([(Model("a", in_flight=9), "x"), (Model("b"), "x")])
    assert routed(router, "x", to, 2) == ["a", "b"]

    router.set_strategy("least_loaded")

    assert router.strategy == "least_loaded"
    assert routed(router, "x", to, 3) == ["b"] * 3


def test_setting_the_same_strategy_keeps_its_turn() -> None:
    router, to = ModelRouter(), table(a="x", b="x")
    router.route("x", to)

    router.set_strategy("round_robin")

    assert router.route("x", to).model_id == "b"


def test_an_unusable_strategy_leaves_the_old_one_in_use() -> None:
    router = ModelRouter("random")

    with pytest.raises(ConfigError, match="routing"):
        router.set_strategy("ring")

    assert router.strategy == "random"


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "own_strategy.py").write_text(
        textwrap.dedent(
            f"""
            class Own:
                def choose(self, candidates):
                    {body}
            """
        ),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_strategy", raising=False)


def test_your_own_strategy_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch, "return candidates[-1]")

    assert routed(ModelRouter("own_strategy:Own"), "x", table(a="x", b="x"), 2) == ["b", "b"]


def test_a_choice_that_is_no_candidate_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path, monkeypatch, "return None")

    with pytest.raises(TypeError, match="own_strategy:Own chose None, which is none of its"):
        ModelRouter("own_strategy:Own").route("x", table(a="x", b="x"))


def test_threads_route_at_once_and_lose_no_turn() -> None:
    router, to = ModelRouter(), table(a="x", b="x")
    counts: list[Counter[str]] = []

    def work() -> None:
        counts.append(Counter(routed(router, "x", to, 500)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(counts, Counter()) == {"a": 1000, "b": 1000}
