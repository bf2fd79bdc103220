"""What the bytes of a file of the desired directory mean, as `Reading`s. Pure, but for what it shares.

Files in one directory share one object for it, so that ten thousand of them do not keep ten thousand.

What an earlier process accepted from the very same bytes is taken over rather than parsed again, so that
a node starts anew within seconds. `mark_of` says whether they are the same: it covers the bytes, how many
models they declare, the spec of each, and all that decides what bytes mean (this program's version, the
keys and their defaults).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.yaml_source import parse_models, parse_server
from splitlearn_manager.desired.scanner import printable
from splitlearn_manager.desired.state import DesiredModel, SourceRef
from splitlearn_manager.desired.tracked_file import Declaration, Reading
from splitlearn_manager.version import VERSION


class ModelParser:
    """Reads model files; a `Parse`.

    Args:
        root: the desired directory, which relative paths inside the files are resolved against; None
            for the current working directory.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._base_dirs: dict[str, Path] = {}
        self._accepted: dict[str, list[DesiredModel]] = {}

    def remember(self, models: Iterable[DesiredModel]) -> None:
        """What an earlier process accepted; each file's is used once at most."""
        for model in models:
            if model.mark:
                self._accepted.setdefault(model.source.file, []).append(model)

    def __call__(self, path: str, data: bytes) -> Reading:
        """What a model file says."""
        name, base_dir = printable(path), self._base_dir(path)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        accepted = self._accepted.pop(name, [])
        if accepted and _are_all(accepted, digest, base_dir):
            return Reading(tuple(sorted(map(_declared, accepted), key=lambda d: d.ref.line)))
        parsed = parse_models(data, file=name, base_dir=base_dir)
        declarations = []
        for model in parsed.models:
            spec_hash = model.config.spec_hash()
            declarations.append(
                Declaration(
                    config=model.config,
                    spec_hash=spec_hash,
                    load_hash=model.config.load_hash(),
                    ref=SourceRef(name, model.line),
                    mark=mark_of(digest, len(parsed.models), spec_hash)
                    if not parsed.problems
                    else "",
                )
            )
        if not parsed.problems:
            return Reading(tuple(declarations))
        return Reading(
            tuple(declarations),
            problems=parsed.problems,
            fault="is invalid",
            invalid_ids=parsed.invalid_ids,
            data=data.replace(b"\0", b""),
        )

    def _base_dir(self, path: str) -> Path | None:
        if self._root is None:
            return None
        directory = os.path.dirname(path)
        return self._base_dirs.setdefault(directory, self._root / directory)


def mark_of(digest: bytes, models: int, spec_hash: str) -> str:
    """Names one of so many models of a file without problems, whose bytes have that digest."""
    text = f"{_grammar()} {digest.hex()} {models} {spec_hash}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def parse_server_file(path: str, data: bytes) -> Reading:
    """What `server.yaml` says; a `Parse`."""
    server, problems = parse_server(data, file=path)
    return Reading(server=server, problems=problems, fault="is invalid" if problems else None)


@functools.cache
def _grammar() -> str:
    """Another text as soon as the same bytes may mean something else."""
    text = f"{VERSION} {json.dumps(ModelConfig.model_json_schema(), sort_keys=True)}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _are_all(models: list[DesiredModel], digest: bytes, base_dir: Path | None) -> bool:
    """Whether a file with that digest declares just these."""
    return all(
        model.mark == mark_of(digest, len(models), model.spec_hash)
        and model.config.base_dir == base_dir
        for model in models
    )


def _declared(model: DesiredModel) -> Declaration:
    return Declaration(model.config, model.spec_hash, model.load_hash, model.source, model.mark)
