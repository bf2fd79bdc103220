"""I13: without a shared quota, faults on one model change nothing in the trace of another.

Two episodes with the same acts on some models; in one of them all kinds of trouble befall another model
besides. What was done to the first ones, in order, must be the same in both.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from random import Random

from simulation.episode import Episode, Outcome
from simulation.machine import Broken
from simulation.script import FILES, KINDS, Act, Deck, Script, Settings, make_settings
from simulation.texts import IDS, Text, broken_text, some_doc, text_of

TROUBLED = IDS[0]
KEYS_OF_OTHERS = ("v", "priority", "pinned", "update", "endpoint", "max_memory_mb")
KEYS_OF_TROUBLED = ("fail", "v", "weights", "load_timeout_s", "priority", "update")
FAULTS = ("fates", "hang", "midway")


def play_pair(seed: int) -> Outcome:
    """Both episodes of a seed; the outcome of the one with trouble, which may be that they differ."""
    calm, troubled = make_pair(seed)
    expected = Episode(calm)
    first = expected.play()
    if first.broken is not None:
        return first
    episode = Episode(troubled)
    outcome = episode.play()
    steps = first.steps + outcome.steps
    broken = outcome.broken
    others = calm.settings.ids[1:]
    before = [done for done in expected.done_at_rest if done[1] in others]
    after = [done for done in episode.done_at_rest if done[1] in others]
    if broken is None and before != after:
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
        )
        broken = Broken(
            "I13",
            f"trouble with {TROUBLED} changes what is done to others; after {same} times the same, "
            f"without it: {_told(before[same:])}; with it: {_told(after[same:])}",
        )
    return replace(outcome, steps=steps, broken=broken)


def _told(done: list[tuple[object, ...]]) -> str:
    return "; ".join(" ".join(str(e) for e in found if e) for found in done) or "nothing"


def make_pair(seed: int) -> tuple[Script, Script]:
    """A script, and the same with trouble for one model."""
    rng = Random(f"{seed}/isolation")
    settings: Settings = replace(
        make_settings(seed, rng),
        ids=IDS[: rng.choice((2, 3))],
        layout="plain",
        room=True,
        tidy=False,
        settle_s=0.25,
        max_models=12,
        max_parallel_loads=4,
        guard_percent=100.0,
    )
    files = tuple(
        (FILES[IDS.index(model_id)], text_of([some_doc(rng, model_id, KEYS_OF_OTHERS)]))
        for model_id in settings.ids
    )
    acts: list[Act] = []
    trouble: list[Act] = []
    for _ in range(rng.choice((4, 8))):
        others = Deck(rng, settings.ids[1:], KEYS_OF_OTHERS)
        calm = _ordinary(others)
        acts.append(calm)
        trouble.append(calm)
        trouble += [_trouble(rng) for _ in range(rng.choice((0, 1, 2, 3)))]
    return Script(settings, files, tuple(acts)), Script(settings, files, tuple(trouble))


def _ordinary(deck: Deck) -> Act:
    """Something that happens to one of the others; what came before it is over by then."""
    model_id = deck.model_id()
    name = FILES[IDS.index(model_id)]
    kind = deck.rng.choice(("write", "replace", "weights", "request", "touch"))
    arguments: dict[str, tuple[object, ...]] = {
        "write": (name, text_of([some_doc(deck.rng, model_id, deck.keys)])),
        "replace": (name, text_of([some_doc(deck.rng, model_id, deck.keys)])),
        "weights": (f"/weights/{model_id}.pt", deck.weights(), "in place"),
        "request": (model_id, 0.1, 5.0),
        "touch": (name, None),
    }
    return Act(5.0, kind, arguments[kind])


def _trouble(rng: Random) -> Act:
    """Something that befalls the troubled model, or its files, alone."""
    name = FILES[0]
    deck = Deck(rng, (TROUBLED,), KEYS_OF_TROUBLED)
    kind = rng.choice(
        (*FAULTS, "break", "write", "tear", "recreate", "weights", "retry", "unreadable")
    )
    text: Text = text_of([some_doc(rng, TROUBLED, KEYS_OF_TROUBLED)])
    arguments: dict[str, tuple[object, ...]] = {
        "break": (name, broken_text("a value of the wrong type", TROUBLED)),
        "write": (name, text),
        "tear": (name, text, 0.5, 0.4),
        "recreate": (name, text, 0.3),
        "weights": (f"/weights/{TROUBLED}.pt", deck.weights(), "torn"),
        "retry": (TROUBLED,),
        "unreadable": (name, 0.5),
    }
    made = arguments[kind] if kind in arguments else KINDS[kind].make(deck)
    return Act(0.0, kind, made)
