"""Why a text is not YAML, in one short sentence with a line; the parser's own wording stays inside.

The parser speaks of tokens and block mappings. What it met is nearly always one of a few slips (a
tab, a missing quote, a colon inside text), and those have their own sentences here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ruamel.yaml.error import MarkedYAMLError


@dataclass(frozen=True)
class Flaw:
    """Something wrong with a YAML text; line and column from 1, None where no place fits."""

    line: int | None
    column: int | None
    key: str | None
    message: str


_SLIPS: Sequence[tuple[str, str]] = (
    ("found character '\\t'", "expected spaces, got a tab"),
    (
        "mapping values are not allowed here",
        'expected one `key: value` a line, got another ":"; text with a colon needs quotes, '
        "and keys of one map the same indentation",
    ),
    ("could not find expected ':'", "expected `key: value`, got text without a colon"),
    ("expected <block end>", "expected the indentation of the lines above, got another"),
    ("while parsing a flow sequence", "expected a list that ends with `]`, got one that does not"),
    ("while parsing a flow mapping", "expected a map that ends with `}`, got one that does not"),
    (
        "unknown escape character",
        "expected an escape that YAML knows after the backslash, got another; "
        "in single quotes a backslash is just that",
    ),
    (
        "while scanning a double-quoted scalar",
        "expected hexadecimal digits after the backslash, got others",
    ),
    (
        "while scanning a quoted scalar",
        "expected text that ends with the same quote, got text that does not",
    ),
    ("while parsing a flow node", "expected a value or the end of the list or map, got neither"),
    ("while parsing a block node", "expected a value, got a character that needs quotes"),
    (
        "entries are not allowed here",
        "expected the value on this line, or the list indented below it",
    ),
    ("mapping keys are not allowed here", "expected a value, got a `?` that needs quotes"),
    (
        "while scanning an anchor",
        "expected a name after `&`, or quotes around the text, got neither",
    ),
    (
        "while scanning an alias",
        "expected a name after `*`, or quotes around the text, got neither",
    ),
    ("maximum depth", "expected a few levels of nesting, got many"),
    ("found undefined alias", "expected an anchor of this name further up, got none"),
    ("that cannot start any token", "expected a value, got a character that needs quotes"),
    (
        "expected '<document start>'",
        "expected `---` before another document, got more of this one",
    ),
    ("incompatible YAML document", "expected YAML 1.1 or 1.2, got another version"),
    ("undefined tag handle", "expected plain data, got a tag"),
    ("while parsing an tag", "expected plain data, got a tag"),
    ("while scanning a tag", "expected plain data, got a tag"),
    ("while scanning a block scalar", "expected text indented below `|` or `>`, got none"),
)
"""A part of the parser's words, and ours."""

_SHOWN_WHERE_BEGUN = frozenset(
    {
        "while parsing a flow sequence",
        "while parsing a flow mapping",
        "while scanning a quoted scalar",
    }
)
"""Slips where the parser stops far below (at the end of the file, often) what was left open."""


def explain_yaml_error(error: Exception) -> Flaw:
    """The flaw behind an exception of the YAML parser."""
    if isinstance(error, RecursionError):
        return Flaw(None, None, None, "expected a few levels of nesting, got many")
    if not isinstance(error, MarkedYAMLError):
        return Flaw(None, None, None, "expected YAML, got text that cannot be read as such")
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (None, None)
    told = f"{error.problem or ''} {error.context or ''}"
    for slip, sentence in _SLIPS:
        if slip not in told:
            continue
        if slip in _SHOWN_WHERE_BEGUN and error.context_mark is not None:
            line, column = error.context_mark.line + 1, error.context_mark.column + 1
        return Flaw(line, column, None, sentence)
    return Flaw(line, column, None, "expected YAML, got text that cannot be read as such")
