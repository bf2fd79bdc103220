"""Makes a package's public names importable without importing what defines them until they are used.

`import splitlearn_comm` therefore loads neither torch nor grpc. A package calls `lazy_exports` once
with a map from public name to the module that defines it; this module never decides which names are
public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` (PEP 562) of a package.

    Args:
        package: the package's `__name__`.
        modules: public name → the full name of the module that defines it.
    """

    def getattr_(name: str) -> object:
        module = modules.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module), name)

    def dir_() -> list[str]:
        return sorted(modules)

    return getattr_, dir_
