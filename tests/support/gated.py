"""A model that says by files when it has begun, and goes on when a test lets it; in any process.

    gate = Gate(tmp_path / "gate")
    gate.write_factory(directory)       # gated.py, with `slow`, `slow_to_build` and `raising`
    …
    gate.wait_begun(8)                  # eight forward passes are under way
    gate.release()                      # all of them, and all later ones, go on

`slow` answers twice its input. Each forward pass leaves one file, so `begun` also counts the work done.
"""

from __future__ import annotations

from pathlib import Path

from support.waiting import eventually

_FACTORY = '''
import threading
import uuid
from pathlib import Path

from torch import nn


def hold(folder):
    """Says that it has begun, and waits to be released, at most a minute."""
    folder = Path(folder)
    (folder / f"begun-{uuid.uuid4().hex}").touch()
    pause = threading.Event()
    for _ in range(6000):
        if (folder / "released").exists():
            return
        pause.wait(0.01)
    raise TimeoutError("the test never released the gate")


class Slow(nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(1, 1).weight.detach() * 0 + 2)
        self.folder = folder

    def forward(self, x):
        hold(self.folder)
        return x * self.scale[0, 0]


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        raise ArithmeticError("the sum does not come out")


def slow(folder):
    return Slow(folder)


def slow_to_build(folder):
    hold(folder)
    return nn.Identity()


def raising():
    return Raising()
'''


class Gate:
    """One folder through which a test and the models talk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write_factory(self, directory: Path) -> None:
        """Puts gated.py into `directory`."""
        (directory / "gated.py").write_text(_FACTORY)

    @property
    def config(self) -> dict[str, object]:
        """The `config` of a model of `slow` or `slow_to_build`."""
        return {"kwargs": {"folder": str(self.folder)}}

    @property
    def begun(self) -> int:
        """How many have begun so far."""
        return sum(1 for _ in self.folder.glob("begun-*"))

    def wait_begun(self, count: int) -> None:
        eventually(lambda: self.begun >= count, f"{count} have begun")
        assert self.begun == count

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        # Also where a test failed: whoever waits for the model's answer would wait a minute.
        self.release()

    def release(self) -> None:
        """Lets all go on, now and later."""
        (self.folder / "released").touch()
