"""What is behind a model_path: which files, for which loader, and whether they have changed.

It looks names up (beside the YAML file, in installed packages, in the Hugging Face cache) and stats
files; it never imports the user's code, torch or transformers, never opens a network connection,
and reads nothing of a model. All access to files goes through a `FileSystem`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from splitlearn_manager.config.files import FileStat, FileSystem, RealFileSystem
from splitlearn_manager.config.hub_cache import cached_snapshot
from splitlearn_manager.config.installed import is_file, package_directory
from splitlearn_manager.config.installed import module_file as find_module_file
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_path import (
    ModelPath,
    SourceKind,
    is_repository,
    parse_model_path,
)
from splitlearn_manager.config.weights_size import Estimate, guessed_size, stated_size
from splitlearn_manager.errors import WeightsNotFound

LoaderName = Literal["pytorch", "huggingface", "custom"]

MAX_WEIGHTS_FILES = 10_000
"""More below one directory means that model_path names the wrong one (a home directory, say)."""

_LIKE_A_FILE = re.compile(r".*\.[a-z][a-z0-9_]*", re.ASCII)
"""It ends as files do: `.pt`, `.safetensors`, `.onnx`."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        kind: what model_path names: factory (Python code), package (files inside an installed
            package), hub (a Hugging Face repository) or path (a file or directory).
        loader: what reads it.
        path: the file or directory, absolute, whether or not it exists; for hub the cached
            snapshot, None while there is none; None for factory.
        factory: (module, attribute) of the code that builds the module: model_path's own for kind
            factory, `config.factory` for the other kinds, where given.
        module_file: the file of that module; None without a factory, or where the module has no
            file.
        repo_id, revision: of kind hub; revision None stands for the main branch.
        commit: of kind hub: the commit that the cached snapshot has; None while it is not cached.
        written: model_path as the config has it, for messages.
        base_dir: the absolute directory that relative paths start from.
        golden: the file of `verify.golden`, absolute; None without one.
    """

    kind: SourceKind
    loader: LoaderName
    path: Path | None = None
    factory: tuple[str, str] | None = None
    module_file: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    written: str = ""
    base_dir: Path = Path("/")
    golden: Path | None = None


def resolve_source(config: ModelConfig, fs: FileSystem | None = None) -> ModelSource:
    """Find out what `config.model_path` names, and which loader reads it.

    A file or directory that does not exist (yet) is no error here; `fingerprint` raises for it.

    Raises:
        WeightsNotFound: a package or a factory's module is not installed, nor beside the YAML file.
    """
    fs = fs or RealFileSystem()
    parsed = parse_model_path(config.model_path, config.model_type)
    base_dir = config.base_dir or Path.cwd()
    path, commit = _locate(parsed, config, fs)
    factory, module_file = _find_factory(parsed, config, base_dir, fs)
    return ModelSource(
        kind=parsed.kind,
        loader=_loader(parsed, config, path, fs),
        path=path,
        factory=factory,
        module_file=module_file,
        repo_id=parsed.repo_id,
        revision=parsed.revision,
        commit=commit,
        written=config.model_path,
        base_dir=base_dir,
        golden=config.golden_path,
    )


def _locate(
    parsed: ModelPath, config: ModelConfig, fs: FileSystem
) -> tuple[Path | None, str | None]:
    """The file or directory, and for the hub the commit of the cached snapshot."""
    if parsed.kind == "path":
        return Path(config.resolved_model_path), None
    if parsed.kind == "package" and parsed.package is not None:
        directory = package_directory(parsed.package)
        return (directory / parsed.path if parsed.path else directory), None
    if parsed.kind == "hub" and parsed.repo_id is not None:
        return cached_snapshot(parsed.repo_id, parsed.revision, fs)
    return None, None


def _loader(
    parsed: ModelPath, config: ModelConfig, path: Path | None, fs: FileSystem
) -> LoaderName:
    if config.model_type != "auto":
        return config.model_type
    if parsed.kind == "factory":
        return "custom"
    if parsed.kind == "hub" or (path is not None and is_file(path / "config.json", fs)):
        return "huggingface"
    return "pytorch"


def _find_factory(
    parsed: ModelPath, config: ModelConfig, base_dir: Path, fs: FileSystem
) -> tuple[tuple[str, str] | None, Path | None]:
    """The code that builds the module, and the file that it is in."""
    if parsed.kind == "factory" and parsed.module is not None and parsed.attribute is not None:
        module, attribute, key = parsed.module, parsed.attribute, "model_path"
    elif config.config.factory is not None:
        module, _, attribute = config.config.factory.partition(":")
        key = "config.factory"
    else:
        return None, None
    return (module, attribute), find_module_file(module, key, base_dir, fs)


def weights_files(source: ModelSource, fs: FileSystem | None = None) -> tuple[str, ...]:
    """The files whose change means a reload, absolute and sorted.

    For a directory: all files below it, except below names that start with a dot. With a factory,
    its module's file too. For a hub repository: none, because a revision names one content for
    good.

    Raises:
        WeightsNotFound: nothing is there, or it cannot be read (reason `WeightsUnreadable`).
    """
    return tuple(path for path, _ in _weights(source, fs or RealFileSystem()))


def fingerprint(source: ModelSource, fs: FileSystem | None = None) -> str:
    """Hex digest that changes whenever somebody writes to, replaces, adds or removes a weights
    file, or the golden one.

    Symlinks are followed, so that a swapped link counts as the change that it is. For the hub it
    covers the repository and the revision only: downloading what was not cached is no change.

    Raises:
        WeightsNotFound: nothing is there, or it cannot be read (reason `WeightsUnreadable`).
    """
    digest = hashlib.sha256()
    if source.kind == "hub":
        digest.update(f"{source.repo_id}@{source.revision or 'main'}\0".encode())
    root = str(source.path) if source.path is not None else ""
    for path, stat in _weights(source, fs or RealFileSystem()):
        name = os.path.relpath(path, root) if root else os.path.basename(path)
        digest.update(f"{name}\0{stat.fingerprint}\0".encode("utf-8", "surrogateescape"))
    if source.golden is not None:
        digest.update(f"golden\0{_golden(source.golden, fs or RealFileSystem())}\0".encode())
    return digest.hexdigest()


def _golden(path: Path, fs: FileSystem) -> object:
    """The fingerprint of a golden file: another one means that the version is to be verified again."""
    try:
        return fs.stat(str(path)).fingerprint
    except OSError as error:
        raise WeightsNotFound(f"verify.golden: {path}: {error.strerror or error}") from None


def estimate_mb(source: ModelSource, config: ModelConfig, fs: FileSystem | None = None) -> Estimate:
    """How much memory the weights will take, without loading them.

    What the files state exactly comes first, then `max_memory_mb`, then the files' size × 1.2. For
    code, and for a repository that is not in the cache, that leaves max_memory_mb or nothing.

    Raises:
        WeightsNotFound: nothing is there, or it cannot be read (reason `WeightsUnreadable`).
    """
    fs = fs or RealFileSystem()
    limit = config.max_memory_mb
    if source.path is None:
        if limit is None:
            return Estimate(None, "unknown until loaded")
        return Estimate(float(limit), "max_memory_mb")
    try:
        stated = stated_size(source.path, config.weights_dtype, fs)
        if stated is not None:
            return _with_copies(stated, source.path, config, fs)
        if limit is not None:
            return Estimate(float(limit), "max_memory_mb")
        return guessed_size(stat.size for _, stat in _files_below(str(source.path), fs))
    except OSError as error:
        _raise_not_found(error, source, str(source.path))


def _with_copies(stated: Estimate, path: Path, config: ModelConfig, fs: FileSystem) -> Estimate:
    """With the copies that `optimize` may make: packed of what is float32, and in bfloat16 to try that.

    Weights are packed on a processor; a device that is still open may be one.
    """
    if config.optimize not in ("freeze", "auto"):
        return stated
    lower = stated_size(path, "bfloat16", fs)
    if lower is None or stated.weights_mb is None or lower.weights_mb in (None, stated.weights_mb):
        return stated
    lower_mb = lower.weights_mb or 0.0
    copies = {}
    if config.device in ("auto", "cpu"):
        copies["packed"] = 2 * (stated.weights_mb - lower_mb)
    if config.optimize == "auto":
        copies["in bfloat16"] = lower_mb
    if not copies:
        return stated
    return Estimate(
        stated.weights_mb + sum(copies.values()),
        f"{stated.how}, and a copy {' and one '.join(copies)}",
    )


def _weights(source: ModelSource, fs: FileSystem) -> list[tuple[str, FileStat]]:
    found: list[tuple[str, FileStat]] = []
    place = source.path
    try:
        if place is not None and source.kind != "hub":
            found.extend(_files_below(str(place), fs))
        if source.module_file is not None:
            place = source.module_file
            found.append((str(place), fs.stat(str(place))))
    except OSError as error:
        _raise_not_found(error, source, str(place))
    if place is not None and source.kind != "hub" and not found:
        raise WeightsNotFound(f"the directory {place} has no files{_relative_to(source)}")
    return sorted(found)


def _files_below(path: str, fs: FileSystem) -> Iterator[tuple[str, FileStat]]:
    """The file itself, or all files below a directory; each directory once, whatever links say."""
    stat = fs.stat(path)
    if not stat.is_dir:
        yield path, stat
        return
    seen = {(stat.dev, stat.inode)}
    directories = [path]
    count = 0
    while directories:
        directory = directories.pop()
        for entry in fs.list_dir(directory):
            # Importing a model's own code writes bytecode below it: that is no change of the model.
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            child = os.path.join(directory, entry.name)
            stat = entry.stat or fs.stat(child)
            if not stat.is_dir:
                count += 1
                yield child, stat
            elif (stat.dev, stat.inode) not in seen:
                seen.add((stat.dev, stat.inode))
                directories.append(child)
        if count > MAX_WEIGHTS_FILES:
            raise WeightsNotFound(
                f"more than {MAX_WEIGHTS_FILES:,} files are below {path}: "
                "let model_path name the directory of the model alone",
                reason="TooManyFiles",
            )


def _raise_not_found(error: OSError, source: ModelSource, place: str) -> NoReturn:
    looked = error.filename if isinstance(error.filename, str) else place
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        raise WeightsNotFound(
            f"nothing is at {looked} (model_path {source.written}{_relative_to(source)})"
            f"{_meant(source) if looked == str(source.path) else ''}"
        ) from error
    raise WeightsNotFound(
        f"{looked} cannot be read: {error.strerror} "
        f"(model_path {source.written}{_relative_to(source)})",
        reason="WeightsUnreadable",
    ) from error


def _relative_to(source: ModelSource) -> str:
    if source.kind == "path" and not os.path.isabs(os.path.expanduser(source.written)):
        return f", relative to {source.base_dir}"
    return ""


def _meant(source: ModelSource) -> str:
    """What may have been meant instead: names that other tools take are paths here."""
    written = source.written
    if source.kind != "path":
        return ""
    if "://" in written:
        return "; nothing is downloaded from an address: let it name a file of this machine"
    if _LIKE_A_FILE.fullmatch(written):
        return ""
    module, dot, name = written.rpartition(".")
    if dot and all(part.isidentifier() for part in written.split(".")):
        return f"; if a class is meant, write `{module}:{name}`"
    if is_repository(written):
        return f"; if a repository of the Hugging Face hub is meant, write `hf:{written}`"
    return ""
