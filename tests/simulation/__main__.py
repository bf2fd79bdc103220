"""`make simulate`: many episodes, on several processes; or one, with its trace.

    python -m simulation --episodes 50000 --jobs 2      numbers 0 to 49,999
    python -m simulation --seed 123                     one, as small as it still fails

Exit code 1 if a property does not hold. Run from `tests/`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from simulation.episode import Outcome
from simulation.seeds import is_pair, run_seed
from simulation.shrink import shrink

CHUNK = 25
MOST_SHOWN = 3


@dataclass(frozen=True)
class Failure:
    """A seed, and the property that does not hold in its episode."""

    seed: int
    property_id: str
    message: str


@dataclass(frozen=True)
class Tally:
    """What some episodes came to."""

    episodes: int
    steps: int
    failures: tuple[Failure, ...]


def run_range(seeds: Iterable[int]) -> Tally:
    """Plays the episodes of some seeds."""
    episodes, steps, failures = 0, 0, []
    for seed in seeds:
        outcome = run_seed(seed)
        episodes += 1
        steps += outcome.steps
        if outcome.broken is not None:
            failures.append(Failure(seed, outcome.broken.property_id, outcome.broken.message))
    return Tally(episodes, steps, tuple(failures))


def report(outcome: Outcome) -> str:
    """A trace for people: how it began, what happened, which property broke, how to see it again."""
    settings = outcome.script.settings
    lines = [str(settings), " step     time s  who    what"]
    lines += [str(line) for line in outcome.trace()]
    if outcome.broken is None:
        lines.append("every property holds")
    else:
        lines += [
            f"BROKEN {outcome.broken.property_id}: {outcome.broken.message}",
            f"again: make simulate SEED={settings.seed}",
        ]
    return "\n".join(lines)


def _show_seed(seed: int, *, whole: bool) -> int:
    outcome = run_seed(seed)
    if outcome.broken is None:
        print(report(outcome))
        return 0
    small = outcome if whole or is_pair(seed) else shrink(outcome)
    print(report(small))
    if small is not outcome:
        acts, most = len(small.script.acts), len(outcome.script.acts)
        print(f"{acts} of {most} acts are enough; all of them: make simulate SEED={seed} WHOLE=1")
    return 1


def _show_many(first: int, episodes: int, jobs: int) -> int:
    began = time.perf_counter()
    chunks = [
        range(start, min(start + CHUNK, first + episodes))
        for start in range(first, first + episodes, CHUNK)
    ]
    done, steps = 0, 0
    failures: list[Failure] = []
    with multiprocessing.Pool(jobs, initializer=_quiet) as pool:
        for tally in pool.imap_unordered(run_range, chunks):
            done += tally.episodes
            steps += tally.steps
            for failure in tally.failures:
                failures.append(failure)
                print(f"seed {failure.seed}  {failure.property_id}: {failure.message[:200]}")
            if sys.stdout.isatty():
                print(f"\r{done:,} of {episodes:,} episodes", end="", flush=True)
    took_s = time.perf_counter() - began
    print(
        f"{done:,} episodes, {steps:,} steps in {took_s:,.1f} s on {jobs} processes: "
        f"{steps / took_s / jobs:,.0f} steps/s each; {len(failures)} failed"
    )
    for failure in sorted(failures, key=lambda f: f.seed)[:MOST_SHOWN]:
        print(f"see one: make simulate SEED={failure.seed}")
    return 1 if failures else 0


def _quiet() -> None:
    logging.disable(logging.CRITICAL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="show the trace of this one")
    parser.add_argument("--whole", action="store_true", help="do not leave out acts")
    arguments = parser.parse_args()
    _quiet()
    if arguments.seed is not None:
        return _show_seed(arguments.seed, whole=arguments.whole)
    return _show_many(arguments.first, arguments.episodes, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
