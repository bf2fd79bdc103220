"""Runs the Python files of one directory as if they were a program of their own, apart from all others.

A tree is a package with a name that nothing else has. `import helper` in one of its files means the
`helper.py` beside it, if there is one, else whatever is installed; so do `from helper import x` and imports
inside functions that run later. The standard library always comes first. Nothing is put on `sys.path`, and
nothing is replaced in `sys.modules`: a tree's modules are entered there under the tree's own name.

Source is compiled anew each time, without `__pycache__`.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType

_PREFIX = "splitlearn_user_code_"


class SourceTree:
    """The Python files below one directory, until `forget`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._elsewhere: set[str] = set()
        self.name = f"{_PREFIX}{uuid.uuid4().hex}"
        self._builtins = dict(vars(builtins), __import__=self._import)
        package = ModuleType(self.name)
        package.__path__ = [str(root)]
        sys.modules[self.name] = package
        sys.meta_path.insert(0, self)

    def load(self, module: str) -> ModuleType:
        """Run the module of that dotted name, counted from the root, and what it imports."""
        return importlib.import_module(f"{self.name}.{module}")

    def forget(self) -> None:
        """Remove all traces; modules that are still in use stay usable, but import nothing more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in list(sys.modules):  # copied at once: other threads import meanwhile
            if name == self.name or name.startswith(f"{self.name}."):
                sys.modules.pop(name, None)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's import system asks here for every module; only the tree's own are answered."""
        if not fullname.startswith(f"{self.name}."):
            return None
        namespace: list[str] = []
        for place in path or ():
            # Made anew, because a FileFinder remembers the directory's listing for a second.
            finder = FileFinder(
                place, (_FreshSource, [".py"]), (ExtensionFileLoader, EXTENSION_SUFFIXES)
            )
            spec = finder.find_spec(fullname)
            if spec is not None and spec.loader is not None:
                if isinstance(spec.loader, _FreshSource):
                    spec.loader.tree_builtins = self._builtins
                return spec
            if spec is not None:
                namespace.extend(spec.submodule_search_locations or ())
        if not namespace:
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = namespace
        return spec

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """What `import` statements of the tree's modules call, and what C++ code imports for them.

        The disk is asked once for each name that was found elsewhere: looking lets other threads
        run, and code of torch that imports torch must not be interrupted (see `torch_setup`).
        """
        top_level = name.partition(".")[0]
        if level or top_level in self._elsewhere or not self._has(top_level):
            found = builtins.__import__(name, globals, locals, fromlist or (), level)
            if not level:
                self._elsewhere.add(top_level)
            return found
        inside = builtins.__import__(f"{self.name}.{name}", globals, locals, fromlist or (), 0)
        # `import a.b` binds `a`, and so does Python: the first part, here the one below the tree.
        return inside if fromlist else sys.modules[f"{self.name}.{top_level}"]

    def _has(self, top_level: str) -> bool:
        if not top_level or top_level in sys.stdlib_module_names:
            return False
        below = self._root / top_level
        return below.with_name(f"{top_level}.py").is_file() or (below / "__init__.py").is_file()


class _FreshSource(SourceFileLoader):
    """Compiles a source file each time, and gives the module the tree's own `import`."""

    tree_builtins: Mapping[str, object]

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code = self.source_to_code(self.get_data(path), path)
        assert isinstance(code, CodeType)
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self.tree_builtins
        super().exec_module(module)
