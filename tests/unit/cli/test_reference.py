"""docs/cli.md is what the command line says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitlearn_manager.cli.reconcile import COMMANDS
from splitlearn_manager.cli.reference import examples_of, page

PATH = Path(__file__).parents[3] / "docs" / "cli.md"
PAGE = PATH.read_text(encoding="utf-8")
NAMES = [command.__name__ for command in COMMANDS]


def test_the_page_is_up_to_date() -> None:
    """Where it is not: `make docs`."""
    assert page(examples_of(PAGE)) == PAGE


def test_each_command_has_a_section_and_an_example() -> None:
    assert re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) == NAMES
    assert examples_of(PAGE).keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_command_says_its_exit_codes(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert "Exit code 0: " in section
    assert re.search(rf"^\| `{name}` \| \S", PAGE, re.MULTILINE), "it has a row in the table"


def test_the_page_names_no_place_of_the_machine_that_made_it() -> None:
    assert not re.search(r"/(tmp|home|root|work)/", PAGE)
