"""docs/configuration.md says what the code does: its examples, its tables, its messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitlearn_manager.config.loader_options import LoaderOptions
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.rollout import Rollout, Stage
from splitlearn_manager.config.server_config import LIVE_KEYS, ServerConfig
from splitlearn_manager.config.verify import Verify
from splitlearn_manager.config.yaml_source import parse_models, parse_server

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_valid(example: str) -> None:
    if "model_id" in example:
        parsed = parse_models(example.encode(), file="example", base_dir=None)
        assert parsed.problems == ()
        assert parsed.models
    else:
        assert parse_server(example.encode(), file="example")[1] == ()


def test_every_key_is_described() -> None:
    named = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, flags=re.MULTILINE)
    rows = {name.strip("`") for names in named for name in names.split(", ")}
    kinds = (ModelConfig, Verify, Rollout, Stage, LoaderOptions, ServerConfig)
    assert rows == {key for kind in kinds for key in kind.model_fields}


def test_table_says_when_a_change_of_the_server_applies() -> None:
    live = set(re.findall(r"^\| `(\w+)` \|.*\| at once \|$", PAGE, flags=re.MULTILINE))
    assert live == LIVE_KEYS


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("max_memory_mb: 4gb", 'max_memory_mb: expected an integer, got "4gb"'),
        ("max_memroy_mb: 1", "max_memroy_mb: unknown key: did you mean `max_memory_mb`?"),
        (
            "config: {input_shape: [1, 0]}",
            "config.input_shape[1]: expected a size ≥ 1, or -1 for a dimension that may vary, got 0",
        ),
        (
            "model_id: 2024-01-01",
            "model_id: expected text, got the date 2024-01-01: put it in quotes if text is meant",
        ),
        (
            "# 1\n# 2\nbatch_size: 1\nbatch_size: 1",
            "t5.yaml:4:1  batch_size: expected each key once, got it twice: first on line 3",
        ),
        ("input_shape: []", "input_shape: expected no such key here: it belongs under `config:`"),
        ("device: [a", "expected a list that ends with `]`, got one that does not"),
    ],
)
def test_messages_are_those_that_the_page_shows(text: str, shown: str) -> None:
    problems = parse_models(text.encode(), file="t5.yaml", base_dir=None).problems
    assert any(shown in str(problem) for problem in problems)
    assert shown in PAGE
