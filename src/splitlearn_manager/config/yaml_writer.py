"""Configs → YAML files that keep what their authors wrote around the values.

An existing file keeps its comments, its order, and every line whose value still holds; only values
that differ are replaced, and keys that it lacks are added at the end. A key that goes back to its
default is set to it rather than removed. A new file has the keys that are not at their default.

A file with problems of its own is never written over. What is about to be written is parsed first,
and takes the file's place only if it says exactly what the config does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import JsonValue
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

from splitlearn_manager.config.files import RealFileSystem, write_atomically
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_reader import MAX_BYTES
from splitlearn_manager.config.yaml_source import (
    parse_models,
    parse_server,
    read_model,
    read_server,
)
from splitlearn_manager.errors import ConfigError

Values = dict[str, JsonValue]

_LONG_LINE = 100_000
"""Wide enough that no line of the author's is folded."""

_ABSENT = object()


def write_model(config: ModelConfig, path: Path) -> None:
    """Write a model's file; see `ModelConfig.to_yaml`."""

    def says_so(data: bytes) -> bool:
        parsed = parse_models(data, file=str(path), base_dir=None)
        return not parsed.problems and [model.config for model in parsed.models] == [config]

    existing = _dump(read_model(path)) if path.exists() else None
    _write(path, existing, _dump(config), _dump(config, compact=True), says_so)


def write_server(config: ServerConfig, path: Path) -> None:
    """Write a server file; see `ServerConfig.to_yaml`."""

    def says_so(data: bytes) -> bool:
        return parse_server(data, file=str(path)) == (config, ())

    existing = _dump(read_server(path)) if path.exists() else None
    compact = _dump(config, compact=True)
    # A file without any key is refused, so a config of nothing but defaults names one.
    _write(path, existing, _dump(config), compact or {"host": config.host}, says_so)


def _dump(config: ModelConfig | ServerConfig, *, compact: bool = False) -> Values:
    values: Values = config.model_dump(mode="json", exclude_defaults=compact)
    return values


def _write(
    path: Path,
    existing: Values | None,
    values: Values,
    compact: Values,
    says_so: Callable[[bytes], bool],
) -> None:
    """Write the first text that says what it should: small edits before coarse ones."""
    if existing is not None and _same(existing, values):
        return
    if existing is None:
        candidates: Iterator[bytes] = iter([_fresh(compact)])
    else:
        original = RealFileSystem().read(str(path), MAX_BYTES)
        edit = _Edit(existing, values, compact)
        candidates = (edit.apply(original, whole=whole) for whole in (False, True))
    for data in candidates:
        if says_so(data):
            write_atomically(path, data)
            return
    raise ConfigError(
        f"{path} cannot be edited in place, because its anchors or tags tie several keys together: "
        "expected plain `key: value` lines; the file was left as it is"
    )


def _fresh(values: Values) -> bytes:
    stream = io.BytesIO()
    _round_trip().dump(_styled(values), stream)
    return stream.getvalue()


@dataclass(frozen=True)
class _Edit:
    """What is to change in a file.

    Attributes:
        existing: all keys as the file has them, defaults filled in.
        values: all keys as they are to be.
        compact: the keys of `values` that are not at their default.
    """

    existing: Values
    values: Values
    compact: Values

    def apply(self, original: bytes, *, whole: bool) -> bytes:
        """The edited file.

        Args:
            whole: replace a top-level key's value as a whole, even if only a part differs.
        """
        text = original.decode("utf-8-sig")
        newline = "\r\n" if "\r\n" in text else "\n"
        text = text.replace("\r\n", "\n")
        yaml = _round_trip()
        mapping, sequence, offset = _indents(text)
        yaml.indent(mapping=mapping, sequence=sequence, offset=offset)
        yaml.explicit_start = any(line.startswith("---") for line in text.splitlines())
        document = yaml.load(text)
        for key, value in self.values.items():
            if _same(self.existing[key], value):
                continue
            part = document.get(key)
            if isinstance(part, CommentedMap) and isinstance(value, dict) and not whole:
                _edit_map(part, self.existing[key], value)
            else:
                document[key] = _in_the_style_of(part, self.compact.get(key, value))
        stream = io.StringIO()
        yaml.dump(document, stream)
        return stream.getvalue().replace("\n", newline).encode("utf-8")


def _edit_map(part: CommentedMap, existing: object, values: Values) -> None:
    """Make a map of the file say `values`, touching only what differs from `existing`."""
    old = existing if isinstance(existing, dict) else {}
    for key in [key for key in part if key not in values]:
        del part[key]
    for key, value in values.items():
        before = old.get(key, _ABSENT)
        if before is not _ABSENT and _same(before, value):
            continue
        inner = part.get(key)
        if isinstance(inner, CommentedMap) and isinstance(value, dict):
            _edit_map(inner, before, value)
        else:
            part[_styled(key)] = _in_the_style_of(inner, value)


def _in_the_style_of(old: object, value: JsonValue) -> object:
    """A new value with the old one's quotes or layout."""
    if isinstance(old, CommentedSeq) and isinstance(value, list):
        # In place, so that comments within the list stay with their items.
        del old[len(value) :]
        for index, item in enumerate(value):
            if index < len(old):
                old[index] = _styled(item)
            else:
                old.append(_styled(item))
        return old
    if isinstance(value, str) and value.isprintable():
        if isinstance(old, DoubleQuotedScalarString):
            return DoubleQuotedScalarString(value)
        if isinstance(old, SingleQuotedScalarString):
            return SingleQuotedScalarString(value)
    return _styled(value)


def _styled(value: JsonValue) -> object:
    """A plain value for ruamel: lists on one line, maps on lines of their own."""
    if isinstance(value, list):
        sequence = CommentedSeq(_styled(item) for item in value)
        sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, dict):
        return CommentedMap((_styled(key), _styled(item)) for key, item in value.items())
    if isinstance(value, str) and not value.isprintable():
        # Only double quotes have escapes; ruamel would write some line breaks of Unicode as they are.
        return DoubleQuotedScalarString(value)
    return value


def _same(one: object, other: object) -> bool:
    """Equal in value and type: in Python 1, 1.0 and True are equal, and in YAML they are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class _Representer(RoundTripRepresenter):
    """Writes null as `null`: ruamel would leave the value out, which reads like a slip.

    Writes a number of the file as it was, unless that would be another number: ruamel's own way of
    keeping the form of one with an exponent loses digits now and then.
    """

    def represent_null(self, _: None) -> Node:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_scalar_float(self, data: ScalarFloat) -> ScalarNode:
        node = super().represent_scalar_float(data)
        try:
            is_right = float(node.value) == data
        except ValueError:  # .inf and .nan
            is_right = True
        return node if is_right else self.represent_float(float(data))


_Representer.add_representer(type(None), _Representer.represent_null)
_Representer.add_representer(ScalarFloat, _Representer.represent_scalar_float)


def _round_trip() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = _LONG_LINE
    return yaml


def _indents(text: str) -> tuple[int, int, int]:
    """How the author indents: maps, lists, and the dash within a list; as ruamel counts them."""
    mapping, offset = None, None
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    for line, following in pairwise(lines):
        if not line.split(" #")[0].rstrip().endswith(":"):
            continue
        deeper = _indent(following) - _indent(line)
        if following.lstrip().startswith("- "):
            offset = deeper if offset is None and deeper >= 0 else offset
        elif deeper > 0:
            mapping = deeper if mapping is None else mapping
    offset = offset or 0
    return mapping or 2, offset + 2, offset


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
