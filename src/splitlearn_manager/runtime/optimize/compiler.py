"""torch's compiler, used by one load at a time, with a cache of the node's own.

torch takes the directory of its cache from the environment each time that it looks, so it is set for as
long as a load compiles, and only then: two nodes in one process keep apart. Whoever has named a directory
there himself is left in peace. What was compiled is found there by the next load of the same model on the
same kind of machine, in this process or another.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class Compiler:
    """The compiler of this process."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @contextmanager
    def turn(self, cache_dir: Path | None) -> Iterator[None]:
        """Be the only one who compiles or exports, until the block ends.

        Args:
            cache_dir: where compiled code is kept; None: where torch keeps it by default.
        """
        with self._turn, _environment(cache_dir), _quietly():
            yield


@contextmanager
def _environment(cache_dir: Path | None) -> Iterator[None]:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its own default there, which is nobody's wish.
    theirs = os.environ.get(_CACHE)
    if theirs == default_cache_dir():
        theirs = None
    if theirs is None and cache_dir is not None:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[_CACHE] = str(cache_dir)
    try:
        yield
    finally:
        if theirs is None:
            os.environ.pop(_CACHE, None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warnings and logs: what fails is told by the error, in one line."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def missing_compiler() -> str | None:
    """The name of the C++ compiler that torch would use on the CPU, if this machine has none of it."""
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    command = next(iter(shlex.split(wanted)), wanted)
    return None if shutil.which(command) else command


COMPILER = Compiler()
"""One for the process, because torch's is."""
