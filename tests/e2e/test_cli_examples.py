"""The examples of docs/cli.md are what the commands print."""

from __future__ import annotations

import tempfile
from pathlib import Path

from splitlearn_manager.cli.reference import examples_of
from support.cli_examples import masked, record

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_each_example_is_what_the_command_prints() -> None:
    """Where one is not: `make docs` records them anew."""
    shown = examples_of(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="cli", dir="/tmp") as root:
        recorded = record(Path(root))
    assert recorded.keys() == shown.keys()
    for command, example in recorded.items():
        assert masked(example) == masked(shown[command]), command
