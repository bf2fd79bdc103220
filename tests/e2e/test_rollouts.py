"""A new version is tried beside the old one before it takes over, or is taken back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm import GRPCComputeClient
from splitlearn_comm.client import RemoteComputeError
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_comm.core import TensorCodec
from splitlearn_comm.protocol import compute_pb2, compute_pb2_grpc
from support.node import Node
from support.served import (
    Callers,
    X,
    condition,
    constant,
    declare,
    history,
    impatient,
    loads,
    replace_file,
    write_factory,
)
from support.waiting import eventually

ALL = {"percent": 100, "for_s": 3600}
HALF = {"percent": 50, "for_s": 3600}
SOON = {"percent": 50, "for_s": 0.3}

FAULTY = """
import os
import threading

import torch
from torch import nn


class Faulty(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(2.0))
        self.how = how
        self.calls = 0

    def forward(self, x):
        # Warm-up asks zeros; callers ask ones.
        if bool((x == 1).any()):
            if self.how == "raises":
                raise ValueError("no vocabulary")
            if self.how == "hangs":
                threading.Event().wait()
            os._exit(9)
        return x * 0 + self.value


def faulty(how="raises"):
    return Faulty(how)
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    replace_file(directory / "bad.py", FAULTY)
    with Node(directory, {"settle_s": 0.05, "resync_s": 0.2}) as started:
        yield started


def model(node: Node, value: float, **keys: object) -> None:
    declare(node.directory, "m", config=constant(value), **keys)


def canary(*steps: dict[str, object], **rules: object) -> dict[str, object]:
    return {"canary": list(steps), "min_requests": 3, **rules}


def values(callers: Callers) -> list[set[float]]:
    return [{float(value) for a in answers for value in a.flatten()} for answers in callers.answers]


def latest(callers: Callers) -> set[float]:
    return {float(answers[-1].flatten()[0]) for answers in callers.answers}


def is_tried(node: Node) -> Callable[[], object]:
    return lambda: "is tried: " in str(node.status("m").get("conditions"))


def reconcile(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "splitlearn_manager.reconcile", *arguments, str(node.directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_canary_answers_a_growing_share_and_takes_over(node: Node) -> None:
    rollout = canary(SOON, {"percent": 90, "for_s": 0.3})
    model(node, 1, rollout=rollout)
    node.wait_phase("m", "Ready")
    with Callers(node, "m", 4) as callers:
        model(node, 2, rollout=rollout)
        callers.wait_for(lambda: latest(callers) == {2.0}, "all are answered by the new version")
        callers.wait_for(lambda: node.status("m").get("sync") == "Synced", "it has taken over")
        callers.one_more_each()
        counts = [len(answers) for answers in callers.answers]
        callers.one_more_each()
    for answers, count in zip(callers.answers, counts, strict=True):
        after = {float(a.flatten()[0]) for a in answers[count:]}
        assert after == {2.0}
    told = [message for reason, message in history(node.status("m")) if reason == "Rollout"]
    assert told[0] == "generation 2 is tried: canary: step 1 of 2, 50 % of the requests"
    assert told[1] == "generation 2 answers 90 % of the requests from now on"
    assert told[2].startswith("generation 2 takes over after ")


def test_while_it_is_tried_the_old_version_serves_and_the_status_says_so(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    with Callers(node, "m", 2) as callers:
        model(node, 2, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "it is tried")
        callers.wait_for(
            lambda: all(seen == {1.0, 2.0} for seen in values(callers)), "both versions answer"
        )
        status = node.status("m")
        assert (status["phase"], status["sync"]) == ("Updating", "OutOfSync")
        assert (status["generation"], status["observed_generation"]) == (2, 1)
        ready = condition(status, "Ready")
        assert ready["status"] == "False"
        assert "canary: step 1 of 1, 50 % of the requests" in ready["message"]


def test_promote_and_abort_end_it(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    refused = reconcile(node, "promote", "m")
    assert refused.returncode == 2
    assert "no version of 'm' is being rolled out" in refused.stderr
    with Callers(node, "m") as callers:
        model(node, 2, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "it is tried")
        done = reconcile(node, "abort", "m")
        assert done.returncode == 0, done.stderr
        assert "generation 2 of m is taken back" in done.stdout
        callers.wait_for(
            lambda: "RolloutAborted" in str(node.status("m")["conditions"]), "it is taken back"
        )
        count = len(callers.answers[0])
        callers.one_more_each()
        assert {float(a.flatten()[0]) for a in callers.answers[0][count:]} == {1.0}
        model(node, 3, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "the next one is tried")
        done = reconcile(node, "promote", "m")
        assert "generation 3 of m takes over" in done.stdout
        callers.wait_for(lambda: node.status("m")["observed_generation"] == 3, "it has taken over")
        callers.wait_for(lambda: latest(callers) == {3.0}, "it answers")


def test_while_the_model_is_suspended_no_step_ends(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    with Callers(node, "m") as callers:
        model(node, 2, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "it is tried")
        assert reconcile(node, "suspend", "m").returncode == 0
        said = "step 1 of 1, 50 % of the requests; goes no further while the model is suspended"
        callers.wait_for(lambda: said in str(node.status("m")["conditions"]), "it is told")
        assert reconcile(node, "promote", "m").returncode == 0
        callers.wait_for(lambda: latest(callers) == {2.0}, "people may end it all the same")


def test_a_canary_whose_requests_fail_is_taken_back(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    rollout = canary({"percent": 50, "for_s": 3600}, max_error_rate=0.1)
    declare(
        node.directory,
        "m",
        model_path="bad:faulty",
        rollout=rollout,
        config={"input_shape": [1, 4]},
    )
    answered, failed = 0, 0
    with impatient(node) as client:

        def taken_back() -> bool:
            nonlocal answered, failed
            try:
                assert float(client.compute(X, "m").flatten()[0]) == 1.0
                answered += 1
            except RemoteComputeError as error:
                failed += "ValueError" in str(error)
            return "RolloutFailed" in str(node.status("m").get("conditions"))

        eventually(taken_back, "it is taken back")
        assert answered
        assert failed >= 3
        for _ in range(20):
            assert float(client.compute(X, "m").flatten()[0]) == 1.0
    status = node.status("m")
    assert status["health"] == "Degraded"
    assert "of its 3 requests failed" in str(status["conditions"]) or "requests failed" in str(
        status
    )


def test_a_canary_that_hangs_is_taken_back_once_callers_have_given_up(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    declare(
        node.directory,
        "m",
        model_path="bad:faulty",
        rollout=canary(HALF),
        drain_timeout_s=0.1,
        config={"input_shape": [1, 4], "kwargs": {"how": "hangs"}},
    )
    eventually(is_tried(node), "it is tried")
    once = FixedDelay(max_attempts=1)
    with GRPCComputeClient(node.address, timeout=0.5, retry_strategy=once) as client:

        def taken_back() -> bool:
            with suppress(RemoteComputeError):
                client.compute(X, "m")
            return "RolloutFailed" in str(node.status("m").get("conditions"))

        eventually(taken_back, "it is taken back")
    with impatient(node) as client:
        for _ in range(20):
            assert float(client.compute(X, "m").flatten()[0]) == 1.0


def test_a_canary_that_crashes_is_taken_back_and_only_requests_inside_it_fail(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    config = {"input_shape": [1, 4], "kwargs": {"how": "falls"}}
    declare(
        node.directory,
        "m",
        model_path="bad:faulty",
        runtime="process",
        rollout=canary(HALF),
        config=config,
    )
    failures = []
    with impatient(node) as client:

        def died() -> bool:
            try:
                assert float(client.compute(X, "m").flatten()[0]) == 1.0
            except RemoteComputeError as error:
                failures.append(str(error))
            return "WorkerDied" in str(node.status("m").get("conditions"))

        eventually(died, "its worker has died")
        assert all("INTERNAL" in failure for failure in failures)
        assert node.status("m")["observed_generation"] == 1


def test_a_shadow_answers_nobody_and_takes_over_if_it_answers_alike(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    rollout = {"shadow": {"percent": 100, "for_s": 0.5}, "min_requests": 5}
    with Callers(node, "m", 2) as callers:
        model(node, 2, rollout=rollout)
        callers.wait_for(is_tried(node), "it is tried")
        assert "shadow: asked a copy of 100 % of the requests" in str(node.status("m"))
        callers.wait_for(lambda: latest(callers) == {2.0}, "it has taken over")
    for answers in callers.answers:
        seen = [float(a.flatten()[0]) for a in answers]
        assert seen == sorted(seen)


def test_a_shadow_whose_answers_differ_too_much_is_taken_back(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    # Alike in verification, which asks something else: it is what callers ask that differs.
    replace_file(
        node.directory / "odd.py",
        "from torch import nn\n\n\nclass Odd(nn.Module):\n"
        "    def forward(self, x):\n        return 1 + (x == 1).float() * 0.5\n",
    )
    with Callers(node, "m", 2) as callers:
        declare(
            node.directory,
            "m",
            model_path="odd:Odd",
            config={"input_shape": [1, 4]},
            verify={"max_difference": 0.1},
            rollout={"shadow": {"percent": 100, "for_s": 3600}, "min_requests": 5},
        )
        callers.wait_for(
            lambda: "answers differ by 0.5" in str(node.status("m")["conditions"]),
            "it is found out",
        )
        callers.one_more_each()
    assert values(callers) == [{1.0}, {1.0}]


def test_another_edit_supersedes_what_is_tried(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    with Callers(node, "m", 2) as callers:
        model(node, 2, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "it is tried")
        model(node, 3, rollout=canary(HALF))
        callers.wait_for(lambda: any(3.0 in seen for seen in values(callers)), "the next is tried")
        # And back to what serves: nothing is loaded for that.
        before = loads(node, "m")
        model(node, 1)
        callers.wait_for(lambda: node.status("m").get("sync") == "Synced", "all is as declared")
        assert loads(node, "m") == before
        callers.one_more_each()
        assert latest(callers) == {1.0}


def test_rules_may_change_while_it_is_tried(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    with Callers(node, "m") as callers:
        model(node, 2, rollout=canary(HALF))
        callers.wait_for(is_tried(node), "it is tried")
        model(node, 2, rollout=canary({"percent": 50, "for_s": 0}))
        callers.wait_for(lambda: node.status("m")["observed_generation"] == 3, "it has taken over")
    assert loads(node, "m") == 2


@pytest.mark.parametrize("how", ["removed", "stopped"])
def test_a_node_stops_and_a_model_goes_while_a_version_is_tried(node: Node, how: str) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    model(node, 2, rollout=canary(HALF))
    eventually(is_tried(node), "it is tried")
    if how == "removed":
        (node.directory / "m.yaml").unlink()
        eventually(lambda: node.get("/api/v1/models/m")[0] == 404, "the model is gone")
        eventually(lambda: "models_loaded 0.0" in node.get("/metrics")[1], "nothing is loaded")
    else:
        node.process.terminate()
        assert node.process.wait(30) == 0


def test_after_a_crash_the_old_version_serves_first_and_the_new_one_is_tried_again(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    settings = {"settle_s": 0.05, "resync_s": 0.2}
    with Node(directory, settings) as node:
        model(node, 1)
        node.wait_phase("m", "Ready")
        model(node, 2, rollout=canary(HALF))
        eventually(is_tried(node), "it is tried")
        node.process.kill()
        node.process.wait(30)
    with Node(directory, settings) as again:
        eventually(is_tried(again), "it is tried again")
        assert again.status("m")["observed_generation"] == 1
        with Callers(again, "m", 2) as callers:
            done = reconcile(again, "promote", "m")
            assert done.returncode == 0, done.stderr
            callers.wait_for(lambda: latest(callers) == {2.0}, "it has taken over")
            assert torch.equal(callers.answers[0][-1], torch.full((1, 4), 2.0))


def test_what_was_aborted_is_not_tried_again_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / "desired"
    directory.mkdir()
    write_factory(directory)
    settings = {"settle_s": 0.05, "resync_s": 0.2}
    with Node(directory, settings) as node:
        model(node, 1)
        node.wait_phase("m", "Ready")
        model(node, 2, rollout=canary(HALF))
        eventually(is_tried(node), "it is tried")
        assert reconcile(node, "abort", "m").returncode == 0
        eventually(lambda: "RolloutAborted" in str(node.status("m")["conditions"]), "it is aborted")
    with Node(directory, settings) as again:
        eventually(lambda: again.status("m").get("observed_generation") == 1, "the old one serves")
        eventually(lambda: "RolloutAborted" in str(again.status("m")["conditions"]), "it is known")
        assert loads(again, "m") == 1
        assert "retry m" in str(reconcile(again, "explain", "m").stdout)
        assert reconcile(again, "retry", "m").returncode == 0
        eventually(is_tried(again), "it is tried again because somebody asked for it")


def test_answers_name_the_version_that_gave_them(node: Node) -> None:
    model(node, 1)
    node.wait_phase("m", "Ready")
    model(node, 2, rollout=canary(HALF))
    eventually(is_tried(node), "it is tried")
    data, shape = TensorCodec().encode(X)
    request = compute_pb2.ComputeRequest(data=data, shape=shape, model_id="m")
    seen: dict[str, set[float]] = {}
    with grpc.insecure_channel(node.address) as channel:
        stub = compute_pb2_grpc.ComputeServiceStub(channel)

        def both() -> bool:
            for use_cache in (False, True):
                request.use_cache = use_cache
                response, call = stub.Compute.with_call(request, timeout=20)
                version = dict(call.trailing_metadata())["splitlearn-version"]
                value = float(TensorCodec().decode(response.data, response.shape).max())
                seen.setdefault(str(version), set()).add(value)
            return len(seen) == 2

        eventually(both, "both versions have answered")
        assert seen == {"1": {1.0}, "2": {2.0}}
        frames = (compute_pb2.StreamedRequest(id=n, request=request) for n in range(3))
        assert {answer.version for answer in stub.ComputeStream(frames, timeout=20)} <= {"1", "2"}
    _, page = node.get("/metrics")
    for generation, role in ((1, "serves"), (2, "tried")):
        labels = f'{{model_id="m",generation="{generation}",role="{role}"}}'
        assert f"splitlearn_version_requests{labels}" in page


def test_new_weights_that_are_tried_have_the_generation_of_the_old_ones_and_series_of_their_own(
    node: Node, tmp_path: Path
) -> None:
    def weights(value: float) -> None:
        module = nn.Linear(4, 4)
        nn.init.constant_(module.weight, value)
        torch.save(module, tmp_path / "made.pt")
        replace_file(node.directory / "m.pt", (tmp_path / "made.pt").read_bytes())

    weights(1.0)
    keys: dict[str, object] = {"rollout": canary(HALF), "config": {"input_shape": [1, 4]}}
    declare(node.directory, "m", model_path="m.pt", **keys)
    node.wait_phase("m", "Ready")
    weights(2.0)
    eventually(is_tried(node), "it is tried")
    assert condition(node.status("m"), "Ready")["status"] == "True"
    _, page = node.get("/metrics")
    series = [line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))
    for role in ("serves", "tried"):
        assert f'splitlearn_version_errors{{model_id="m",generation="1",role="{role}"}}' in series
