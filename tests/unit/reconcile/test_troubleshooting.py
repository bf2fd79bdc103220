"""docs/troubleshooting.md explains every reason and every line of the log that people can meet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitlearn_manager import errors
from splitlearn_manager.core import instance_work
from splitlearn_manager.reconcile import advice, conditions, status
from splitlearn_manager.reconcile.conditions import conditions_of
from splitlearn_manager.server import control, node_api
from support.status_lab import NOON, SITUATIONS

ROOT = Path(__file__).parents[3]
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
EXPLAINED = set(
    re.findall(
        r"(?:`|event=)([A-Z][A-Za-z]+)\b",
        (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"),
    )
)
# Types that others stand for; `LoadFailed` and the like are the words for them.
_BASES = {
    "SplitlearnError",
    "LoadError",
    "TerminalLoadError",
    "AdmissionError",
    "ConfigError",
    "ServerError",
}


def _in_sources(pattern: str) -> set[str]:
    return {word for text in SOURCES for word in re.findall(pattern, text)}


def _of_types() -> set[str]:
    found = set()
    for module in (errors, control, node_api):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, errors.SplitlearnError):
                found.add(kind("").reason)
    return found - _BASES


REASONS = {
    "of types": _of_types(),
    "given where an error is raised": _in_sources(r'\breason="([A-Z][A-Za-z]+)"')
    - {"SpecChanged"},  # of an action, which is named by what it does
    "of what would help": set(advice._FIX),
    "of conditions": {
        row.reason for facts in SITUATIONS.values() for row in conditions_of(facts, NOON)
    },
    "of waits": set(conditions._NEXT) | status.WAITS_FOR_PEOPLE,
    "of the node": _in_sources(r'Row\(\s*kind, "[A-Z][a-z]+", "([A-Z][A-Za-z]+)"'),
    "of unloads": set(instance_work._UNLOADED),
    "of log lines": _in_sources(r'log_event\(\s*log, (?:logging\.)?\w+, "([A-Z][A-Za-z]+)"')
    | _in_sources(r"event=([A-Z][A-Za-z]+)") - {"NAME"},
}


@pytest.mark.parametrize("what", REASONS)
def test_every_reason_is_explained(what: str) -> None:
    assert REASONS[what], "none is found: the search is broken"
    # At DEBUG, for us: what the manager refuses is planned anew in the next turn.
    missing = REASONS[what] - EXPLAINED - {"ActionSkipped"}
    assert not missing, f"docs/troubleshooting.md does not explain {sorted(missing)}"
