"""What the weights files really are, and since when: what stands still for settle_s may be loaded."""

from __future__ import annotations

from simulation.machine import Machine

PLACES = ("m0.pt", "m1.pt", "m2.pt", "m3.pt", "m4.pt", "shared.pt", "dir", "link.pt")
"""What is behind the model_paths of all documents, below `WEIGHTS`."""

WEIGHTS = "/weights"


class WeightsTruth:
    """See the module's text. To be told of every change."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._since: dict[str, tuple[object, float]] = {}

    def changed(self) -> None:
        """Some of the files may have changed."""
        for place in PLACES:
            path = f"{WEIGHTS}/{place}"
            mark = self._mark(path)
            before = self._since.get(path)
            if before is None or before[0] != mark:
                self._since[path] = (mark, self._machine.t)

    def since(self, model_path: str) -> float | None:
        """Since when what is there has been there; None for a place that never held anything."""
        found = self._since.get(model_path)
        return found[1] if found is not None else None

    def _mark(self, path: str) -> object:
        fs = self._machine.fs
        try:
            node = fs._follow(path)
        except OSError:
            return None
        parts = [("", node), *sorted(node.children.items())]
        return [(name, n.inode, n.data, n.mtime_ns, n.ctime_ns) for name, n in parts]
