"""`make simulate`: many episodes, on several processes; or one, with its trace.

    python -m simulation --episodes 50000 --jobs 2      numbers 0 to 49,999
    python -m simulation --seed 123                     one, as small as it still fails

Exit code 1 if a property does not hold. Run from `tests/`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from simulation.many import Failure, quiet, report_of_seed, run_many

MOST_SHOWN = 3
MOST_CHARACTERS = 300


def _show_many(first: int, episodes: int, jobs: int) -> int:
    began = time.perf_counter()
    done, steps = 0, 0
    failures: list[Failure] = []
    for tally in run_many(first, episodes, jobs):
        done += tally.episodes
        steps += tally.steps
        failures += tally.failures
        for failure in tally.failures:
            print(str(failure)[:MOST_CHARACTERS], flush=True)
        if sys.stdout.isatty():
            print(f"\r{done:,} of {episodes:,} episodes", end="", flush=True)
    took_s = time.perf_counter() - began
    print(
        f"{done:,} episodes, {steps:,} steps in {took_s:,.1f} s on {jobs} processes: "
        f"{steps / took_s / jobs:,.0f} steps/s each; {len(failures)} failed"
    )
    for failure in sorted(failures, key=lambda f: f.seed)[:MOST_SHOWN]:
        print(f"see one: {failure.again}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="show the trace of this one")
    parser.add_argument("--whole", action="store_true", help="do not leave out acts")
    arguments = parser.parse_args()
    quiet()
    if arguments.seed is None:
        return _show_many(arguments.first, arguments.episodes, arguments.jobs)
    text, holds = report_of_seed(arguments.seed, whole=arguments.whole)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
