"""What the bytes of a file of the desired directory mean, as `Reading`s. Pure, but for what it shares.

Files in one directory share one object for it, so that ten thousand of them do not keep ten thousand.
"""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_manager.config.yaml_source import parse_models, parse_server
from splitlearn_manager.desired.scanner import printable
from splitlearn_manager.desired.state import SourceRef
from splitlearn_manager.desired.tracked_file import Declaration, Reading


class ModelParser:
    """Reads model files; a `Parse`.

    Args:
        root: the desired directory, which relative paths inside the files are resolved against; None
            for the current working directory.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._base_dirs: dict[str, Path] = {}

    def __call__(self, path: str, data: bytes) -> Reading:
        """What a model file says."""
        name = printable(path)
        parsed = parse_models(data, file=name, base_dir=self._base_dir(path))
        declarations = tuple(
            Declaration(
                config=model.config,
                spec_hash=model.config.spec_hash(),
                load_hash=model.config.load_hash(),
                ref=SourceRef(name, model.line),
            )
            for model in parsed.models
        )
        if not parsed.problems:
            return Reading(declarations)
        return Reading(
            declarations,
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


def parse_server_file(path: str, data: bytes) -> Reading:
    """What `server.yaml` says; a `Parse`."""
    server, problems = parse_server(data, file=path)
    return Reading(server=server, problems=problems, fault="is invalid" if problems else None)
