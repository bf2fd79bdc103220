"""A desired directory in memory with a clock of its own: write files, look, let time pass."""

from __future__ import annotations

from dataclasses import replace

from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import NO_INSTRUCTIONS, DesiredModel, DesiredState
from support.fake_fs import FakeFileSystem

ROOT = "/desired"
WEIGHTS = "/weights/m.pt"
SETTLE_S = 0.25


def model(model_id: str, **keys: object) -> bytes:
    """One document that declares `model_id`."""
    lines = {"model_id": model_id, "model_path": WEIGHTS, **keys}
    return "".join(f"{key}: {value}\n" for key, value in lines.items()).encode()


class DesiredLab:
    """The root is /desired; the weights at /weights/m.pt exist."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self.fs = FakeFileSystem()
        self.fs.mkdir(ROOT)
        self.fs.mkdir("/weights")
        self.fs.write(WEIGHTS, b"weights")
        self.now = 100.0
        self.settle_s = settle_s
        self.source = DesiredSource(ROOT, self.fs, settle_s)
        self.instructions = NO_INSTRUCTIONS
        self.recorded: tuple[DesiredModel, ...] = ()
        """What a node would have written down after the last look."""

    def path(self, name: str) -> str:
        return f"{ROOT}/{name}"

    def write(self, name: str, *documents: bytes) -> None:
        """Write a file in place."""
        self.fs.write(self.path(name), b"---\n".join(documents))

    def delete(self, name: str) -> None:
        self.fs.delete(self.path(name))

    def rename(self, old: str, new: str) -> None:
        self.fs.rename(self.path(old), self.path(new))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.fs.advance(seconds)

    def look(self, after: float = 0.0) -> DesiredState:
        """Look once, `after` seconds from now."""
        self.pass_time(after)
        state = self.source.look(self.now, self.instructions)
        self.recorded = (*state.models.values(), *state.undecided.values())
        return state

    def restart(self) -> None:
        """A new process, which knows what the old one had written down after its last look."""
        self.source = DesiredSource(ROOT, self.fs, self.settle_s)
        self.source.restore(self.recorded)

    def confirm(self, digest: str) -> None:
        self.instructions = replace(self.instructions, confirmed_prune=digest)

    def suspend(self, *model_ids: str) -> None:
        """Suspend these and no others."""
        self.instructions = replace(self.instructions, suspended=frozenset(model_ids))

    def settle(self, limit: int = 20) -> DesiredState:
        """Look as often as the state asks for, as the loop does, until nothing is pending."""
        state = self.look()
        for _ in range(limit):
            if state.next_check_s is None:
                return state
            state = self.look(after=state.next_check_s)
        raise AssertionError(f"still pending after {limit} looks: {state}")

    def accept(self, **files: bytes) -> DesiredState:
        """Write `name=content` as name.yaml, a moment after the last look, and settle."""
        self.pass_time(1.0)
        for name, content in files.items():
            self.write(f"{name}.yaml", content)
        return self.settle()
