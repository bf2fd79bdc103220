"""The text of a file → validated configs, and a `Problem` with its line for each mistake.

Each document of a models file stands or falls alone: one bad document does not hide the others, nor
the mistakes in them. Nothing that a file contains makes these functions raise, and none of them
opens a file but `read_model` and `read_server`, which stand behind `from_yaml`.

What cannot be seen here: a file cut short at the end of a line may still be valid. That a file has
settled before it is parsed is for the acceptance of desired state to see to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from splitlearn_manager.config.files import RealFileSystem
from splitlearn_manager.config.mistakes import Mistake, show
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_errors import Flaw
from splitlearn_manager.config.yaml_reader import MAX_BYTES, Document, mark_of, read_yaml
from splitlearn_manager.errors import ConfigError

_Config = TypeVar("_Config", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file.

    Attributes:
        file: the file as messages name it.
        line, column: from 1; None where no place fits (a file that is too large).
        key: dotted, `config.dtype`; None for the document as a whole.
        message: `expected …, got …`.
    """

    file: str
    line: int | None
    column: int | None
    key: str | None
    message: str

    def __str__(self) -> str:
        place = ":".join(
            str(part) for part in (self.file, self.line, self.column) if part is not None
        )
        return f"{place}  {self.key}: {self.message}" if self.key else f"{place}  {self.message}"


@dataclass(frozen=True)
class ParsedModel:
    """A valid document: its config, the line of its model_id, and its place in the file from 0."""

    config: ModelConfig
    line: int
    index: int


@dataclass(frozen=True)
class ParsedModels:
    """What a models file says.

    Attributes:
        models: the valid documents in file order; two may share a model_id, which is a problem too.
        problems: all mistakes, in the order of lines.
        invalid_ids: model_ids that can be read in documents that are not valid.
    """

    models: tuple[ParsedModel, ...]
    problems: tuple[Problem, ...]
    invalid_ids: frozenset[str] = frozenset()


def parse_models(data: bytes, *, file: str, base_dir: Path | None) -> ParsedModels:
    """The models that a file declares, one document each.

    Args:
        data: the file's bytes.
        file: its name in messages.
        base_dir: the directory that relative paths in it start from; None: the working directory.
    """
    text = read_yaml(data)
    models: list[ParsedModel] = []
    problems: list[Problem] = []
    invalid_ids: set[str] = set()
    for document in text.documents:
        if document.is_empty:
            what = "an empty file" if len(text.documents) == 1 else "an empty document"
            problems.append(_at(document, file, f"expected a model, got {what}"))
            continue
        config, mistakes = _validate(document, ModelConfig, "a model", file)
        problems.extend(mistakes)
        if config is not None:
            line, _ = _mark(document, Mistake(("model_id",), ""))
            models.append(ParsedModel(config.with_base_dir(base_dir), line, document.index))
        elif isinstance(document.value, dict) and isinstance(document.value.get("model_id"), str):
            invalid_ids.add(document.value["model_id"])
    if text.flaw is not None:
        problems.append(_from_flaw(text.flaw, file))
    elif not text.documents:
        problems.append(Problem(file, 1, 1, None, "expected a model, got an empty file"))
    problems.extend(_duplicates(models, text.documents, file))
    return ParsedModels(tuple(models), _in_order(problems), frozenset(invalid_ids))


def parse_server(data: bytes, *, file: str) -> tuple[ServerConfig | None, tuple[Problem, ...]]:
    """The server config that a file holds, or None and what is wrong with it."""
    text = read_yaml(data)
    if text.flaw is not None:
        documents = [document for document in text.documents if document.flaws]
        flaws = [flaw for document in documents for flaw in document.flaws]
        return None, _in_order(_from_flaw(flaw, file) for flaw in (*flaws, text.flaw))
    if not text.documents or (len(text.documents) == 1 and text.documents[0].is_empty):
        message = "expected at least one key, got an empty file; without a file the defaults hold"
        return None, (Problem(file, 1, 1, None, message),)
    if len(text.documents) > 1:
        message = f"expected one document, got {len(text.documents)}"
        return None, (_at(text.documents[1], file, message),)
    config, problems = _validate(text.documents[0], ServerConfig, "the server's keys", file)
    return config, _in_order(problems)


def read_model(path: Path) -> ModelConfig:
    """The one model that the file at `path` declares.

    Raises:
        ConfigError: the file cannot be read, has problems, or declares several models.
    """
    parsed = parse_models(_read(path), file=str(path), base_dir=Path(os.path.abspath(path)).parent)
    problems = parsed.problems
    if not problems and len(parsed.models) > 1:
        second = parsed.models[1]
        message = f"expected one model, got {len(parsed.models)} documents"
        problems = (Problem(str(path), second.line, None, None, message),)
    if problems:
        raise _error(problems)
    return parsed.models[0].config


def read_server(path: Path) -> ServerConfig:
    """The server config in the file at `path`.

    Raises:
        ConfigError: the file cannot be read or has problems.
    """
    config, problems = parse_server(_read(path), file=str(path))
    if config is None:
        raise _error(problems)
    return config


def _read(path: Path) -> bytes:
    try:
        return RealFileSystem().read(str(path), MAX_BYTES + 1)
    except OSError as error:
        problem = Problem(str(path), None, None, None, f"cannot be read: {error.strerror}")
        raise _error((problem,)) from error


def _error(problems: tuple[Problem, ...]) -> ConfigError:
    return ConfigError("\n".join(str(problem) for problem in problems), problems=problems)


def _validate(
    document: Document, model: type[_Config], what: str, file: str
) -> tuple[_Config | None, list[Problem]]:
    """The document as a config, or all that is wrong with it."""
    problems = [_from_flaw(flaw, file) for flaw in document.flaws]
    if not isinstance(document.value, dict):
        message = f"expected {what} as `key: value` lines, got {show(document.value)}"
        return None, problems or [_at(document, file, message)]
    try:
        config = model.model_validate(document.value)
    except ConfigError as error:
        flawed = {flaw.key for flaw in document.flaws}
        for mistake in error.problems:
            # A value with a flaw was left out, and is not to be reported as empty as well.
            if isinstance(mistake, Mistake) and mistake.key not in flawed:
                line, column = _mark(document, mistake)
                problems.append(Problem(file, line, column, mistake.key, mistake.message))
        return None, problems
    return (None if problems else config), problems


def _duplicates(
    models: Iterable[ParsedModel], documents: tuple[Document, ...], file: str
) -> list[Problem]:
    """A problem for each model_id that an earlier document of the file has too."""
    first: dict[str, int] = {}
    problems = []
    for model in models:
        model_id = model.config.model_id
        if model_id not in first:
            first[model_id] = model.line
            continue
        line, column = _mark(documents[model.index], Mistake(("model_id",), ""))
        message = (
            f"expected each model_id once, got {show(model_id)} again: "
            f"first on line {first[model_id]}"
        )
        problems.append(Problem(file, line, column, "model_id", message))
    return problems


def _mark(document: Document, mistake: Mistake) -> tuple[int, int]:
    if document.node is None:
        return document.line, document.column
    return mark_of(document.node, mistake.path, at_key=mistake.at_key)


def _at(document: Document, file: str, message: str) -> Problem:
    return Problem(file, document.line, document.column, None, message)


def _from_flaw(flaw: Flaw, file: str) -> Problem:
    return Problem(file, flaw.line, flaw.column, flaw.key, flaw.message)


def _in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.line or 0, p.column or 0, p.key or "")))
