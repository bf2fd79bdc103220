"""`make mutants`: every seeded bug against the simulation, on several processes, as a table.

    python -m mutants                       all of them, at most 3,000 episodes each
    python -m mutants --only "no backoff"   those whose name contains that, and what was found

Exit code 1 if one survives. Run from `tests/`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass

from mutants.catalogue import MUTANTS, Catch, catch

MOST_EPISODES = 3000


@dataclass(frozen=True)
class Result:
    """What came of a mutant."""

    name: str
    caught: Catch | None
    took_s: float


def _try(task: tuple[str, int]) -> Result:
    name, episodes = task
    logging.disable(logging.CRITICAL)
    began = time.perf_counter()
    return Result(name, catch(MUTANTS[name], range(episodes)), time.perf_counter() - began)


def table(results: dict[str, Result], most_episodes: int) -> str:
    """The results for people, in the order of the catalogue."""
    rows = [("mutant", "caught by", "episodes", "stands for")]
    for name, mutant in MUTANTS.items():
        if name in results:
            caught = results[name].caught
            found = (caught.property_id, f"{caught.seed + 1:,}") if caught else ("SURVIVES", "-")
            rows.append((name, *found, mutant.stands_for))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {found:<{widths[1]}}  {episodes:>{widths[2]}}  {stands_for}"
        for name, found, episodes, stands_for in rows
    ]
    survivors = [result.name for result in results.values() if result.caught is None]
    lines += ["", f"{len(results)} mutants, {len(results) - len(survivors)} caught"]
    if survivors:
        lines.append(f"not in {most_episodes:,} episodes: {'; '.join(survivors)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=MOST_EPISODES, help="at most, for each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    arguments = parser.parse_args()
    tasks = [(name, arguments.episodes) for name in MUTANTS if arguments.only in name]
    results: dict[str, Result] = {}
    # A process for each mutant: what one keeps between episodes, the next must not see.
    with multiprocessing.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(_try, tasks):
            results[result.name] = result
            if arguments.only and result.caught is not None:
                caught = result.caught
                print(f"{result.name}: seed {caught.seed}, {caught.property_id}: {caught.message}")
            elif sys.stdout.isatty():
                print(f"\r{len(results)} of {len(tasks)} mutants", end="", flush=True)
            elif result.took_s > 10:
                print(f"{result.name}: {result.took_s:.0f} s", file=sys.stderr)
    print(("\r" if sys.stdout.isatty() else "") + table(results, arguments.episodes))
    return int(any(result.caught is None for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
