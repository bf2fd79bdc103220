"""kill -9 at random moments, while a writer edits the files: what the next start ends in.

Two nodes side by side, each with a directory and a writer of its own. Some are killed while they start,
some at a random moment after an edit, some in the middle of writing their state. Whenever a node comes up
with its writer at rest, it must end where a node that nobody disturbed would: each model answers what
`world` says it must, was loaded once, and the state directory is whole. In the end its status is compared
with that of a node which begins on a copy of the directory, without anything to remember.

`make chaos STARTS=500 SEED=7` chooses how many starts, and which sequence of operations.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, time

import grpc
import pytest

from chaos.world import WEIGHTS, World
from splitlearn_comm import GRPCComputeClient, RemoteComputeError
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_manager.reconcile.store import NODE, SHARDS
from splitlearn_manager.server.state_dir import record_of
from support.node import Node
from support.served import X, loads, version_of
from support.waiting import eventually

STARTS = int(os.environ.get("STARTS") or 200)
SEED = int(os.environ.get("SEED") or time())
LANES = 2
SETTINGS = {"max_models": 20, "settle_s": 0.1, "resync_s": 0.5}

AT_START = 0.3
"""Share of the starts that are killed before anybody looked at them."""

AT_WRITE = 0.4
"""Share of the others that are killed as soon as they are seen to write their state."""

TOO_MANY = 3
"""After so many failures of a lane nothing new is to be learned."""

RECORD_FILES = {NODE, *(f"models-{number:02d}.json" for number in range(SHARDS))}


TOLD = (
    "killed while starting",
    "killed after an edit",
    "killed while writing its state",
    "files left half written by a kill",
    "starts checked",
    "models checked by asking them",
    "models with one right answer",
    "models with a broken file that serve their last good spec",
    "models with a broken file and one right answer",
    "models whose new version fails and whose last one is back",
    "answers while files were edited, none of a version that may not answer",
    "models compared with an undisturbed node",
)
"""What is counted, and printed in the end."""


class Lane:
    """One node after another over the same directory and the same state directory."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.world = World(directory, seed)
        self.rng = random.Random(seed + 1)
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self.pause = threading.Event()
        self._generations: dict[str, tuple[int, int, int]] = {}

    def run(self, starts: int) -> None:
        for number in range(starts):
            if len(self.failures) >= TOO_MANY:
                return
            self.seen["starts"] += 1
            node = Node(self.world.directory, SETTINGS)
            if number and self.rng.random() < AT_START:
                self._kill_while_starting(node)
            else:
                with node:
                    self._check(node)
                    self._edit_and_kill(node)
            self.seen["files left half written by a kill"] += len(unfinished(node))
        self._compare_with_an_undisturbed_node()

    # -- killing

    def _kill_while_starting(self, node: Node) -> None:
        node.spawn()
        end = monotonic() + self.rng.uniform(0.2, 2.5)
        while monotonic() < end:
            if self.rng.random() < 0.5:
                self.world.act(lambda model_id, value: False)
            self.pause.wait(self.rng.uniform(0.0, 0.2))
        assert node.process.poll() is None, f"it ended by itself: {node.lines[-5:]}"
        node.kill()
        self.seen["killed while starting"] += 1

    def _edit_and_kill(self, node: Node) -> None:
        """The writer works on its own, so that the node is killed in the middle of it."""
        stop = threading.Event()
        writer = threading.Thread(target=self._write, args=(node, stop))
        writer.start()
        at_write = self.rng.random() < AT_WRITE
        self.pause.wait(self.rng.uniform(0.05, 1.2))
        seen = at_write and self._writes_its_state(node)
        assert node.process.poll() is None, f"it ended by itself: {node.lines[-5:]}"
        node.kill()
        self.seen["killed while writing its state" if seen else "killed after an edit"] += 1
        stop.set()
        writer.join()

    def _writes_its_state(self, node: Node) -> bool:
        """Waits for a while until a file of the record is begun."""
        end = monotonic() + 2.0
        while monotonic() < end:
            if unfinished(node):
                return True
        return False

    def _write(self, node: Node, stop: threading.Event) -> None:
        with asking(node) as client:
            while not stop.is_set():
                self.world.act(lambda i, value: self._serves(client, i, value, stop))
                for model_id in self.world.ids:
                    if not stop.is_set() and self.rng.random() < 0.3:
                        self._ask(client, model_id)
                stop.wait(self.rng.uniform(0.0, 0.15))

    def _serves(
        self, client: GRPCComputeClient, model_id: str, value: int, stop: threading.Event
    ) -> bool:
        end = monotonic() + 1.0
        while monotonic() < end and not stop.is_set():
            if self._ask(client, model_id) == value:
                return True
            stop.wait(0.02)
        return False

    def _ask(self, client: GRPCComputeClient, model_id: str) -> int | None:
        """The version that answers; it must be one that may: no older one, and none of a double."""
        value = ask(client, model_id)
        if value is not None:
            self.seen["answers while files were edited, none of a version that may not answer"] += 1
            if not self.world.answered(model_id, value):
                done = "\n".join(self.world.recent)
                self._failed(f"{model_id} answers {value} again, or at all:\n{done}")
        return value

    # -- looking

    def _check(self, node: Node) -> None:
        self.seen["starts checked"] += 1
        try:
            eventually(lambda: node.get("/readyz")[0] == 200, "the first convergence", 30)
            with asking(node) as client:
                for model_id in self.world.ids:
                    self._check_model(node, client, model_id)
            eventually(lambda: not unfinished(node), "unfinished files are removed")
            self._check_state_dir(node)
            for trouble in ("Traceback", "event=StateNotRead", "event=StateNotKept"):
                assert not node.find(trouble), node.find(trouble)
        except AssertionError as failure:
            self._failed(self._report(node, failure))

    def _check_model(self, node: Node, client: GRPCComputeClient, model_id: str) -> None:
        kind, expected = self.world.state_of(model_id), self.world.expected(model_id)
        served = eventually(
            lambda: [v for v in [ask(client, model_id)] if v in expected],
            f"{model_id} ({kind}) serves one of {expected}; it serves {ask(client, model_id)}",
            20,
        )[0]
        self.world.answered(model_id, served)
        self.world.is_at_rest(model_id)
        self._count(kind, len(expected) == 1, served)
        count = loads(node, model_id)
        assert count == (served is not None), f"{model_id} was loaded {count} times"
        status = node.status(model_id)
        if served is not None:
            assert status["observed_generation"], f"{model_id} serves no generation"
        self._check_generation(model_id, status, served)

    def _count(self, kind: str, one: bool, served: int | None) -> None:
        self.seen["models checked by asking them"] += 1
        self.seen["models with one right answer"] += one
        if kind == "broken" and served is not None:
            self.seen["models with a broken file that serve their last good spec"] += 1
            self.seen["models with a broken file and one right answer"] += one
        if kind == "fails" and served is not None:
            self.seen["models whose new version fails and whose last one is back"] += 1

    def _check_generation(
        self, model_id: str, status: dict[str, object], served: int | None
    ) -> None:
        """Generations go on where they were; what nobody edited has the one that it had."""
        generation = status.get("generation")
        if served is None or not isinstance(generation, int):
            self._generations.pop(model_id, None)
            return
        model = self.world.models.get(model_id)  # none of the weights' one: its file stays
        edits, deletions = (model.edits, model.deletions) if model else (0, 0)
        before = self._generations.get(model_id)
        self._generations[model_id] = (generation, edits, deletions)
        if before is None:
            return
        change = f"{model_id}: generation {before[0]} → {generation}"
        if before[1] == edits:
            assert generation == before[0], change
        elif before[2] == deletions:  # else it may have begun anew
            assert generation >= before[0], change

    def _check_state_dir(self, node: Node) -> None:
        assert set(os.listdir(node.state_dir)) == {"lock", "node.sock", "record"}
        record = record_of(node.state_dir)
        names = {name for name in os.listdir(record) if not is_unfinished(name)}
        assert names <= RECORD_FILES, f"in {record} lies {names - RECORD_FILES}"
        for name in names:
            json.loads((record / name).read_text())

    def _compare_with_an_undisturbed_node(self) -> None:
        """Models whose files are valid stand as if nothing had ever happened."""
        copy = self.world.directory.with_name("undisturbed")
        shutil.copytree(self.world.directory, copy)
        valid = [m for m in self.world.ids if self.world.state_of(m) == "valid"]
        stands = []
        for directory in (self.world.directory, copy):
            with Node(directory, SETTINGS) as node:
                eventually(lambda node=node: node.get("/readyz")[0] == 200, "convergence", 30)
                with asking(node) as client:
                    stands.append({m: standing(node, client, m) for m in valid})
        if stands[0] != stands[1]:
            self._failed(f"disturbed: {stands[0]}\nundisturbed: {stands[1]}")
        self.seen["models compared with an undisturbed node"] += len(valid)

    def _failed(self, what: str) -> None:
        print(f"\n{what}")
        self.failures.append(what)

    def _report(self, node: Node, failure: AssertionError) -> str:
        log = "\n".join(line for line in node.lines[-40:])
        done = "\n".join(self.world.recent)
        said = json.dumps([node.status(i) for i in self.world.ids if i in str(failure)], indent=1)
        return (
            f"lane seed {self.seed}, start {self.seen['starts']}: {failure}\n"
            f"operations:\n{done}\nlog:\n{log}\nstatus:\n{said}"
        )


def is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def unfinished(node: Node) -> list[str]:
    """Files of the node's record that were begun and not put in place."""
    try:
        return [name for name in os.listdir(record_of(node.state_dir)) if is_unfinished(name)]
    except FileNotFoundError:
        return []


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


def standing(node: Node, client: GRPCComputeClient, model_id: str) -> dict[str, object]:
    """What the model answers and says of itself, but for times, generations and places."""
    status = node.status(model_id)
    conditions = status["conditions"]
    assert isinstance(conditions, list)
    return {
        "answer": ask(client, model_id),
        **{key: status[key] for key in ("phase", "sync", "health", "priority", "device")},
        "conditions": [(c["type"], c["status"], c["reason"]) for c in conditions],
    }


@pytest.mark.timeout(7200)
def test_after_kill_9_at_any_moment_the_next_start_ends_where_no_kill_would(tmp_path: Path) -> None:
    print(f"\nSEED={SEED} STARTS={STARTS}")
    lanes = [Lane(tmp_path / f"lane-{n}" / "desired", SEED * LANES + n) for n in range(LANES)]
    began = monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        for done in [pool.submit(lane.run, STARTS // LANES) for lane in lanes]:
            done.result()
    seen: Counter[str] = sum((lane.seen for lane in lanes), start=Counter())
    edits: Counter[str] = sum((lane.world.operations for lane in lanes), start=Counter())
    print(f"{seen.pop('starts')} starts on {LANES} directories in {monotonic() - began:.0f} s")
    for what in TOLD:
        print(f"{seen[what]:7d}  {what}")
    print(f"{edits.total():7d}  edits: {', '.join(f'{n} {what}' for what, n in edits.items())}")
    failures = [text for lane in lanes for text in lane.failures]
    print(f"{len(failures):7d}  failures")
    assert not failures, f"SEED={SEED}\n" + "\n\n".join(failures)
    if STARTS >= 50:  # enough for each of these to have happened
        for kind in TOLD:
            assert seen[kind], f"it never happened: {kind}"
