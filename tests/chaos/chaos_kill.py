"""kill -9 at random moments, while a writer edits the files: what the next start ends in.

Two nodes side by side, each with a directory and a writer of its own. Some are killed while they start,
the others at a random moment after an edit. Whenever a node comes up with its writer at rest, it must end
where a node that nobody disturbed would: each model serves what `world` says it must, was loaded once, and
the state directory is whole.

`make chaos STARTS=500 SEED=7` chooses how many starts, and which sequence of operations.
"""

from __future__ import annotations

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, time

import grpc
import pytest

from chaos.world import WEIGHTS, World
from splitlearn_comm import GRPCComputeClient, RemoteComputeError
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_manager.server.state_dir import state_dir_for
from support.node import Node
from support.served import X, loads, version_of
from support.waiting import eventually

STARTS = int(os.environ.get("STARTS") or 200)
SEED = int(os.environ.get("SEED") or time())
LANES = 2
SETTINGS = {"max_models": 20, "settle_s": 0.1, "resync_s": 0.5}

AT_START = 0.3
"""Share of the starts that are killed before anybody looked at them."""


class Lane:
    """One node after another over the same directory and the same state directory."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.world = World(directory, seed)
        self.state_dir = state_dir_for(directory)
        self.rng = random.Random(seed + 1)
        self.starts = self.killed_early = self.exact = self.checks = 0
        self.failures: list[str] = []
        self.pause = threading.Event()
        self._generations: dict[str, tuple[int, int]] = {}

    def run(self, starts: int) -> None:
        for number in range(starts):
            if len(self.failures) >= 3:
                return
            self.starts += 1
            node = Node(self.world.directory, SETTINGS)
            if number and self.rng.random() < AT_START:
                self._kill_while_starting(node)
            else:
                with node:
                    self._check(node)
                    self._edit_and_kill(node)

    # -- killing

    def _kill_while_starting(self, node: Node) -> None:
        self.killed_early += 1
        node.spawn()
        end = monotonic() + self.rng.uniform(0.2, 2.5)
        while monotonic() < end:
            if self.rng.random() < 0.5:
                self.world.act(lambda model_id, value: False)
            self.pause.wait(self.rng.uniform(0.0, 0.2))
        node.kill()

    def _edit_and_kill(self, node: Node) -> None:
        """The writer works on its own, so that the node is killed in the middle of it."""
        stop = threading.Event()
        writer = threading.Thread(target=self._write, args=(node, stop))
        writer.start()
        self.pause.wait(self.rng.uniform(0.05, 1.2))
        node.kill()
        stop.set()
        writer.join()

    def _write(self, node: Node, stop: threading.Event) -> None:
        with asking(node) as client:
            while not stop.is_set():
                self.world.act(lambda i, value: self._seen(client, i, value, stop))
                for model_id in self.world.ids:
                    if not stop.is_set() and self.rng.random() < 0.3:
                        self.world.answered(model_id, ask(client, model_id))
                stop.wait(self.rng.uniform(0.0, 0.15))

    def _seen(
        self, client: GRPCComputeClient, model_id: str, value: int, stop: threading.Event
    ) -> bool:
        end = monotonic() + 1.0
        while monotonic() < end and not stop.is_set():
            if ask(client, model_id) == value:
                self.world.answered(model_id, value)
                return True
            stop.wait(0.02)
        return False

    # -- looking

    def _check(self, node: Node) -> None:
        self.checks += 1
        try:
            eventually(lambda: node.get("/readyz")[0] == 200, "the first convergence", 30)
            with asking(node) as client:
                for model_id in self.world.ids:
                    self._check_model(node, client, model_id)
            self._check_state_dir()
            assert not node.find("Traceback"), "the log has a traceback"
        except AssertionError as failure:
            self.failures.append(self._report(node, failure))

    def _check_model(self, node: Node, client: GRPCComputeClient, model_id: str) -> None:
        expected = self.world.expected(model_id)
        self.exact += len(expected) == 1
        served = eventually(
            lambda: [v for v in [ask(client, model_id)] if v in expected],
            f"{model_id} serves one of {expected}; it serves {ask(client, model_id)}",
            20,
        )[0]
        self.world.answered(model_id, served)
        count = loads(node, model_id)
        assert count == (served is not None), f"{model_id} was loaded {count} times"
        status = node.status(model_id)
        if served is not None:
            assert status["observed_generation"], f"{model_id} serves no generation"
        self._check_generation(model_id, status, served)

    def _check_generation(
        self, model_id: str, status: dict[str, object], served: int | None
    ) -> None:
        """Generations go on where they were; what nobody edited has the one that it had."""
        generation = status.get("generation")
        if served is None or not isinstance(generation, int):
            self._generations.pop(model_id, None)
            return
        edits = self.world.models[model_id].edits if model_id != WEIGHTS else 0
        before = self._generations.get(model_id)
        self._generations[model_id] = (generation, edits)
        if before is not None and before[1] == edits:
            assert generation == before[0], f"{model_id}: generation {before[0]} → {generation}"
        elif before is not None and not self._may_have_gone(model_id):
            assert generation >= before[0], f"{model_id}: generation {before[0]} → {generation}"

    def _may_have_gone(self, model_id: str) -> bool:
        """Whether it was deleted in the meantime: then it may have begun anew."""
        return any(f"delete {model_id}" == line for line in self.world.recent)

    def _check_state_dir(self) -> None:
        for name in os.listdir(self.state_dir):
            assert not name.endswith(".tmp"), f"{name} was left in {self.state_dir}"
            assert not name.endswith(".unreadable"), f"{name} was set aside in {self.state_dir}"
            if name.endswith(".json"):
                json.loads((self.state_dir / name).read_text())

    def _report(self, node: Node, failure: AssertionError) -> str:
        log = "\n".join(line for line in node.lines[-40:])
        done = "\n".join(self.world.recent)
        said = json.dumps([node.status(i) for i in self.world.ids if i in str(failure)], indent=1)
        return (
            f"lane seed {self.seed}, start {self.starts}: {failure}\n"
            f"operations:\n{done}\nlog:\n{log}\nstatus:\n{said}"
        )


def asking(node: Node) -> GRPCComputeClient:
    """A client that tries once, and waits for no more than a node that was just killed deserves."""
    return GRPCComputeClient(node.address, timeout=3.0, retry_strategy=FixedDelay(max_attempts=1))


def ask(client: GRPCComputeClient, model_id: str) -> int | None:
    """The version that answers; None if none does."""
    try:
        answer = client.compute(X, model_id=model_id)
    except (RemoteComputeError, grpc.RpcError):
        return None
    return version_of(answer) if model_id == WEIGHTS else int(answer[0, 0])


@pytest.mark.timeout(7200)
def test_after_kill_9_at_any_moment_the_next_start_ends_where_no_kill_would(tmp_path: Path) -> None:
    print(f"\nSEED={SEED} STARTS={STARTS}")
    lanes = [Lane(tmp_path / f"lane-{n}" / "desired", SEED * LANES + n) for n in range(LANES)]
    began = monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        for done in [pool.submit(lane.run, STARTS // LANES) for lane in lanes]:
            done.result()
    total = sum((lane.world.operations for lane in lanes), start=type(lanes[0].world.operations)())
    print(
        f"{sum(lane.starts for lane in lanes)} starts in {monotonic() - began:.0f} s, "
        f"{sum(lane.killed_early for lane in lanes)} killed while starting, "
        f"{sum(lane.checks for lane in lanes)} checked; "
        f"{sum(lane.exact for lane in lanes)} models with one right answer; {dict(total)}"
    )
    failures = [text for lane in lanes for text in lane.failures]
    assert not failures, f"SEED={SEED}\n" + "\n\n".join(failures)
