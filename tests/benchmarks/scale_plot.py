"""The picture of docs/scale.md: cost against the number of files, with lines of linear growth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOALS_AT = 10_000
GOAL_FIRST_START_S = 20.0
GOAL_STEADY_PERCENT = 1.5
GOAL_EDIT_S = 0.6
GOAL_KB_A_FILE = 15.0

NODE: dict[str, Any] = {"color": "#1f5f8b", "marker": "o", "markersize": 5, "linewidth": 1.8}
BESIDE: dict[str, Any] = {"color": "#4f9d69", "marker": "s", "markersize": 4, "linewidth": 1.4}
PLAIN: dict[str, Any] = {"color": "#c98a1b", "marker": "^", "markersize": 4, "linewidth": 1.4}
GUIDE: dict[str, Any] = {"color": "#9a9a9a", "linestyle": ":", "linewidth": 1.2}
GOAL: dict[str, Any] = {"color": "#b3402a", "linestyle": "--", "linewidth": 1}


class Point(Protocol):
    """What is drawn of one directory. Seconds, percent of one core, MB."""

    files: int
    parse_alone_s: float
    look_alone_s: float
    first_start_s: float
    restart_s: float
    steady_percent: float
    edits_s: tuple[float, ...]
    rss_mb: float
    base_mb: float


def draw(rows: Sequence[Point], path: Path) -> None:
    """Writes the picture; the format is that of the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "scale", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(
        "What a directory of 100 to 10,000 model files costs a node on 2 cores", fontsize=12
    )
    files = [row.files for row in rows]
    for panel, drawn in zip(panels.flat, (_starts, _memory, _steady, _edits), strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        drawn(panel, rows)
        panel.set_xlabel("files in the directory")
        panel.set_xticks(files, [f"{n:,}" for n in files])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(which="major", color="#dddddd", linewidth=0.7)
        panel.grid(which="minor", color="#f0f0f0", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


def _starts(panel: Axes, rows: Sequence[Point]) -> None:
    panel.set_title("Start, until all is read and decided", loc="left", fontsize=10)
    panel.set_ylabel("seconds")
    files = [row.files for row in rows]
    panel.plot(files, [row.first_start_s for row in rows], label="first start", **NODE)
    panel.plot(files, [row.restart_s for row in rows], label="restart, files unchanged", **BESIDE)
    alone = [row.parse_alone_s for row in rows]
    panel.plot(files, alone, label="ruamel.yaml alone, same files", **PLAIN)
    _linear(panel, files, alone[-1])
    _goal(panel, GOAL_FIRST_START_S, f"goal: first start ≤ {GOAL_FIRST_START_S:g} s")


def _memory(panel: Axes, rows: Sequence[Point]) -> None:
    panel.set_title("Memory beyond that of a node with 2 files", loc="left", fontsize=10)
    panel.set_ylabel("MB")
    files = [row.files for row in rows]
    growth = [max(row.rss_mb - row.base_mb, 0.1) for row in rows]
    panel.plot(files, growth, label="measured", **NODE)
    _linear(panel, files, growth[-1])
    goal = [GOAL_KB_A_FILE * n / 1024 for n in files]
    panel.plot(files, goal, label=f"goal: ≤ {GOAL_KB_A_FILE:g} KB a file", **GOAL)


def _steady(panel: Axes, rows: Sequence[Point]) -> None:
    panel.set_title("CPU while nothing changes", loc="left", fontsize=10)
    panel.set_ylabel("percent of one core")
    files = [row.files for row in rows]
    panel.plot(files, [row.steady_percent for row in rows], label="the whole node", **NODE)
    alone = [100 * row.look_alone_s for row in rows]
    panel.plot(files, alone, label="a listing and a stat a file, each second", **PLAIN)
    _linear(panel, files, alone[-1])
    _goal(panel, GOAL_STEADY_PERCENT, f"goal: ≤ {GOAL_STEADY_PERCENT:g} %")


def _edits(panel: Axes, rows: Sequence[Point]) -> None:
    panel.set_title("From an edit to its acceptance", loc="left", fontsize=10)
    panel.set_ylabel("milliseconds")
    files = [row.files for row in rows]
    slowest = [1000 * max(row.edits_s) for row in rows]
    median = [1000 * statistics.median(row.edits_s) for row in rows]
    panel.plot(files, slowest, label="slowest of 20", **NODE)
    panel.plot(files, median, label="median", **BESIDE)
    panel.axhline(
        250, label="settle_s: so long a file must stand still", **{**GUIDE, "linestyle": "-."}
    )
    _goal(panel, 1000 * GOAL_EDIT_S, f"goal: ≤ {1000 * GOAL_EDIT_S:g} ms")
    panel.set_ylim(200, 1.4 * max(1000 * GOAL_EDIT_S, *slowest))
    panel.set_yticks([200, 250, 300, 400, 500, 600, 800, 1000])


def _linear(panel: Axes, files: Sequence[int], largest: float) -> None:
    panel.plot(files, [largest * n / files[-1] for n in files], label="linear growth", **GUIDE)


def _goal(panel: Axes, value: float, label: str) -> None:
    panel.axhline(value, label=f"{label} ({GOALS_AT:,} files)", **GOAL)
