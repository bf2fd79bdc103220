"""Whole directories change in one step, again and again, while clients call, and no request fails."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from chaos.faults import SETTINGS, served, swap_link, wait_ready
from splitlearn_manager.reconcile.backoff import WINDOW_S
from support.node import Node
from support.served import Callers, answer_of, constant, declare, loads, save_version, write_factory
from support.waiting import eventually

SWAPS = 30
PATIENCE_S = WINDOW_S + 30.0
"""A swap in the middle of a load is a failed load, and after ten of them a model waits for a minute."""

IDS = ("one", "two", "three")


def write_config_map(root: Path, number: int) -> str:
    """What kubelet writes beside the last version; its name begins with two dots."""
    inside = root / f"..2024_{number}"
    served(inside, dict.fromkeys(IDS, number))
    return inside.name


def tell(what: str, callers: Sequence[Callers]) -> None:
    """Of calls that none failed: no older version answered after a newer one, and how many there were."""
    versions: list[int] = []
    for caller in callers:
        seen = [float(answer[0, 0]) for answer in caller.answers[0]]
        assert seen == sorted(seen), "an older version answered after a newer one"
        versions.append(len(set(seen)))
    answers = sum(len(caller.answers[0]) for caller in callers)
    print(
        f"\n{SWAPS} {what}: {answers} requests answered, none failed; "
        f"{', '.join(map(str, versions))} versions answered, the last one last"
    )


def test_a_series_of_config_map_swaps_fails_no_request_and_the_last_one_wins(
    tmp_path: Path,
) -> None:
    root, rng, pause = tmp_path / "desired", random.Random(3), threading.Event()
    root.mkdir()
    swap_link(root / "..data", write_config_map(root, 1))
    for name in os.listdir(root / "..data"):
        (root / name).symlink_to(f"..data/{name}")
    with Node(root, SETTINGS) as node, ExitStack() as stack:
        wait_ready(node, dict.fromkeys(IDS, 1.0))
        callers = [stack.enter_context(Callers(node, model_id)) for model_id in IDS]
        for number in range(2, SWAPS + 2):
            before = os.readlink(root / "..data")
            swap_link(root / "..data", write_config_map(root, number))
            shutil.rmtree(root / before)
            pause.wait(rng.choice((0.0, 0.02, 0.1, 0.4)))
        last = float(SWAPS + 1)
        for model_id, caller in zip(IDS, callers, strict=True):
            caller.wait_for(
                lambda caller=caller: float(caller.answers[0][-1][0, 0]) == last,
                f"{model_id} answers as the last version says",
                PATIENCE_S,
            )
        assert not node.find("Traceback")
    tell("ConfigMap swaps", callers)


def test_a_series_of_git_checkouts_fails_no_request_and_the_last_one_wins(tmp_path: Path) -> None:
    """What is the same in all commits is loaded once: its weights lie outside of them."""
    root, rng, pause = tmp_path / "repository", random.Random(4), threading.Event()
    root.mkdir()
    save_version(tmp_path / "still.pt", 5)

    def check_out(number: int) -> str:
        commit = root / f"commit-{number}"
        desired = served(commit / "desired", dict.fromkeys(IDS, number))
        declare(desired, "still", model_path=str(tmp_path / "still.pt"))
        (desired / "server.yaml").write_text(first_settings)
        return commit.name

    first_settings = '{"port": 0, "metrics_port": 0, "max_models": 20, "settle_s": 0.1}'
    swap_link(root / "current", check_out(1))
    with Node(root / "current" / "desired", SETTINGS) as node, ExitStack() as stack:
        wait_ready(node, dict.fromkeys((*IDS, "still"), 1.0))
        callers = [stack.enter_context(Callers(node, model_id)) for model_id in (*IDS, "still")]
        for number in range(2, SWAPS + 2):
            before = root / os.readlink(root / "current")
            swap_link(root / "current", check_out(number))
            shutil.rmtree(before)
            pause.wait(rng.choice((0.0, 0.02, 0.1, 0.4)))
        last = float(SWAPS + 1)
        for model_id, caller in zip(IDS, callers, strict=False):
            caller.wait_for(
                lambda caller=caller: float(caller.answers[0][-1][0, 0]) == last,
                f"{model_id} answers as the last commit says",
                PATIENCE_S,
            )
        assert loads(node, "still") == 1
        assert not node.find("Traceback")
    tell("checkouts", callers)


def test_a_swap_takes_effect_with_the_watcher_alone(tmp_path: Path) -> None:
    """No look is due for a minute: only what the watcher hears can bring the new version in time."""
    root = tmp_path / "desired"
    root.mkdir()
    swap_link(root / "..data", write_config_map(root, 1))
    for name in os.listdir(root / "..data"):
        (root / name).symlink_to(f"..data/{name}")
    with Node(root, {**SETTINGS, "resync_s": 60.0}) as node:
        wait_ready(node, dict.fromkeys(IDS, 1.0))
        for number in (2, 3):
            before = os.readlink(root / "..data")
            swap_link(root / "..data", write_config_map(root, number))
            shutil.rmtree(root / before)
            for model_id in IDS:
                eventually(
                    lambda m=model_id, n=number: answer_of(node, m) == n, f"{model_id} changes"
                )


def test_editing_through_every_swap_of_a_factory_serves_the_last_code(tmp_path: Path) -> None:
    """The YAML file stays, the code that it names is replaced: a new step each time."""
    root, pause, rng = tmp_path / "desired", threading.Event(), random.Random(5)
    served(root, {"coded": 1.0})
    declare(root, "coded", config=constant(1.0))
    with Node(root, SETTINGS) as node:
        node.wait_phase("coded", "Ready")
        with Callers(node, "coded") as callers:
            for step in range(1, SWAPS + 1):
                write_factory(root, step=float(step))
                pause.wait(rng.choice((0.0, 0.05, 0.3)))
            callers.wait_for(
                lambda: float(callers.answers[0][-1][0, 0]) == 1.0 + SWAPS,
                "the last code answers",
                PATIENCE_S,
            )
    tell("new versions of the code", [callers])
