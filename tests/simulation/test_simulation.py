"""The whole loop over some thousands of histories full of faults; and that a bug would be found.

Which of I1 to I20 is checked where, the package's text says. `make simulate EPISODES=n` plays more of
them, `make mutants` proves for each of many known bugs that it is found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutants.catalogue import MUTANTS, catch
from simulation.episode import Episode
from simulation.many import all_of, report, report_of_smaller
from simulation.seeds import is_pair, run_seed
from simulation.shrink import shrink

TESTS = Path(__file__).parents[1]
EPISODES = 1000
BUG = MUTANTS["the prune guard is ignored"]


@pytest.mark.timeout(1200)
def test_every_property_holds_in_every_episode() -> None:
    found = all_of(0, EPISODES, os.cpu_count() or 1)
    assert found.episodes == EPISODES
    assert found.steps > 50 * EPISODES
    if found.failures:
        lines = [f"{failure}\n  see it: {failure.again}" for failure in found.failures]
        pytest.fail("\n".join(lines), pytrace=False)


def test_a_seed_gives_the_same_trace_each_time_and_in_each_process() -> None:
    seeds = range(30)
    assert any(is_pair(seed) for seed in seeds)
    told = "\n".join(report(run_seed(seed)) for seed in seeds)
    assert "\n".join(report(run_seed(seed)) for seed in seeds) == told
    code = (
        "from simulation.many import quiet, report\n"
        "from simulation.seeds import run_seed\n"
        "quiet()\n"
        f"print('\\n'.join(report(run_seed(seed)) for seed in {seeds}))"
    )
    for hash_seed in ("1", "2"):
        elsewhere = subprocess.run(
            [sys.executable, "-c", code],
            cwd=TESTS,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=150,
        )
        assert elsewhere.stdout.rstrip("\n") == told


def test_a_bug_is_found_made_small_and_shown() -> None:
    caught = catch(BUG, range(200))
    assert caught is not None
    assert caught.property_id == "I9"
    with BUG.on():
        outcome = run_seed(caught.seed)
        small = shrink(outcome)
        again = Episode(small.script).play()
    text = report_of_smaller(small, outcome)
    assert len(small.script.acts) < len(outcome.script.acts)
    assert again.broken is not None
    assert again.broken.property_id == "I9"
    assert f"BROKEN I9: {again.broken.message}" in text
    assert f"again: make simulate SEED={caught.seed}\n" in text
    assert text.startswith(f"seed {caught.seed}: ")
    assert text.endswith(f"make simulate SEED={caught.seed} WHOLE=1")
    assert "is desired no more" in text
    assert Episode(small.script).play().broken is None


def test_the_command_that_replays_a_seed_shows_its_trace_and_how_it_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulation", "--seed", "3"],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == report(run_seed(3)) + "\n"
    assert done.stdout.endswith("every property holds\n")
