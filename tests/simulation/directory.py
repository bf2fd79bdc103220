"""The desired directory as people and machines fill it: by hand, as a mounted ConfigMap, by git-sync.

By hand, each write is one to the file itself. The other two write a whole new revision beside the old
one and then turn a link, as kubelet and git-sync do; here each change of one file makes a revision, with
a moment in which the old one, or a link to nothing, can still be seen.

`changed` is called after each single change, so that whoever keeps history misses nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from simulation.machine import Machine
from simulation.texts import ROOT

AWAY = "/away"


class Directory:
    """See the module's text. What cannot be done (a missing parent, say) is left undone.

    Args:
        layout: plain, configmap or git.
    """

    def __init__(self, machine: Machine, layout: str, changed: Callable[[], None]) -> None:
        self._machine = machine
        self._fs = machine.fs
        self._layout = layout
        self._changed = changed
        self._content: dict[str, bytes] = {}
        self._revision = 0
        if layout == "plain":
            self._fs.mkdir(ROOT)
        elif layout == "configmap":
            self._fs.mkdir(ROOT)
            self._publish(0.0)
        else:
            self._fs.mkdir("/git")
            self._publish(0.0)

    @property
    def by_hand(self) -> bool:
        return self._layout == "plain"

    # Single files.

    def write(self, name: str, data: bytes, *, anew: bool = False) -> None:
        if self.by_hand:
            self._make_parent(name)
            write = self._fs.replace if anew else self._fs.write
            self._do(lambda: write(_at(name), data))
        else:
            self._content[name] = data
            self._publish(0.05)

    def tear(self, name: str, data: bytes, share: float, rest_after_s: float) -> None:
        """Writes the beginning; the rest follows, unless somebody wrote the file meanwhile."""
        if not self.by_hand:
            self._content[name] = data
            self._publish(rest_after_s)
            return
        beginning = data[: int(len(data) * share)]
        self.write(name, beginning)

        def rest() -> None:
            if self.content(name) == beginning:
                self.write(name, data)

        self._machine.later(rest_after_s, rest)

    def lie(self, name: str, data: bytes) -> None:
        """Other content of the same size, with the mtime that the file had."""
        before = self.content(name)
        if not self.by_hand or before is None:
            self.write(name, data)
            return
        mtime_ns = self._fs._follow(_at(name)).mtime_ns
        self._do(lambda: self._fs.write(_at(name), data + b"#" * (len(before) - len(data))))
        self._do(lambda: self._fs.touch(_at(name), mtime_ns))

    def delete(self, name: str) -> None:
        if self.by_hand:
            self._do(lambda: self._fs.delete(_at(name)))
        elif self._content.pop(name, None) is not None:
            self._publish(0.05)

    def rename(self, old: str, new: str) -> None:
        if self.by_hand:
            self._make_parent(new)
            if self.content(old) is not None:
                self._do(lambda: self._fs.rename(_at(old), _at(new)))
        elif old in self._content:
            self._content[new] = self._content.pop(old)
            self._publish(0.05)

    def touch(self, name: str, mtime_ns: int | None) -> None:
        if self.by_hand:
            self._do(lambda: self._fs.touch(_at(name), mtime_ns))
        else:
            self._publish(0.05)

    def dangle(self, name: str) -> None:
        if self.by_hand:
            self._make_parent(name)
            self._do(lambda: self._fs.delete(_at(name)))
            self._do(lambda: self._fs.symlink("/nowhere", _at(name)))

    def content(self, name: str) -> bytes | None:
        if not self.by_hand:
            return self._content.get(name)
        try:
            return self._fs.content(_at(name))
        except OSError:
            return None

    def names(self) -> list[str]:
        """The model files and server.yaml that are there, whatever they lead to."""
        if not self.by_hand:
            return sorted(self._content)
        found = []
        for directory in ("", "sub"):
            try:
                children = self._fs._follow(_at(directory)).children
            except OSError:
                continue
            found += [
                f"{directory}/{n}".lstrip("/") for n, c in children.items() if c.kind != "dir"
            ]
        return sorted(n for n in found if n.endswith((".yaml", ".yml")) and n[0] != ".")

    # The whole directory.

    @property
    def is_away(self) -> bool:
        return self._there(AWAY)

    def move_away(self) -> None:
        if self._fs.exists(ROOT) and not self._there(AWAY):
            self._do(lambda: self._fs.rename(ROOT, AWAY))

    def move_back(self) -> None:
        if self._there(AWAY):
            self._do(lambda: self._fs.delete(ROOT))
            self._do(lambda: self._fs.rename(AWAY, ROOT))

    def delete_root(self) -> dict[str, bytes]:
        """Deletes all of it, and gives what the files held."""
        if not self.by_hand:
            held = dict(self._content)
            self._content.clear()
            self._publish(0.0)
            return held
        held = {n: c for n in self.names() if (c := self.content(n)) is not None}
        self._do(lambda: self._fs.delete(ROOT))
        return held

    def make_root(self) -> None:
        if not self._there(ROOT):
            self._do(lambda: self._fs.mkdir(ROOT))

    def replace_by_empty(self) -> None:
        self.delete_root()
        self.make_root()

    # Revisions.

    def _publish(self, gap_s: float) -> None:
        """Writes all content as a new revision, and turns the link to it."""
        self._revision += 1
        number, old = self._revision, self._revision - 1
        if self._layout == "configmap":
            self._publish_configmap(number, old, gap_s)
        else:
            self._publish_checkout(number, old, gap_s)

    def _publish_configmap(self, number: int, old: int, gap_s: float) -> None:
        place = f"{ROOT}/..{number}"
        content = {name.replace("/", "-"): data for name, data in self._content.items()}
        self._do(lambda: self._fs.mkdir(place))
        for name, data in content.items():
            self._do(lambda n=name, d=data: self._fs.write(f"{place}/{n}", d))
        self._do(lambda: self._fs.symlink(f"..{number}", f"{ROOT}/..data"))

        def tidy() -> None:
            if number != self._revision or not self._fs.exists(ROOT):
                return
            shown = set(self._fs._follow(ROOT).children)
            for name in sorted(content.keys() - shown):
                self._do(lambda n=name: self._fs.symlink(f"..data/{n}", f"{ROOT}/{n}"))
            for name in sorted(n for n in shown - content.keys() if not n.startswith("..")):
                self._do(lambda n=name: self._fs.delete(f"{ROOT}/{n}"))
            for name in sorted(n for n in shown if n.startswith("..") and n != "..data"):
                if name != f"..{number}":
                    self._do(lambda n=name: self._fs.delete(f"{ROOT}/{n}"))

        self._after(gap_s, tidy)

    def _publish_checkout(self, number: int, old: int, gap_s: float) -> None:
        place = f"/git/{number}"
        self._do(lambda: self._fs.mkdir(place))
        self._do(lambda: self._fs.mkdir(f"{place}/sub"))
        for name, data in self._content.items():
            self._do(lambda n=name, d=data: self._fs.write(f"{place}/{n}", d))

        def turn() -> None:
            link = AWAY if self._there(AWAY) else ROOT
            if number == self._revision:
                self._do(lambda: self._fs.symlink(place, link))
            self._after(gap_s, lambda: self._do(lambda: self._fs.delete(f"/git/{old}")))

        self._after(gap_s, turn)

    def _after(self, gap_s: float, do: Callable[[], None]) -> None:
        if gap_s:
            self._machine.later(gap_s, do)
        else:
            do()

    # Inside.

    def _make_parent(self, name: str) -> None:
        parent = _at(name).rpartition("/")[0]
        if parent != ROOT and self._fs.exists(ROOT) and not self._fs.exists(parent):
            self._do(lambda: self._fs.mkdir(parent))

    def _there(self, path: str) -> bool:
        """Whether the name is taken, be it by a link to nowhere."""
        return path.removeprefix("/") in self._fs._root.children

    def _do(self, change: Callable[[], None]) -> None:
        try:
            change()
        except (OSError, KeyError):
            return
        self._changed()


def _at(name: str) -> str:
    return f"{ROOT}/{name}" if name else ROOT
