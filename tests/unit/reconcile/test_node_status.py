"""The conditions of the node say what is the matter, what goes on meanwhile, and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitlearn_manager.desired.state import PruneGuard
from splitlearn_manager.reconcile.node_status import node_conditions
from splitlearn_manager.reconcile.status import NodeFacts, NodeInfo
from support.status_lab import GUARD, INFO, NODE


def of(node: NodeFacts, kind: str) -> tuple[str, str, str]:
    row = next(row for row in node_conditions(node) if row.type == kind)
    return (row.status, row.reason, row.message)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("SourceAvailable", ("True", "Available", "/desired can be read")),
        ("Watching", ("True", "Watching", "changes are reported by inotify")),
        ("StateKept", ("True", "Kept", "what must survive a restart is in /state")),
        ("PruneGuard", ("False", "NothingHeld", "")),
        ("RestartRequired", ("False", "UpToDate", "")),
        ("Settled", ("True", "Settled", "nothing is under way, and nothing unsettled")),
    ],
)
def test_a_node_that_is_well_says_so(kind: str, expected: tuple[str, str, str]) -> None:
    assert of(NODE, kind) == expected


def test_a_directory_that_is_away_leaves_everything_as_it_is() -> None:
    node = replace(NODE, source_available=False, source_message="/desired does not exist")
    assert of(node, "SourceAvailable") == (
        "False",
        "SourceUnavailable",
        "/desired does not exist; everything stays as it is; bring the directory back, mounted and "
        "readable",
    )
    assert "/desired cannot be read;" in of(replace(node, source_message=""), "SourceAvailable")[2]


def test_a_part_of_the_directory_that_cannot_be_read_is_named() -> None:
    node = replace(NODE, source_message="sub: Permission denied")
    assert of(node, "SourceAvailable") == (
        "True",
        "PartlyUnreadable",
        "sub: Permission denied; what it may declare stays as it is",
    )


def test_polling_says_why() -> None:
    info = replace(INFO, watch_mode="polling", watch_reason="no inotify watches are left")
    status, reason, message = of(replace(NODE, info=info), "Watching")
    assert (status, reason) == ("False", "Polling")
    assert message.endswith(": no inotify watches are left")


def test_state_that_cannot_be_written_is_no_reason_to_stop() -> None:
    node = replace(NODE, state_problem="/state/models-07.json: No space left on device")
    status, reason, message = of(node, "StateKept")
    assert (status, reason) == ("False", "StateNotKept")
    assert message == (
        "/state/models-07.json: No space left on device; until that is over a restart knows no newer "
        "last good specs"
    )


def test_the_prune_guard_names_what_it_holds_and_the_command() -> None:
    status, reason, message = of(replace(NODE, prune_guard=GUARD), "PruneGuard")
    assert (status, reason) == ("True", "AwaitsConfirmation")
    assert message == (
        "no file declares 3 of 4 models any more (a, b, m); none of them is unloaded; put their "
        "files back, or confirm with `apply /desired --confirm-prune 3f1c0a9be2d4`"
    )
    spaced = replace(NODE, prune_guard=GUARD, info=replace(NODE.info, directory="/my models"))
    assert "`apply '/my models' --confirm-prune 3f1c0a9be2d4`" in of(spaced, "PruneGuard")[2]
    many = PruneGuard("0", tuple(f"m{n}" for n in range(9)), 9)
    assert "(m0, m1, m2, m3, m4 and 4 more)" in of(replace(NODE, prune_guard=many), "PruneGuard")[2]


def test_settings_that_need_a_restart_are_named() -> None:
    node = replace(NODE, info=replace(INFO, restart_required=("host", "port")))
    assert of(node, "RestartRequired") == (
        "True",
        "SettingsChanged",
        "server.yaml has new values of host, port; the old ones hold until the node restarts",
    )


def test_a_node_that_is_busy_is_not_settled() -> None:
    assert of(replace(NODE, settled=False), "Settled")[:2] == ("False", "InProgress")
    assert of(replace(NODE, settled=False, complete=False), "Settled")[:2] == ("False", "FirstLook")


def test_a_node_without_a_directory_misses_nothing() -> None:
    node = NodeFacts(info=NodeInfo(), settled=True)
    assert of(node, "SourceAvailable")[:2] == ("True", "NoDirectory")
    assert of(node, "Watching")[:2] == ("False", "NoDirectory")
    assert of(node, "StateKept")[:2] == ("Unknown", "NoStateDir")
