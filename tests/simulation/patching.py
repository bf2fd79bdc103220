"""Replacing an attribute of the product for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` until the end of the block; a module may hide a built-in by it."""
    nothing = object()
    before = vars(owner).get(name, nothing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is nothing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
