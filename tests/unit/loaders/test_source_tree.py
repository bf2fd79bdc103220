"""The code of a model's directory, apart from all others."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from splitlearn_manager.core.loaders.source_tree import SourceTree


def test_code_is_forgotten_while_other_threads_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail in a storm of loads: `dictionary changed size during iteration`, memory not returned."""
    (tmp_path / "net.py").write_text("WIDTH = 4\n")
    tree = SourceTree(tmp_path)
    own = tree.load("net").__name__
    others: list[str] = []

    class Name(str):
        """Whoever compares it comes upon an import that has happened meanwhile."""

        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            others.append(f"imported_meanwhile_{len(others)}")
            monkeypatch.setitem(sys.modules, others[-1], ModuleType(others[-1]))
            return str.__eq__(self, other)

    tree.name = Name(tree.name)
    tree.forget()
    assert others
    assert own not in sys.modules
    assert str(tree.name) not in sys.modules
    assert tree not in sys.meta_path
