"""What is wrong with a value, in people's words: `expected an integer, got "4gb"`.

pydantic decides whether a value is valid; this module words its verdict. It knows neither files nor
lines: a `Mistake` names the place inside the data, and `yaml_source` finds the line of that place.
None of pydantic's own sentences ever reaches a user.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

SHOWN_CHARACTERS = 60
"""Longer values are cut in messages, which are meant to fit a line."""

Path = tuple[str | int, ...]
"""The way to a value: map keys and list indices from the top of the document."""

Hint = Callable[[Path], str | None]
"""For an unknown key: where it belongs, as the end of a sentence, if that is known."""

_PLAIN_EXPECTATIONS: Mapping[str, str] = {
    "string_type": "text",
    "string_unicode": "text that is valid Unicode",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
}

_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": (">", "gt"),
    "greater_than_equal": ("≥", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("≤", "le"),
}


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong, and the value (or, for an unknown key, the key) that it is about."""

    path: Path
    message: str
    at_key: bool = False

    @property
    def key(self) -> str | None:
        """The path as users write it, `config.input_shape[1]`; None for the document as a whole."""
        return dotted(self.path) or None

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.path else self.message


def dotted(path: Path) -> str:
    """`("config", "input_shape", 1)` → `config.input_shape[1]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + printable(part)
    return text


def printable(text: str) -> str:
    """`text` on one line, of bounded length, fit for any terminal or log."""
    shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
    )


def show(value: object) -> str:
    """A value as the `got …` part of a message has it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + printable(value.replace("\\", "\\\\").replace('"', '\\"')) + '"'
        case float() if not math.isfinite(value):
            return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
        case int() | float():
            return _show_number(value)
        case date():
            return f"the date {value.isoformat()}: put it in quotes if text is meant"
        case Mapping() | BaseModel():
            return "a map"
        case list() | tuple() | set() | frozenset():
            return "a list" if value else "an empty list"
        case bytes() | bytearray():
            return "bytes"
    return f"a value of type {type(value).__name__}"


def _show_number(value: float) -> str:
    if isinstance(value, int) and abs(value) >= 10**SHOWN_CHARACTERS:
        # Python refuses to print integers of thousands of digits.
        return "a very long integer"
    return repr(value)


def suggest(word: object, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant, or None."""
    if not isinstance(word, str) or len(word) > SHOWN_CHARACTERS:
        return None
    by_folded = {_fold(choice): choice for choice in choices}
    folded = _fold(word)
    if folded in by_folded:
        return by_folded[folded]
    close = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.7)
    return by_folded[close[0]] if close else None


def _fold(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")


def listed(choices: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def expectation(
    expected: str,
    *,
    choices: Iterable[str] = (),
    path: Path = (),
    got: str | None = None,
    sentence: bool = False,
) -> PydanticCustomError:
    """The error that a validator of ours raises.

    Args:
        expected: what would be right (`a dimension ≥ 1`); `explain` adds the value that came.
        choices: words to suggest the nearest of.
        path: where inside the validated value the wrong one is.
        got: that wrong value, where it is not the one that was being validated.
        sentence: `expected` is the whole message already.
    """
    return PydanticCustomError(
        "expectation",
        "{expected}",
        {
            "expected": expected,
            "choices": tuple(choices),
            "path": path,
            "got": got,
            "sentence": sentence,
        },
    )


def explain(error: ValidationError, model: type[BaseModel], hint: Hint) -> tuple[Mistake, ...]:
    """All that pydantic found wrong, in the order of the model's keys."""
    return tuple(_explain_one(details, model, hint) for details in error.errors(include_url=False))


def _explain_one(details: ErrorDetails, model: type[BaseModel], hint: Hint) -> Mistake:
    kind, value = details["type"], details["input"]
    context = details.get("ctx", {})
    at_key = details["loc"][-1:] == ("[key]",)
    path = details["loc"][:-1] if at_key else details["loc"]
    if kind == "extra_forbidden":
        return Mistake(path, _unknown_key(path, model, hint), at_key=True)
    if kind == "missing":
        place = "file" if len(path) == 1 else "entry"
        without = "a file" if place == "file" else "an entry"
        return Mistake(
            path, f"expected this key, which every such {place} needs, got {without} without it"
        )
    if kind == "expectation":
        path = (*path, *context["path"])
        if context["sentence"]:
            return Mistake(path, str(context["expected"]), at_key)
        value = _at(context["path"], value) if context["got"] is None else context["got"]
        message = f"expected {context['expected']}, got {show(value)}"
        return Mistake(path, message + _did_you_mean(value, context["choices"]), at_key)
    if kind == "literal_error":
        choices = [
            part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")
        ]
        message = f"expected {listed(choices)}, got {show(value)}"
        return Mistake(path, message + _did_you_mean(value, choices), at_key)
    if kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        noun = "an integer" if isinstance(context[name], int) else "a number"
        return Mistake(
            path, f"expected {noun} {sign} {context[name]:.15g}, got {show(value)}", at_key
        )
    expected = _PLAIN_EXPECTATIONS.get(kind, "a value that this key allows")
    return Mistake(path, f"expected {expected}, got {show(value)}", at_key)


def _at(path: Path, value: object) -> object:
    """The value at `path` inside `value`."""
    for part in path:
        if isinstance(value, Mapping):
            value = value[part]
        elif isinstance(value, list | tuple):
            value = value[int(part)]
    return value


def _did_you_mean(value: object, choices: Iterable[str]) -> str:
    near = suggest(value, choices)
    return f'; did you mean "{near}"?' if near else ""


def _unknown_key(path: Path, model: type[BaseModel], hint: Hint) -> str:
    place = hint(path)
    if place:
        return f"expected no such key here: it belongs {place}"
    near = suggest(path[-1], _keys_at(path[:-1], model))
    if near:
        return f"unknown key: did you mean `{near}`?"
    return "expected a key that is documented, got an unknown one"


def _keys_at(path: Path, model: type[BaseModel]) -> tuple[str, ...]:
    """The keys that the model at `path` has."""
    for part in path:
        if isinstance(part, int):
            continue  # an item of a list, whose model the list's annotation has given
        found = _model_in(model.model_fields[str(part)].annotation)
        if found is None:
            return ()
        model = found
    return tuple(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model of an annotation, be it optional or that of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)
