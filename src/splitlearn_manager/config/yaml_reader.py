"""Bytes of a YAML file → plain documents, each value with its place; and what is wrong with them.

    bytes ─► text (UTF-8, size) ─► ruamel composes nodes, with marks ─► plain values, checked

One pass gives both the values and the marks, so that a good file costs no more than reading it.
Only plain data comes out: maps with text keys, lists, text, numbers, booleans, null, and dates
(which no key accepts, but whose error should say so). Tags of a language or an application are
refused, never obeyed. Anchors, aliases and merge keys work, within a limit on what they may expand to.

It never raises for what a file contains, and knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from splitlearn_manager.config.mistakes import Path, dotted, printable, show
from splitlearn_manager.config.yaml_errors import Flaw, explain_yaml_error

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 50_000
"""Values in a document once its aliases are followed; a few nested ones can ask for billions."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_PREFIX = "tag:yaml.org,2002:"
_MERGE = _PREFIX + "merge"


@dataclass(frozen=True)
class Document:
    """One YAML document.

    Attributes:
        index: its place in the file, from 0.
        value: the plain value; parts that have flaws are left out of it.
        node: the same with marks, for `mark_of`; None for an empty document.
        line, column: where it begins, from 1.
        flaws: what is wrong with it as YAML.
    """

    index: int
    value: object
    node: Node | None
    line: int
    column: int
    flaws: tuple[Flaw, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing at all (but perhaps comments)."""
        return self.value is None and not self.flaws


@dataclass(frozen=True)
class YamlText:
    """A file: its documents as far as they can be read, and the flaw that ended it, if any."""

    documents: tuple[Document, ...]
    flaw: Flaw | None = None


class _Yaml(YAML):
    """ruamel without its plug-ins, for which it would search its own directory each time."""

    def official_plug_ins(self) -> list[str]:
        return []


def read_yaml(data: bytes) -> YamlText:
    """All documents of a file. A flaw in one document's values does not hide the others."""
    flaw = _flaw_of_bytes(data)
    if flaw is not None:
        return YamlText((), flaw)
    # A fresh object for each file: it holds the state of a parse, and threads must not share it.
    yaml = _Yaml(typ="safe", pure=True)
    yaml.max_depth = 2 * MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    documents: list[Document] = []
    try:
        for node in yaml.compose_all(data.decode("utf-8")):
            converter = _Converter(yaml)
            value = converter.convert(node, (), 0)
            mark = node.start_mark
            documents.append(
                Document(
                    index=len(documents),
                    value=value,
                    node=node,
                    line=mark.line + 1,
                    column=mark.column + 1,
                    flaws=tuple(converter.flaws),
                )
            )
    except Exception as error:
        # Not only YAMLError: malformed text makes the parser raise ValueError, RecursionError….
        return YamlText(tuple(documents), explain_yaml_error(error))
    return YamlText(tuple(documents))


def _flaw_of_bytes(data: bytes) -> Flaw | None:
    """What keeps the bytes from being read as text."""
    if len(data) > MAX_BYTES:
        return Flaw(None, None, None, "expected a file of at most 1 MiB, got a larger one")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Flaw(1, 1, None, "expected text in UTF-8, got UTF-16")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _place(data[: error.start].decode("utf-8"))
        message = f"expected text in UTF-8, got the byte 0x{data[error.start]:02x}"
        return Flaw(line, column, None, message)
    found = _UNPRINTABLE.search(text)
    if found is not None:
        line, column = _place(text[: found.start()])
        shown = "a NUL" if found[0] == "\0" else f"U+{ord(found[0]):04X}"
        return Flaw(line, column, None, f"expected plain text, got the control character {shown}")
    return None


def _place(before: str) -> tuple[int, int]:
    """Line and column, from 1, of what follows `before`."""
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def mark_of(node: Node, path: Path, *, at_key: bool = False) -> tuple[int, int]:
    """Line and column, from 1, of the value at `path`, or of the nearest part around it.

    Args:
        at_key: point at the key of the last part rather than at its value.
    """
    mark = node.start_mark
    for part in path:
        key_node: Node | None = None
        found: Node | None = None
        if isinstance(node, MappingNode):
            key_node, found = _find_key(node, part)
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
        if found is None:
            break
        node = found
        mark = found.start_mark
        # An empty value has its mark wherever the next text begins, lines further down perhaps.
        if key_node is not None and (at_key or found.value == ""):
            mark = key_node.start_mark
    return mark.line + 1, mark.column + 1


def _find_key(node: MappingNode, key: str | int) -> tuple[Node | None, Node | None]:
    """The nodes of a key and its value, looked for in merged maps too."""
    for key_node, value_node in reversed(node.value):
        if key_node.tag != _MERGE and key_node.value == key:
            return key_node, value_node
    for merged in _merged_nodes(node):
        found = _find_key(merged, key)
        if found[0] is not None:
            return found
    return None, None


def _merged_nodes(node: MappingNode) -> Iterator[MappingNode]:
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            items = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            yield from (item for item in items if isinstance(item, MappingNode))


@dataclass
class _Converter:
    """Turns the nodes of one document into plain values, and notes each flaw on the way."""

    yaml: YAML
    flaws: list[Flaw] = field(default_factory=list)
    values: int = 0
    too_deep: bool = False

    def convert(self, node: Node, path: Path, depth: int) -> object:
        self.values += 1
        if self.values > MAX_VALUES:
            if self.values == MAX_VALUES + 1:
                self._note(
                    node, (), f"expected at most {MAX_VALUES:,} values, got more: too many aliases"
                )
            return None
        if depth > MAX_DEPTH:
            if not self.too_deep:
                self._note(node, (), f"expected at most {MAX_DEPTH} levels of nesting, got more")
            self.too_deep = True
            return None
        tag = node.tag or ""
        kind = tag.removeprefix(_PREFIX) if tag.startswith(_PREFIX) else None
        match node, kind:
            case MappingNode(), "map":
                return self._mapping(node, path, depth)
            case SequenceNode(), "seq":
                return [
                    self.convert(item, (*path, index), depth + 1)
                    for index, item in enumerate(node.value)
                ]
            case ScalarNode(), _:
                return self._scalar(node, kind, path)
        self._refuse_tag(node, path)
        return None

    def _mapping(self, node: MappingNode, path: Path, depth: int) -> dict[str, object]:
        own: dict[str, object] = {}
        lines: dict[str, int] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged = self._merge(value_node, path, depth) | merged
                continue
            key = key_node.value
            if key_node.tag != _PREFIX + "str" or not isinstance(key_node, ScalarNode):
                self._note(
                    key_node, path, f"expected a key that is text, got {_describe(key_node)}"
                )
                continue
            if key in lines:
                message = f"expected each key once, got it twice: first on line {lines[key]}"
                self._note(key_node, (*path, key), message)
                continue
            lines[key] = key_node.start_mark.line + 1
            own[key] = self.convert(value_node, (*path, key), depth + 1)
        return merged | own

    def _merge(self, node: Node, path: Path, depth: int) -> dict[str, object]:
        """The maps behind `<<`; of several, an earlier one wins."""
        items = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, object] = {}
        for item in items:
            value = self.convert(item, path, depth + 1)
            if isinstance(value, dict):
                merged = value | merged
            else:
                self._note(item, (*path, "<<"), f"expected a map to merge, got {_describe(item)}")
        return merged

    def _scalar(self, node: ScalarNode, kind: str | None, path: Path) -> object:
        constructor = self.yaml.constructor
        try:
            match kind:
                case "str" | "value":
                    return self._text(node, path)
                case "int":
                    return constructor.construct_yaml_int(node)
                case "float":
                    return constructor.construct_yaml_float(node)
                case "bool":
                    return constructor.construct_yaml_bool(node)
                case "null":
                    return None
                case "timestamp":
                    return constructor.construct_yaml_timestamp(node)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
            self._note(node, path, f"expected a valid {kind}, got {show(node.value)}")
            return None
        self._refuse_tag(node, path)
        return None

    def _text(self, node: ScalarNode, path: Path) -> object:
        text: str = node.value
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            self._note(node, path, f"expected text that is valid Unicode, got {show(text)}")
            return None
        return text

    def _refuse_tag(self, node: Node, path: Path) -> None:
        tag = (node.tag or "").replace(_PREFIX, "!!")
        self._note(node, path, f"expected plain data, got the tag {printable(tag)}")

    def _note(self, node: Node, path: Path, message: str) -> None:
        mark = node.start_mark
        self.flaws.append(Flaw(mark.line + 1, mark.column + 1, dotted(path) or None, message))


def _describe(node: Node) -> str:
    """A node that should have been something else."""
    if isinstance(node, MappingNode):
        return "a map"
    if isinstance(node, SequenceNode):
        return "a list"
    kinds = {"null": "nothing", "timestamp": f"the date {printable(node.value)}"}
    kind = (node.tag or "").removeprefix(_PREFIX)
    return kinds.get(kind, printable(node.value) if kind != "str" else show(node.value))
