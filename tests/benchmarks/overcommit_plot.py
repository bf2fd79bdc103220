"""The picture of docs/memory.md: a day with more models than fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NODE: dict[str, Any] = {"color": "#1f5f8b", "linewidth": 1.6}
BESIDE: dict[str, Any] = {"color": "#4f9d69", "linewidth": 1.3}
PLAIN: dict[str, Any] = {"color": "#c98a1b", "linewidth": 1.3}
LIMIT: dict[str, Any] = {"color": "#b3402a", "linestyle": "--", "linewidth": 1}

_WINDOW_S = 2.0


class Sample(Protocol):
    """The node at one moment; counts are since it started."""

    @property
    def at_s(self) -> float: ...
    @property
    def rss_mb(self) -> float: ...
    @property
    def reserved_mb(self) -> float: ...
    @property
    def resident(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def answered(self) -> int: ...
    @property
    def waited(self) -> int: ...


class Day(Protocol):
    """What is drawn. MB; `base_mb` is the RSS without models."""

    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def base_mb(self) -> float: ...
    @property
    def quota_mb(self) -> float: ...


def draw(day: Day, path: Path) -> None:
    """Writes the picture; the format is that of the name's ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "overcommit", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(3, 1, figsize=(10, 8), layout="constrained", sharex=True)
    figure.suptitle(
        "50 models of 100 MB, room for 12, 8 clients that ask by a Zipf law", fontsize=12
    )
    begin_s = day.samples[0].at_s
    at_s = [sample.at_s - begin_s for sample in day.samples]
    for panel, drawn in zip(panels, (_memory, _resident, _requests), strict=True):
        drawn(panel, at_s, day)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8, frameon=False, loc="lower right")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("seconds")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


def _memory(panel: Axes, at_s: Sequence[float], day: Day) -> None:
    panel.set_title("Memory of the models", loc="left", fontsize=10)
    panel.set_ylabel("MB")
    panel.axhline(day.quota_mb, label="quota", **LIMIT)
    panel.plot(at_s, [s.reserved_mb for s in day.samples], label="reserved", **NODE)
    grown = [s.rss_mb - day.base_mb for s in day.samples]
    panel.plot(at_s, grown, label="RSS, less that of the node without models", **PLAIN)


def _resident(panel: Axes, at_s: Sequence[float], day: Day) -> None:
    panel.set_title("The resident set, and who goes", loc="left", fontsize=10)
    panel.set_ylabel("models, evictions a second")
    panel.plot(at_s, [s.resident for s in day.samples], label="models that serve", **NODE)
    evictions = [s.evictions for s in day.samples]
    panel.plot(at_s, _a_second(at_s, evictions), label="evictions a second", **PLAIN)


def _requests(panel: Axes, at_s: Sequence[float], day: Day) -> None:
    panel.set_title("Requests", loc="left", fontsize=10)
    panel.set_ylabel("a second")
    answered = [s.answered for s in day.samples]
    waited = [s.waited for s in day.samples]
    panel.plot(at_s, _a_second(at_s, answered), label="answered", **NODE)
    panel.plot(at_s, _a_second(at_s, waited), label="of these, after a wait for a load", **BESIDE)


def _a_second(at_s: Sequence[float], counts: Sequence[int]) -> list[float]:
    """How fast a count grew at each moment, over the window before it."""
    rates, first = [], 0
    for number, (now_s, count) in enumerate(zip(at_s, counts, strict=True)):
        while first < number and now_s - at_s[first] > _WINDOW_S:
            first += 1
        elapsed_s = now_s - at_s[first]
        rates.append((count - counts[first]) / elapsed_s if elapsed_s > 0 else 0.0)
    return rates
