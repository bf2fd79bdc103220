"""What is told of a model is consistent, for any combination of facts, however odd.

Each property was seen to fail on a seeded bug:
- `test_ready_is_true_only_if_the_accepted_generation_serves`: what the Python API loaded under a declared
  id counts as serving; and `Ready` does not compare generations;
- `test_phase_sync_health_and_conditions_agree`: the first of these;
- `test_everything_has_an_explanation_with_a_headline`: a fallback alone makes the phase Updating;
- `test_a_condition_keeps_its_time_while_its_status_stays`: times are looked up by type alone;
- `test_publishing_in_steps_tells_the_same_as_publishing_once`: entries are compared by model id alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.desired.state import PruneGuard, SourceRef
from splitlearn_manager.reconcile.actions import Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.conditions import conditions_of, next_retry_s
from splitlearn_manager.reconcile.explain import explain
from splitlearn_manager.reconcile.node_status import node_conditions
from splitlearn_manager.reconcile.status import (
    DeviceUse,
    Facts,
    Health,
    NodeFacts,
    NodeInfo,
    Phase,
    StatusBook,
    Sync,
    health_of,
    phase_of,
    sync_of,
)
from support.fakes import model
from support.status_lab import NOON, Wall, view

CONFIGS = [
    model("m"),
    model("m", trusted=True),
    model("m", update="recreate"),
    model("m", update="surge", pinned=True, priority=3, keep_alive_s=60.0, endpoint="chat"),
]
REASONS = [
    "AwaitingMemory",
    "AwaitingTurn",
    "DeviceNotFound",
    "Evicted",
    "InsufficientMemory",
    "InvalidModel",
    "KeepAlive",
    "LoadFailed",
    "LoadTimeout",
    "Loading",
    "MaxModels",
    "OverMemoryLimit",
    "OwnedByApi",
    "RateLimited",
    "Suspended",
    "UntrustedCheckpoint",
    "Unloading",
    "WeightsNotFound",
    "WeightsNotReady",
    "NobodyKnows",
]
times = st.one_of(st.none(), st.sampled_from([0.0, 999.0, 1009.0, 1e9, -1e9, 1e300]))
words = st.sampled_from(["", "it is broken", "needs 10 MB; and more"])
refs = st.builds(SourceRef, st.sampled_from(["a.yaml", "b.yaml"]), st.integers(1, 9))
problems = st.lists(
    st.builds(
        Problem,
        st.just("a.yaml"),
        st.one_of(st.none(), st.integers(1, 9)),
        st.one_of(st.none(), st.integers(1, 9)),
        st.one_of(st.none(), st.just("device")),
        words,
    ),
    max_size=2,
).map(tuple)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    config = draw(st.sampled_from(CONFIGS))
    weights = draw(st.sampled_from(["", "w0", "w1"]))
    return ModelSpec.of(config, weights=weights, generation=draw(st.integers(1, 3)))


@st.composite
def views(draw: st.DrawFn) -> InstanceView:
    return view(
        draw(st.sampled_from(State)),
        draw(specs()),
        draw(st.sampled_from(Owner)),
        key=f"m#{draw(st.integers(1, 3))}",
        leases=draw(st.integers(0, 2)),
        drain_overdue=draw(st.booleans()),
        warmed=draw(st.booleans()),
        measured_mb=draw(st.sampled_from([None, 10.0])),
        ready_since_s=draw(st.sampled_from([None, 1.0])),
        notes=draw(st.sampled_from([(), ("a note",)])),
    )


wanteds = st.builds(
    Wanted,
    spec=specs(),
    mb=st.sampled_from([0.0, 10.0, 5000.0]),
    devices=st.sampled_from([(), ("cpu",), ("cuda:0", "cpu")]),
    accepted_s=st.just(5.0),
    weights_ready=st.booleans(),
    weights_problem=words,
    own_limit_problem=st.sampled_from([None, "too large"]),
    source=st.just("m.yaml"),
)
attempts = st.builds(Attempt, specs(), st.integers(1, 12), times, st.sampled_from(REASONS), words)
waits = st.builds(Waiting, st.just("m"), st.sampled_from(REASONS), words, times, st.booleans())
facts = st.builds(
    Facts,
    model_id=st.just("m"),
    wanted=st.one_of(st.none(), wanteds),
    views=st.lists(views(), max_size=3).map(tuple),
    attempt=st.one_of(st.none(), attempts),
    parked=st.booleans(),
    waiting=st.one_of(st.none(), waits),
    held=words,
    source_available=st.booleans(),
    suspended=st.booleans(),
    guarded=st.booleans(),
    conflict=st.lists(refs, max_size=2).map(tuple),
    fallback=st.one_of(st.none(), wanteds),
    problems=problems,
    source=st.one_of(st.none(), refs),
)
nodes = st.builds(
    NodeFacts,
    info=st.builds(
        NodeInfo,
        directory=st.sampled_from(["", "/desired"]),
        state_dir=st.sampled_from(["", "/state"]),
        watch_mode=st.sampled_from(["inotify", "polling", "none"]),
        watch_reason=words,
        restart_required=st.sampled_from([(), ("port",)]),
    ),
    source_available=st.booleans(),
    source_message=words,
    complete=st.booleans(),
    settled=st.booleans(),
    converged=st.booleans(),
    problems=problems,
    conflicts=st.dictionaries(st.sampled_from(["m", "x"]), st.lists(refs, min_size=1).map(tuple)),
    prune_guard=st.one_of(st.none(), st.just(PruneGuard("d", ("m",), 4))),
    state_problem=words,
    devices=st.sampled_from([(), (DeviceUse("cpu", 900.0, 1000.0),)]),
    max_models=st.integers(0, 2),
)
others = st.lists(
    st.builds(lambda v, n: replace(v, model_id=f"o{n}", key=f"o{n}#1"), views(), st.integers(0, 9)),
    max_size=3,
)


def status_of(known: Facts, kind: str) -> str:
    return next(row.status for row in conditions_of(known, NOON) if row.type == kind)


@given(facts)
def test_ready_is_true_only_if_the_accepted_generation_serves(known: Facts) -> None:
    mine = [v for v in known.views if v.owner is Owner.DIRECTORY or known.wanted is None]
    serves = [v.spec.generation for v in mine if v.state is State.READY]
    if status_of(known, "Ready") == "True":
        assert known.generation in serves
        assert known.observed_generation == known.generation
        if known.wanted is not None:
            assert not any(v.owner is Owner.API for v in known.views)


@given(facts)
def test_phase_sync_health_and_conditions_agree(known: Facts) -> None:
    phase, sync, health = phase_of(known), sync_of(known), health_of(known)
    served = known.serving is not None
    assert (
        (phase in (Phase.READY, Phase.UPDATING) and served)
        or not served
        or (phase is Phase.TERMINATING)
    )
    assert (status_of(known, "Synced") == "True") == (sync is Sync.SYNCED)
    assert (status_of(known, "Synced") == "Unknown") == (sync is Sync.UNKNOWN)
    if health is Health.HEALTHY:
        assert phase is Phase.READY
    if known.suspended and phase is not Phase.TERMINATING:
        assert health is Health.SUSPENDED
    if phase is Phase.FAILED:
        assert health in (Health.DEGRADED, Health.SUSPENDED)
    if sync is Sync.SYNCED and known.wanted is not None:
        assert status_of(known, "Accepted") == "True"
    if known.wanted is None and not known.of_api:
        assert phase is Phase.TERMINATING


@given(facts)
def test_conditions_are_of_distinct_types_with_a_reason_and_words(known: Facts) -> None:
    rows = conditions_of(known, NOON)
    assert [row.type for row in rows[:3]] == ["Accepted", "Synced", "Ready"]
    assert len({row.type for row in rows}) == len(rows)
    for row in rows:
        assert row.status in ("True", "False", "Unknown")
        assert row.reason.isalnum()
        assert row.reason[0].isupper()
        assert not row.message.startswith("; ")


@given(facts, nodes, others)
def test_everything_has_an_explanation_with_a_headline(
    known: Facts, node: NodeFacts, views_of_others: Sequence[InstanceView]
) -> None:
    found = explain(known, node, NOON, views_of_others)
    assert found.phase == phase_of(known)
    assert found.headline.startswith("m")
    assert len(found.headline.split()) >= 3
    for sentence in (*found.because, *found.would_help):
        assert sentence
    assert found.waits_for != ""


@given(facts)
def test_a_next_try_is_only_announced_where_there_will_be_one(known: Facts) -> None:
    if (retry_s := next_retry_s(known)) is not None:
        assert known.waiting is not None
        assert known.waiting.until_s == retry_s
        assert not known.suspended


@given(nodes)
def test_the_node_has_all_its_conditions(node: NodeFacts) -> None:
    rows = node_conditions(node)
    assert len({row.type for row in rows}) == len(rows) == 7
    status = {row.type: row.status for row in rows}
    assert (status["PruneGuard"] == "True") == (node.prune_guard is not None)
    assert (status["StateKept"] == "False") == bool(node.state_problem)
    if node.info.directory:
        assert (status["SourceAvailable"] == "True") == node.source_available


@given(st.lists(st.tuples(facts, st.floats(0.5, 5.0)), min_size=1, max_size=6), nodes)
def test_a_condition_keeps_its_time_while_its_status_stays(
    steps: list[tuple[Facts, float]], node: NodeFacts
) -> None:
    wall = Wall(100.0)
    book = StatusBook(wall)
    seen: list[dict[str, tuple[str, float]]] = []
    published: list[float] = []
    for known, pause in steps:
        wall.seconds += pause
        book.publish([known], node, 0.0)
        described = book.describe("m")
        assert described is not None
        json.dumps(described, allow_nan=False)
        seen.append({c["type"]: (c["status"], c["since"]) for c in described["conditions"]})  # type: ignore[attr-defined]
        published.append(wall.seconds)
    for (before, after), at in zip(pairwise(seen), published[1:], strict=True):
        for kind, (status, since) in after.items():
            same = kind in before and before[kind][0] == status
            assert since == (before[kind][1] if same else at)


@given(st.lists(st.lists(facts, max_size=3), min_size=1, max_size=4), nodes)
def test_publishing_in_steps_tells_the_same_as_publishing_once(
    steps: list[list[Facts]], node: NodeFacts
) -> None:
    def named(of: list[Facts]) -> list[Facts]:
        return [replace(known, model_id=f"m{n}") for n, known in enumerate(of)]

    wall = Wall(100.0)
    book, fresh = StatusBook(wall), StatusBook(wall)
    for step in steps:
        book.publish(named(step), node, 0.0)
    fresh.publish(named(steps[-1]), node, 0.0)
    without_history = ("events",)
    assert [
        {k: v for k, v in shown.items() if k not in without_history} for shown in book.models()
    ] == [{k: v for k, v in shown.items() if k not in without_history} for shown in fresh.models()]
    assert book.node() == fresh.node()
    assert dict(book.phases) == dict(fresh.phases)
