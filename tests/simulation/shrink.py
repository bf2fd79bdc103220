"""Makes a failing script small: leaves out what it fails without.

Acts are left out in ever smaller runs, then the pauses between them, then whatever the directory held at
first. What remains still breaks the same property, though another seed would never have drawn it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from simulation.episode import Episode, Outcome
from simulation.script import Script

MOST_TRIES = 600


def shrink(outcome: Outcome) -> Outcome:
    """The outcome of a smaller script that breaks the same property, or the same outcome."""
    assert outcome.broken is not None
    best, tries = outcome, 0
    progress = True
    while progress and tries < MOST_TRIES:
        progress = False
        for candidate in _smaller(best.script):
            tries += 1
            found = Episode(candidate).play()
            if found.broken is not None and found.broken.property_id == outcome.broken.property_id:
                best, progress = found, True
                break
            if tries >= MOST_TRIES:
                break
    return best


def _smaller(script: Script) -> Iterator[Script]:
    acts = script.acts
    size = max(1, len(acts) // 2)
    while acts and size >= 1:
        for start in range(0, len(acts), size):
            left_out = acts[start : start + size]
            time = sum(act.after_s for act in left_out)
            rest = acts[:start] + acts[start + size :]
            yield replace(script, acts=rest)
            if time and start + size < len(acts):
                following = acts[start + size]
                later = replace(following, after_s=following.after_s + time)
                yield replace(script, acts=(*acts[:start], later, *acts[start + size + 1 :]))
        size //= 2
    for number in range(len(script.files)):
        yield replace(script, files=script.files[:number] + script.files[number + 1 :])
    if script.settings.tidy:
        yield replace(script, settings=replace(script.settings, tidy=False))
