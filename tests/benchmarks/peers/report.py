"""The tables and the picture of docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

COLORS = {
    "ours": "#1f5f8b",
    "ours, streams": "#7fb2d6",
    "ours, freeze": "#16324f",
    "ours, directory": "#3fa7a0",
    "mosec": "#c98a1b",
    "LitServe": "#b3402a",
    "MLServer": "#4f7f4f",
    "MLServer, bytes": "#a3c79d",
    "Triton": "#6d5a94",
}
_WAYS = ("ours", "ours, freeze", "ours, directory")
VERSIONS = {
    "mosec": "mosec 0.9.8",
    "LitServe": "LitServe 0.2.19",
    "MLServer": "MLServer 1.7.1",
    "Triton": "Triton 2.51.0 (the tritonserver of nvidia-pytriton 0.7.0)",
}
_HOW = """\
All servers run the same modules from one file, in one process that computes, with one thread within a
forward (`OMP_NUM_THREADS=1`), and join up to 32 requests with the least wait that they take. Ours is
called by the unary calls of wire 1.0 and over streams; "freeze" is a node whose YAML has `optimize:
freeze` ([optimize.md](optimize.md)), called as the first. "directory" is MiniLM as an operator would have
it: its YAML names the directory of its files, so that the node knows a text model and joins texts of
different lengths ([batching.md](batching.md)); the requests here have five lengths. mosec, LitServe and
Triton are called by HTTP
with raw bytes (Triton's in the binary form of the open inference protocol). All callers, those over
gRPC too, are sockets that do no more than they must. MLServer's HTTP carries numbers as JSON only, so
it is called by gRPC, in two ways: "MLServer" with tensors of FP32 and its numpy codec, which joins
requests of one shape only, and "MLServer, bytes" with tensors of BYTES that the model reads itself.
Its model runs in the server's own process, which was the faster way here; Triton's runs in the process
of its python backend. Clients run beside the servers on the same processors, in a closed loop, with
requests that are encoded beforehand. Each server's answers were compared with the model's own first.
Figures are medians, with the least and the most in parentheses; where a server could not be measured,
its row says why, in its own words. The machine is a virtual one, whose speed varies by up to a third from
one round to the next: what is close to 1 below may be on the other side of it in another run."""
_BOUND = """\
What bounds ours: with one client the forward, and a request's way through Python with caches that the
forward has emptied. With many, one thread reads, runs the batch and answers, because handing requests to
others costs more: with forwards on a thread of their own 0.65 (convnet) to 1 (decoder) times as many requests
a second were measured, with answers sent by another thread 0.7 (mlp) to 1.05 (decoder) times (both before
the node spoke HTTP/2 by itself).
Where its processor time goes at 32 clients, by `perf`, in percent:

| | mlp | minilm | decoder | convnet |
|---|---|---|---|---|
| the forward, in PyTorch | 69 | 87 | 70 | 41 |
| Python: ours, and the model's own | 20 | 10 | 21 | 35 |
| protobuf | 1 | 0 | 1 | 2 |
| the system: sending, waking, polling | 7 | 1 | 5 | 11 |
| copying and allocating (libc) | 3 | 1 | 2 | 11 |

A server whose transport is not Python (mosec's is Rust, Triton's C++) has less beside the forward, and does
it on the second processor meanwhile."""


class Row(Protocol):
    """One measurement."""

    @property
    def system(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def clients(self) -> int: ...
    @property
    def per_second(self) -> float: ...
    @property
    def p50_ms(self) -> float: ...
    @property
    def p99_ms(self) -> float: ...
    @property
    def cpu_ms(self) -> float: ...
    @property
    def memory_mb(self) -> float: ...


@dataclass(frozen=True)
class Missing:
    """What could not be measured, and why."""

    system: str
    model: str
    clients: int
    why: str


def _spread(values: Sequence[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return f"{middle} ({format(min(values), form)}–{format(max(values), form)})"


def table(model: str, rows: Sequence[Row], missing: Sequence[Missing]) -> str:
    """One model's rows as Markdown: medians over the rounds, with the least and the most."""
    lines = [
        "| clients | server | requests/s | p50 ms | p99 ms | server CPU ms a request | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    both: list[Row | Missing] = [*rows, *missing]
    known = [one for one in both if one.model == model]
    for clients in sorted({one.clients for one in known}):
        for system in sorted({one.system for one in known}, key=_place):
            found = [r for r in rows if _is_of(r, model, clients, system)]
            cells = _figures(found) if found else _reason(missing, model, clients, system)
            lines.append(f"| {clients} | {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(system: str) -> int:
    """In a table and in a picture."""
    return list(COLORS).index(system)


def _is_of(one: Row | Missing, model: str, clients: int, system: str) -> bool:
    return (one.model, one.clients, one.system) == (model, clients, system)


def _figures(found: Sequence[Row]) -> Sequence[str]:
    return (
        _spread([r.per_second for r in found], ",.0f"),
        _spread([r.p50_ms for r in found], ".2f"),
        _spread([r.p99_ms for r in found], ".2f"),
        _spread([r.cpu_ms for r in found], ".2f"),
        f"{statistics.median(r.memory_mb for r in found):,.0f}",
    )


def _reason(missing: Sequence[Missing], model: str, clients: int, system: str) -> Sequence[str]:
    why = next(m.why for m in missing if _is_of(m, model, clients, system))
    return (f"not measured: {why.replace('|', '/')}", "", "", "", "")


def against_best(rows: Sequence[Row]) -> str:
    """Ours over the best of the others, as Markdown: above 1 is more requests, and a shorter time."""
    ways = [way for way in _WAYS if any(row.system == way for row in rows)]
    titles = [f"{way}: {of}" for way in ways for of in ("requests/s", "p99")]
    lines = [f"| model | clients | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for model in dict.fromkeys(row.model for row in rows):
        for clients in dict.fromkeys(row.clients for row in rows):
            found = [row for row in rows if (row.model, row.clients) == (model, clients)]
            per_second = _medians(found, lambda row: row.per_second)
            p99_ms = _medians(found, lambda row: row.p99_ms)
            others = [system for system in per_second if not system.startswith("ours")]
            cells = [model, str(clients)]
            for way in ways:
                if way not in per_second:
                    cells += ["", ""]
                    continue
                faster = per_second[way] / max(per_second[system] for system in others)
                sooner = min(p99_ms[system] for system in others) / p99_ms[way]
                cells += [f"{faster:.2f} ×", f"{sooner:.2f} ×"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _medians(rows: Sequence[Row], of: Callable[[Row], float]) -> dict[str, float]:
    """Each system's."""
    systems = dict.fromkeys(row.system for row in rows)
    return {s: statistics.median(of(row) for row in rows if row.system == s) for s in systems}


def write(
    page: Path, rows: Sequence[Row], missing: Sequence[Missing], rounds: int, seconds: float
) -> None:
    """The page and its picture."""
    picture = page.with_suffix(".svg")
    draw(picture, rows)
    servers = dict.fromkeys(system.split(",")[0] for system in COLORS)
    systems = ", ".join(VERSIONS.get(server, server) for server in servers)
    parts = [
        "# Beside other servers",
        "",
        f"Written by `make bench-peers` on {date.today().isoformat()}: {systems}; {rounds} rounds of "
        f"{seconds:g} s, in which the servers take turns.",
        f"Machine: {os.cpu_count()} processors ({_processor()}), {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, grpcio {version('grpcio')}.",
        "",
        _HOW,
        "",
        f"![Requests a second and 99th percentile]({picture.name})",
        "",
        "## Ours over the best of the others",
        "",
        "Above 1: more requests a second, a shorter 99th percentile. The others' models run as they are "
        "written; their users would have to do in their own code what `freeze` does, and what is done for "
        "texts of different lengths.",
        "",
        against_best(rows),
        "",
        _BOUND,
    ]
    for model in dict.fromkeys(row.model for row in rows):
        parts += ["", f"## {model}", "", table(model, rows, missing)]
    page.write_text("\n".join(parts) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _color(system: str) -> str:
    return COLORS.get(system, "#777777")


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Bars for each model and number of clients, with the spread of the rounds."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(row.model for row in rows))
    systems = sorted({row.system for row in rows}, key=_place)
    loads = list(dict.fromkeys(row.clients for row in rows))
    measures: list[tuple[str, Callable[[Row], float]]] = [
        ("requests a second", lambda row: row.per_second),
        ("99th percentile, ms", lambda row: row.p99_ms),
    ]
    figure, axes = plt.subplots(
        len(measures), len(names), figsize=(3.4 * len(names), 5.6), squeeze=False
    )
    width = 0.8 / len(systems)
    for line, (label, of) in enumerate(measures):
        for column, name in enumerate(names):
            plot = axes[line][column]
            for place, system in enumerate(systems):
                found = {
                    x: [of(r) for r in rows if _is_of(r, name, load, system)]
                    for x, load in enumerate(loads)
                }
                groups = {x: group for x, group in found.items() if group}
                middles = [statistics.median(group) for group in groups.values()]
                below = [m - min(g) for m, g in zip(middles, groups.values(), strict=True)]
                above = [max(g) - m for m, g in zip(middles, groups.values(), strict=True)]
                plot.bar(
                    [x + (place - (len(systems) - 1) / 2) * width for x in groups],
                    middles,
                    width,
                    yerr=[below, above],
                    color=_color(system),
                    error_kw={"linewidth": 0.8, "capsize": 1.5},
                )
            plot.set_xticks(range(len(loads)), [str(load) for load in loads])
            plot.spines[["top", "right"]].set_visible(False)
            if line == 0:
                plot.set_title(name, fontsize=11)
            else:
                plot.set_xlabel("clients")
            if column == 0:
                plot.set_ylabel(label)
    shown = [Patch(color=_color(system), label=system) for system in systems]
    figure.legend(handles=shown, loc="upper center", ncols=len(systems), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path)
    plt.close(figure)
