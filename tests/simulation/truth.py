"""What the desired directory really holds, and since when: the history that the oracle judges by.

`see` is called after every single change of the files, so nothing is missed between two looks of the
node. What changed in the middle of a look counts with both values, since the look may have seen either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from simulation.texts import ROOT, Meaning, meaning
from support.fake_fs import FakeFileSystem, _Node

T = TypeVar("T")

EPSILON_S = 1e-6
SUFFIXES = (".yaml", ".yml")
SERVER = "server.yaml"


@dataclass(frozen=True)
class Seen:
    """One file as it is: its bytes; None where the link leads nowhere."""

    data: bytes | None
    mark: object
    unreadable: bool = False

    def meaning(self, name: str) -> Meaning | None:
        if self.data is None:
            return None
        directory = f"{ROOT}/{name}".rpartition("/")[0]
        return meaning(directory, self.data)


class History(Generic[T]):
    """One value, since when it has been so, and what it was before if it changed during a look.

    What changes and changes back at the same instant has not changed: nobody could have seen it.
    """

    def __init__(self, value: T, t: float) -> None:
        self.value = value
        self.since = t
        self.before: tuple[T, float] | None = None
        self._changed_at = t
        self._until_then: tuple[T, float] = (value, t)
        self._met: tuple[T, float] | None = None

    def set(self, value: T, t: float, *, in_look: bool) -> None:
        if value == self.value:
            return
        if not in_look:
            self.before = None
        elif self.before is None:
            self.before = (self.value, self.since)
        if t > self._changed_at:
            self._changed_at = t
            self._until_then = (self.value, self.since)
        self.value = value
        back = not in_look and value == self._until_then[0]
        self.since = self._until_then[1] if back else t

    def meet(self) -> None:
        """A look begins. If it meets what the last one met, nobody has seen what was in between."""
        if self._met is not None and self._met[0] == self.value:
            self.since = min(self.since, self._met[1])
        self._met = (self.value, self.since)

    def meet_first(self) -> None:
        """A look begins, and what the last one met is not what this one meets."""
        self._met = (self.value, self.since)

    def throughout(self, t: float, window_s: float) -> list[T]:
        """The values of which one, at least, may have been seen at all looks of the last `window_s`."""
        found = []
        if self.since <= t - window_s + EPSILON_S:
            found.append(self.value)
        if self.before is not None and self.before[1] <= t - window_s + EPSILON_S:
            found.append(self.before[0])
        return found


@dataclass
class Truth:
    """See the module's text.

    Attributes:
        files: by relative path, every file that ever was there; None while it is not.
        whole: what the looks met: (identity of the directory, it can be listed completely); identity
            None if it is gone.
        marks: fingerprint of each file now; a file that was touched has another one.
        unreadable: files that could not be read from the beginning of the last look to its end.
    """

    fs: FakeFileSystem
    t: float = 0.0
    in_look: bool = False
    files: dict[str, History[bytes | str | None]] = field(default_factory=dict)
    whole: History[tuple[object, bool]] = field(default_factory=lambda: History((None, False), 0.0))
    marks: dict[str, object] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    _met: dict[str, object] = field(default_factory=dict)

    def see(self, t: float) -> None:
        """The files may have changed.

        That something cannot be seen counts for those who look; what it is it is all the same, and a
        file whose fingerprint is the same before and after an outage has not changed in it.
        """
        self.t = t
        root, complete, present = walk(self.fs)
        if self.in_look:
            self.whole.set((root, complete), t, in_look=True)
        for name in present.keys() - self.files.keys():
            self.files[name] = History(None, -1e9)
        if root is None:
            return  # nobody can say what the files are meanwhile
        for name, history in self.files.items():
            if not complete and name not in present:
                continue
            seen = present.get(name)
            value: bytes | str | None = None
            if seen is not None:
                value = seen.data if seen.data is not None else str(seen.mark)
            history.set(value, t, in_look=self.in_look)
        self.marks = {name: seen.mark for name, seen in present.items()}
        if self.in_look:
            self.unreadable &= {name for name, seen in present.items() if seen.unreadable}

    def begin_look(self, t: float) -> None:
        """A look begins, which sees what cannot be seen."""
        self.in_look = True
        self.unreadable = {name for name, seen in walk(self.fs)[2].items() if seen.unreadable}
        self.see(t)
        for name, history in self.files.items():
            history.before = None
            # The same inode, size and times again (an inode is used again): nobody can tell that the
            # file was away in between.
            mark = self.marks.get(name)
            if mark is not None and mark == self._met.get(name):
                history.meet()
            else:
                history.meet_first()
        self._met = dict(self.marks)
        self.whole.before = None

    def end_look(self) -> None:
        self.in_look = False


def walk(fs: FakeFileSystem) -> tuple[object, bool, dict[str, Seen]]:
    """Identity of the directory, whether all of it can be listed, and its model files."""
    faults = fs._faults
    try:
        root = fs._follow(ROOT)
    except OSError:
        return None, False, {}
    if ROOT in faults or root.kind != "dir":
        return None, False, {}
    files: dict[str, Seen] = {}
    complete = _walk(fs, "", root, files)
    return (fs.dev, root.inode), complete, files


def _walk(fs: FakeFileSystem, directory: str, node: _Node, files: dict[str, Seen]) -> bool:
    complete = True
    for name, found in node.children.items():
        if name[0] == ".":
            continue
        path = f"{directory}/{name}" if directory else name
        child = found
        if found.kind == "link":
            try:
                child = fs._follow(f"{ROOT}/{path}")
            except OSError:
                if name.endswith(SUFFIXES):
                    files[path] = Seen(None, "dangling")
                continue
        unreadable = f"{ROOT}/{path}" in fs._faults
        if child.kind == "dir":
            complete = complete and not unreadable
            if not unreadable:
                complete = _walk(fs, path, child, files) and complete
        elif name.endswith(SUFFIXES) and path != SERVER:
            mark = (child.inode, len(child.data), child.mtime_ns, child.ctime_ns)
            files[path] = Seen(child.data, mark, unreadable)
    return complete
