"""Many episodes on several processes, and what is told of one: its trace, as small as it still fails."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from simulation.episode import Outcome
from simulation.seeds import is_pair, run_seed
from simulation.shrink import shrink

CHUNK = 25


@dataclass(frozen=True)
class Failure:
    """A seed, and the property that does not hold in its episode."""

    seed: int
    property_id: str
    message: str

    def __str__(self) -> str:
        return f"seed {self.seed}  {self.property_id}: {self.message}"

    @property
    def again(self) -> str:
        """The command that shows it."""
        return f"make simulate SEED={self.seed}"


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


def run_many(first: int, episodes: int, jobs: int) -> Iterator[Tally]:
    """Plays the episodes of seeds `first` and on, in `jobs` processes; gives what is done, as it is done."""
    end = first + episodes
    chunks = [range(start, min(start + CHUNK, end)) for start in range(first, end, CHUNK)]
    # Processes of their own, not forks: whoever calls this may have threads.
    spawned = multiprocessing.get_context("spawn")
    with spawned.Pool(jobs, initializer=quiet) as pool:
        yield from pool.imap_unordered(run_range, chunks)


def all_of(first: int, episodes: int, jobs: int) -> Tally:
    """All of `run_many` in one."""
    with closing(run_many(first, episodes, jobs)) as tallies:
        done = list(tallies)
    return Tally(
        sum(tally.episodes for tally in done),
        sum(tally.steps for tally in done),
        tuple(sorted((f for tally in done for f in tally.failures), key=lambda f: f.seed)),
    )


def quiet() -> None:
    """What the node logs is no news: its trace has it."""
    logging.disable(logging.CRITICAL)


def report(outcome: Outcome) -> str:
    """A trace for people: how it began, what happened, which property broke, how to see it again."""
    settings = outcome.script.settings
    lines = [str(settings), " step     time s  who    what"]
    lines += [str(line) for line in outcome.trace()]
    if outcome.broken is None:
        lines.append("every property holds")
    else:
        found = Failure(settings.seed, outcome.broken.property_id, outcome.broken.message)
        lines += [f"BROKEN {found.property_id}: {found.message}", f"again: {found.again}"]
    return "\n".join(lines)


def report_of_seed(seed: int, *, whole: bool = False) -> tuple[str, bool]:
    """The trace of a seed, and whether every property holds in it.

    Args:
        whole: leave out nothing of one that fails.
    """
    outcome = run_seed(seed)
    if outcome.broken is None:
        return report(outcome), True
    if whole or is_pair(seed):
        return report(outcome), False
    return report_of_smaller(shrink(outcome), outcome), False


def report_of_smaller(small: Outcome, outcome: Outcome) -> str:
    """The trace of a script that was made smaller, and how to see all of it."""
    few, most = len(small.script.acts), len(outcome.script.acts)
    again = f"make simulate SEED={outcome.script.settings.seed} WHOLE=1"
    return f"{report(small)}\n{few} of {most} acts are enough; all of them: {again}"
