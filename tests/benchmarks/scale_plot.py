"""The picture of docs/scale.md: cost against the number of files, with lines of linear growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

MARKS = {"color": "#1f5f8b", "marker": "o", "markersize": 5, "linewidth": 1.8}
GUIDE = {"color": "#9a9a9a", "linestyle": "--", "linewidth": 1}
GOAL = {"color": "#b3402a", "linewidth": 1, "alpha": 0.8}


class Point(Protocol):
    """What is drawn of one directory."""

    files: int
    first_start_s: float
    turn_s: float
    steady_percent: float
    edit_s: float
    rss_mb: float
    base_mb: float


def draw(rows: Sequence[Point], path: Path) -> None:
    """Writes the picture; the format is that of the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "scale", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(12.5, 3.4), layout="constrained")
    files = [row.files for row in rows]
    growth = [max(row.rss_mb - row.base_mb, 0.05) for row in rows]
    drawn = (
        ("First start, seconds", [row.first_start_s for row in rows], 20.0, True),
        ("Memory over the base process, MB", growth, 15.0 * files[-1] / 1024, True),
        ("One turn of the loop, ms", [1000 * row.turn_s for row in rows], None, True),
        ("Edit to acceptance, slowest, ms", [1000 * row.edit_s for row in rows], 600.0, False),
    )
    for panel, (title, values, goal, grows) in zip(panels, drawn, strict=True):
        panel.loglog(files, values, label="measured", **MARKS)
        if grows:
            through = values[-1]
            panel.loglog(
                files, [through * n / files[-1] for n in files], label="slope 1: linear", **GUIDE
            )
        if goal is not None:
            panel.axhline(goal, label=f"goal at {files[-1]:,} files", **GOAL)
        panel.set_title(title, fontsize=9.5, loc="left")
        panel.set_xlabel("files")
        panel.set_xticks(files, [f"{n:,}" for n in files])
        panel.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        panel.grid(which="both", color="#e4e4e4", linewidth=0.6)
        panel.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
