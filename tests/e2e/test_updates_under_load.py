"""Weights are replaced again and again while clients call: nobody notices but by better answers."""

from __future__ import annotations

from pathlib import Path

from support.node import Node
from support.served import Callers, declare, loads, save_version, version_of

THREADS = 8
REPLACEMENTS = 20
WAITING = 32


def test_replacing_weights_under_load_fails_no_request_and_mixes_no_versions(
    tmp_path: Path,
) -> None:
    """Every answer is that of exactly one version, and no client sees an older one again.

    Seen to fail, with refused calls, when the old version is drained before the new one is routed to.
    """
    directory = tmp_path / "desired"
    directory.mkdir()
    weights = directory / "versions.pt"
    save_version(weights, 1)
    declare(directory, "versions", model_path="versions.pt", update="surge")
    settings = {"settle_s": 0.05, "resync_s": 0.2, "max_workers": THREADS}
    with Node(directory, settings) as node:
        node.wait_phase("versions", "Ready")
        with Callers(node, "versions", THREADS) as callers:
            for version in range(2, REPLACEMENTS + 2):
                save_version(weights, version)
                callers.wait_for(
                    lambda expected=version: all(  # type: ignore[misc]
                        version_of(answers[-1]) == expected for answers in callers.answers
                    ),
                    f"all callers are answered by version {version}",
                )
        for answers in callers.answers:
            seen = [version_of(answer) for answer in answers]
            assert seen == sorted(seen)
            assert seen[0] == 1
            assert seen[-1] == REPLACEMENTS + 1
        assert loads(node, "versions") == REPLACEMENTS + 1
        assert loads(node, "versions", "failure") == 0


def test_an_update_in_the_place_of_the_old_version_keeps_requests_waiting(tmp_path: Path) -> None:
    """Seen to fail, with refused calls, when a model that makes room answers "try again".

    More requests wait than the node has threads.
    """
    directory = tmp_path / "desired"
    directory.mkdir()
    weights = directory / "versions.pt"
    save_version(weights, 1)
    declare(directory, "versions", model_path="versions.pt", update="recreate")
    with Node(directory, {"settle_s": 0.05, "resync_s": 0.2}) as node:
        node.wait_phase("versions", "Ready")
        with Callers(node, "versions", WAITING) as callers:
            for version in range(2, 8):
                save_version(weights, version)
                callers.wait_for(
                    lambda expected=version: all(  # type: ignore[misc]
                        version_of(answers[-1]) == expected for answers in callers.answers
                    ),
                    f"all callers are answered by version {version}",
                )
        for answers in callers.answers:
            seen = [version_of(answer) for answer in answers]
            assert seen == sorted(seen)
