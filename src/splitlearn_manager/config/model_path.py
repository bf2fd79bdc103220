"""The five things that `model_path` can be, told apart by its text alone.

    package.module:factory      a function that builds the model
    package:NAME/dir            files inside an installed Python package
    hf:org/name@revision        a repository of the Hugging Face hub
    anything else               a file or directory, relative to the YAML file

Pure: whether anything is there is the business of `model_source`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SourceKind = Literal["factory", "package", "hub", "path"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_PACKAGE = re.compile(r"package:(?P<package>[^\W\d]\w*)(/(?P<inside>.*))?")
_REPOSITORY = r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?"
_HUB = re.compile(rf"hf:(?P<repo>{_REPOSITORY})(@(?P<revision>[A-Za-z0-9_][\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class ModelPath:
    """A `model_path` taken apart; which fields are set depends on `kind`.

    Attributes:
        kind: what it names.
        path: for `path`, the text itself; for `package`, the path inside the package ("" for its
            root).
        package: the top-level package of kind `package`.
        module, attribute: of kind `factory`.
        repo_id, revision: of kind `hub`; revision None stands for the repository's main branch.
    """

    kind: SourceKind
    path: str | None = None
    package: str | None = None
    module: str | None = None
    attribute: str | None = None
    repo_id: str | None = None
    revision: str | None = None


def is_factory(text: str) -> bool:
    """Whether `text` has the form `package.module:name`."""
    return _FACTORY.fullmatch(text) is not None


def parse_model_path(text: str, model_type: str = "auto") -> ModelPath:
    """Take a `model_path` apart.

    A model_type of pytorch or huggingface says that files are meant, so that a file whose name
    looks like `module:name` can be served all the same.

    Raises:
        ValueError: the text has none of the forms; the message is what was expected.
    """
    if not text.strip() or _CONTROL.search(text):
        raise ValueError("a path or name without control characters")
    if text.startswith("hf:"):
        return _parse_hub(text)
    if text.startswith("package:"):
        return _parse_package(text)
    if model_type in ("auto", "custom") and is_factory(text):
        module, _, attribute = text.partition(":")
        return ModelPath("factory", module=module, attribute=attribute)
    return ModelPath("path", path=text)


def _parse_hub(text: str) -> ModelPath:
    found = _HUB.fullmatch(text)
    if found is None or ".." in text:
        raise ValueError("hf:org/name or hf:org/name@revision")
    return ModelPath("hub", repo_id=found["repo"], revision=found["revision"])


def _parse_package(text: str) -> ModelPath:
    found = _PACKAGE.fullmatch(text)
    inside = (found["inside"] or "").strip("/") if found else ""
    if found is None or ".." in inside.split("/"):
        raise ValueError("package:NAME or package:NAME/dir, inside the package")
    return ModelPath("package", path=inside, package=found["package"])


def is_repository(text: str) -> bool:
    """Whether it could be the name of a repository of the Hugging Face hub."""
    return re.fullmatch(_REPOSITORY, text, re.ASCII) is not None
