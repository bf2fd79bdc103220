"""What happens in one episode, as data: made from a seed, printed as a script a person can read.

    after 0.25 s  writes a.yaml in place: m0 v=2
    after 0 s     crash at load, 1 effects later; up again after 0.5 s

An act names what the world does and holds all that it needs; the world carries it out if it can (a file
that is not there cannot be deleted), so that a script with some acts left out is a script too. That is
what makes a failing one small.

Each seed takes part of the kinds of acts and of the keys only (swarm testing): what all acts together
drown, a few of them find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from simulation.models import Fate, Fates, weights
from simulation.texts import (
    BROKEN,
    IDS,
    KEYS,
    SPELLINGS,
    Doc,
    Text,
    broken_text,
    server_text,
    some_doc,
    text_of,
)

LAYOUTS = ("plain", "plain", "plain", "configmap", "git")
FILES = ("a.yaml", "sub/b.yaml", "c.yml", "d.yaml", "e.yaml")
LITTER = (".a.yaml.swp", "a.yaml~", "#a.yaml#", ".b.yaml", "4913", "a.yaml.bak", ".git/c.yaml")
PAUSES = (0.0, 0.0, 0.02, 0.1, 0.2, 0.25, 0.3, 0.6, 1.0, 1.0, 2.0, 2.0, 5.0)
LONG_PAUSES = (20.0, 70.0)
FATES = ("fail", "fail", "terminal", "untrusted", "memory", "exit", "lie")
RACES = (
    "a request",
    "a request for each that goes",
    "work",
    "Python's load",
    "Python's unload",
)
EFFECTS = ("file", "state", "thread", "load", "close", "anything")


@dataclass(frozen=True)
class Act:
    """One thing that the world does, `after_s` after the last one."""

    after_s: float
    kind: str
    args: tuple[object, ...] = ()

    def __str__(self) -> str:
        return KINDS[self.kind].text.format(*self.args)


@dataclass(frozen=True)
class Settings:
    """What does not change in an episode.

    Attributes:
        ids: the models that take part.
        layout: how the directory is filled: by hand, as a ConfigMap, by git-sync.
        room: whether all models fit at a time.
        tidy: whether people put everything right before the end.
    """

    seed: int
    ids: tuple[str, ...]
    layout: str
    room: bool
    tidy: bool
    settle_s: float
    resync_s: float
    max_models: int
    max_parallel_loads: int
    guard_percent: float

    @property
    def totals_mb(self) -> dict[str, float]:
        """What the devices have: the budgets, what is to stay free of them, and a little more."""
        return {device: mb + 64.0 + mb / 4 for device, mb in self.budgets_mb.items()}

    @property
    def budgets_mb(self) -> dict[str, float]:
        return {"cpu": 2000.0, "cuda:0": 2000.0} if self.room else {"cpu": 100.0, "cuda:0": 60.0}

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {len(self.ids)} models, {self.layout} directory, settle_s "
            f"{self.settle_s:g}, resync_s {self.resync_s:g}, max_models {self.max_models}, "
            f"max_parallel_loads {self.max_parallel_loads}, guard {self.guard_percent:g} %, "
            f"{self.budgets_mb['cpu']:g} MB"
        )


@dataclass(frozen=True)
class Script:
    """An episode: how it begins, and the acts in order."""

    settings: Settings
    files: tuple[tuple[str, Text], ...]
    acts: tuple[Act, ...]

    @property
    def reads_devices(self) -> bool:
        """Whether what others use of the devices can be read; it costs a fifth of the speed."""
        return any(act.kind in ("others", "stall") for act in self.acts)


class Deck:
    """What the makers of acts draw from."""

    def __init__(self, rng: Random, ids: tuple[str, ...], keys: tuple[str, ...]) -> None:
        self.rng = rng
        self.ids = ids
        self.keys = keys

    def model_id(self) -> str:
        return self.rng.choice(self.ids)

    def file(self) -> str:
        return self.rng.choice(FILES)

    def home_of(self, model_id: str) -> str:
        """Where a model is declared, mostly; elsewhere it may meet its double."""
        if self.rng.random() < 0.85:
            return FILES[IDS.index(model_id)]
        return self.file()

    def seconds(self, *among: float) -> float:
        return self.rng.choice(among)

    def text(self, model_id: str) -> Text:
        docs = [some_doc(self.rng, model_id, self.keys)]
        if self.rng.random() < 0.1:
            docs.append(some_doc(self.rng, self.model_id(), self.keys))
        spelling = self.rng.choice(("", "", *SPELLINGS))
        return text_of(docs, spelling)

    def weights_path(self) -> str:
        own = [f"/weights/{model_id}.pt" for model_id in self.ids]
        others = ("/weights/shared.pt", "/weights/dir/part1", "/weights/dir/part2")
        return self.rng.choice((*own, *own, *others))

    def weights(self) -> bytes:
        mb = self.rng.choice((5, 10, 20, 20, 30, 45))
        real = self.rng.choice((None, None, None, None, mb * 2))
        return weights(mb, self.rng.randrange(10), real)


@dataclass(frozen=True)
class Kind:
    """A kind of act.

    Attributes:
        weight: how often, beside the others.
        text: what a trace says, with the arguments in it.
        make: draws the arguments.
        fault: it is one, so it does not happen in an episode without faults.
    """

    weight: int
    text: str
    make: Callable[[Deck], tuple[object, ...]]
    fault: bool = False


def _writes(deck: Deck) -> tuple[object, ...]:
    model_id = deck.model_id()
    return deck.home_of(model_id), deck.text(model_id)


def _torn(deck: Deck) -> tuple[object, ...]:
    return (
        *_writes(deck),
        deck.rng.choice((0.0, 0.4, 0.7, 0.9)),
        deck.seconds(0.05, 0.2, 0.4, 1.0),
    )


def _broken(deck: Deck) -> tuple[object, ...]:
    model_id = deck.model_id()
    return deck.home_of(model_id), broken_text(deck.rng.choice(sorted(BROKEN)), model_id)


def _two_files(deck: Deck) -> tuple[object, ...]:
    return tuple(deck.rng.sample(FILES, 2))


def _fates(deck: Deck) -> tuple[object, ...]:
    takes_s = deck.seconds(0.0, 0.05, 0.5, 3.0)
    fates = [Fate(deck.rng.choice(FATES), takes_s) for _ in range(deck.rng.choice((1, 1, 2, 4)))]
    return deck.model_id(), Fates(tuple(fates))


def _hang(deck: Deck) -> tuple[object, ...]:
    kind = deck.rng.choice(("ok", "ok", "fail", "lie"))
    return deck.model_id(), Fates((Fate(kind, deck.seconds(2.0, 4.0, 8.0, 20.0, 60.0)),))


def _midway(deck: Deck) -> tuple[object, ...]:
    kind = deck.rng.choice(("ok", "ok", "fail"))
    rewritten = deck.rng.random() < 0.5
    fate = Fate(kind, deck.seconds(0.0, 0.1), deck.seconds(0.02, 0.5, 2.0, 50.0), rewritten)
    return deck.model_id(), Fates((fate,))


def _try_out(deck: Deck) -> tuple[object, ...]:
    keys = (("rollout", deck.rng.choice(KEYS["rollout"])), ("v", deck.rng.choice(KEYS["v"])))
    text = text_of([Doc(model_id := deck.model_id(), keys)])
    return model_id, text, deck.seconds(0.0, 1.5, 3.0), deck.seconds(0.0, 12.0)


def _server(deck: Deck) -> tuple[object, ...]:
    rng = deck.rng
    choices: dict[str, object] = {
        "max_models": rng.choice((1, 2, 3, 6)),
        "max_parallel_loads": rng.choice((1, 2, 3)),
        "memory_quota_mb": rng.choice(("{cpu: 40}", "{cpu: 70}", "{cpu: 200}", '{"cuda:0": 10}')),
        "settle_s": rng.choice((0.1, 0.25, 0.5)),
        "resync_s": rng.choice((0.5, 1.0, 4.0)),
        "prune_guard_percent": rng.choice((30, 50, 100)),
    }
    keys = rng.sample(sorted(choices), rng.choice((1, 2)))
    return (server_text(**{key: choices[key] for key in sorted(keys)}),)


def _model_and_keep(deck: Deck) -> tuple[object, ...]:
    return deck.model_id(), deck.seconds(0.0, 0.1, 1.0, 10.0), deck.seconds(0.5, 5.0, 40.0)


def _others(deck: Deck) -> tuple[object, ...]:
    share = deck.rng.choice((0.2, 0.5, 0.8, 1.0))
    return deck.rng.choice(("cpu", "cpu", "cuda:0")), share, deck.seconds(0.3, 3.0, 20.0, 100.0)


def _crash(deck: Deck) -> tuple[object, ...]:
    return deck.seconds(0.0, 0.1, 1.0, 30.0), deck.rng.random() < 0.2


def _crash_at(deck: Deck) -> tuple[object, ...]:
    return (deck.rng.choice(EFFECTS), deck.rng.choice((0, 1, 2, 3, 7, 15)), *_crash(deck))


def _nothing(deck: Deck) -> tuple[object, ...]:
    return ()


def _model(deck: Deck) -> tuple[object, ...]:
    return (deck.model_id(),)


def _file(deck: Deck) -> tuple[object, ...]:
    return (deck.file(),)


KINDS: dict[str, Kind] = {
    "wait": Kind(6, "nothing happens", _nothing),
    "write": Kind(10, "writes {0} in place: {1}", _writes),
    "replace": Kind(8, "renames a new {0} over the old one: {1}", _writes),
    "tear": Kind(6, "writes {0} and stops at {2:.0%} for {3:g} s: {1}", _torn),
    "lie": Kind(4, "writes {0}, same size and mtime as before: {1}", _writes),
    "append": Kind(2, "appends to {0}: {1}", _writes),
    "break": Kind(6, "writes {0}: {1}", _broken),
    "delete": Kind(6, "deletes {0}", _file),
    "recreate": Kind(
        3,
        "deletes {0} and writes it again {2:g} s later: {1}",
        lambda d: (*_writes(d), d.seconds(0.0, 0.05, 0.3, 1.0)),
    ),
    "rename": Kind(4, "renames {0} to {1}", _two_files),
    "touch": Kind(
        3, "touches {0}, mtime {1}", lambda d: (d.file(), d.rng.choice((None, 0, 12345)))
    ),
    "litter": Kind(3, "leaves {0}: {1}", lambda d: (d.rng.choice(LITTER), d.text(d.model_id()))),
    "dangle": Kind(1, "{0} becomes a link to nowhere", _file, fault=True),
    "delete_all": Kind(
        2, "deletes all files, one each {0:g} s", lambda d: (d.seconds(0.0, 0.1, 0.3, 1.0),)
    ),
    "root_away": Kind(
        2,
        "the directory is moved away for {0:g} s",
        lambda d: (d.seconds(0.0, 0.1, 1.0, 20.0),),
        fault=True,
    ),
    "root_anew": Kind(
        2,
        "the directory is deleted, and made and filled again {0:g} s later",
        lambda d: (d.seconds(0.0, 0.1, 0.4, 2.0), d.seconds(0.0, 0.1)),
        fault=True,
    ),
    "root_empty": Kind(1, "another directory, empty, takes its place", _nothing, fault=True),
    "unreadable": Kind(
        3,
        "{0} cannot be read for {1:g} s",
        lambda d: (d.rng.choice((*FILES, "sub", "sub", "")), d.seconds(0.1, 0.5, 3.0)),
        fault=True,
    ),
    "io_error": Kind(
        3,
        "a call of the file system fails, {0} calls later",
        lambda d: (d.rng.choice((0, 1, 2, 5, 9, 14)),),
        fault=True,
    ),
    "mid_scan": Kind(
        3,
        "in the middle of a scan, {0} calls later, {1} becomes: {2}",
        lambda d: (d.rng.choice((0, 1, 3, 6, 10)), *_writes(d)),
    ),
    "mid_rename": Kind(
        2,
        "in the middle of a scan, {0} calls later, {1} is renamed to {2}",
        lambda d: (d.rng.choice((0, 1, 2, 4, 7)), *_two_files(d)),
    ),
    "chase": Kind(
        3,
        "in each of the next {2} scans, {3} calls after it began, {0} becomes {1}, or the reverse",
        lambda d: (*_two_files(d), d.rng.choice((3, 8)), d.rng.choice((1, 1, 2, 3))),
        fault=True,
    ),
    "weights": Kind(
        5,
        "weights {0} become {1}, {2}",
        lambda d: (d.weights_path(), d.weights(), d.rng.choice(("in place", "anew", "torn"))),
    ),
    "weights_gone": Kind(1, "weights {0} are deleted", lambda d: (d.weights_path(),), fault=True),
    "weights_touch": Kind(1, "weights {0} are touched", lambda d: (d.weights_path(),)),
    "weights_link": Kind(
        1, "/weights/link.pt leads to {0}", lambda d: (f"/weights/{d.model_id()}.pt",)
    ),
    "server": Kind(3, "server.yaml says {0}", _server),
    "server_broken": Kind(1, "server.yaml is broken", _nothing),
    "server_gone": Kind(1, "server.yaml is deleted", _nothing),
    "request": Kind(8, "a request for {0} that takes {1:g} s and waits {2:g} s", _model_and_keep),
    "race": Kind(
        3,
        "between a plan and its execution: {0}, of {1} if of any",
        lambda d: (
            d.rng.choice(RACES),
            d.model_id(),
        ),
    ),
    "api_load": Kind(
        1, "Python loads {0}, {1}", lambda d: (d.model_id(), some_doc(d.rng, "m0", ("v",)).keys)
    ),
    "api_unload": Kind(1, "Python unloads {0}", _model),
    "deaf": Kind(
        2, "events are lost for {0:g} s", lambda d: (d.seconds(1.0, 10.0, 100.0),), fault=True
    ),
    "slow_events": Kind(
        1, "events come twice, {0:g} s late", lambda d: (d.seconds(0.1, 0.7, 3.0),), fault=True
    ),
    "noise": Kind(1, "an event about nothing", _nothing),
    "fates": Kind(5, "the next loads of {0}: {1}", _fates, fault=True),
    "hammer": Kind(
        1,
        "people hammer at {0}: {1} versions that cannot be loaded, one each {2:g} s",
        lambda d: (d.model_id(), d.rng.choice((4, 12)), d.seconds(0.5, 1.2, 3.0)),
    ),
    "hang": Kind(3, "the next load of {0}: {1}", _hang, fault=True),
    "midway": Kind(3, "the next load of {0}: {1}", _midway, fault=True),
    "slow_close": Kind(
        1, "closing takes {0:g} s", lambda d: (d.seconds(0.0, 1.0, 30.0),), fault=True
    ),
    "close_raises": Kind(1, "the next close raises", _nothing, fault=True),
    "no_threads": Kind(1, "the next {0} threads cannot be started", lambda d: (1,), fault=True),
    "turns": Kind(
        3,
        "requests for {0} in turn, {1} times, one each {2:g} s, that take {3:g} s",
        lambda d: (
            tuple(d.rng.sample(d.ids, min(len(d.ids), 3))),
            d.rng.choice((2, 4)),
            d.seconds(0.01, 0.03, 0.3),
            d.seconds(0.0, 0.02, 0.5),
        ),
    ),
    "others": Kind(6, "others take {1:.0%} of {0} for {2:g} s", _others),
    "stall": Kind(
        1,
        "processes stand still for memory on {0} for {1:g} s",
        lambda d: (d.rng.choice(("cpu", "cpu", "cuda:0")), d.seconds(3.0, 20.0)),
    ),
    "crash": Kind(2, "kill -9; up again after {0:g} s, reboot: {1}", _crash, fault=True),
    "crash_at": Kind(
        4,
        "will crash at an effect ({0}), {1} of them later; up again after {2:g} s, reboot: {3}",
        _crash_at,
        fault=True,
    ),
    "disk_full": Kind(
        1, "state_dir has no space for {0:g} s", lambda d: (d.seconds(0.5, 5.0),), fault=True
    ),
    "state_lost": Kind(1, "state_dir is deleted", _nothing, fault=True),
    "state_spoiled": Kind(
        1, "file {0} of state_dir is spoiled", lambda d: (d.rng.randrange(8),), fault=True
    ),
    "wall_jump": Kind(
        1,
        "the wall clock jumps by {0:g} s",
        lambda d: (d.seconds(-3600.0, -1.0, 86400.0),),
        fault=True,
    ),
    "try_out": Kind(
        3,
        "people try {1}, ask it 12 times, and suspend it {2:g} s later (0: never) for {3:g} s (0: for good)",
        _try_out,
    ),
    "suspend": Kind(2, "suspend {0}", _model),
    "resume": Kind(2, "resume {0}", _model),
    "retry": Kind(2, "retry {0}", _model),
    "promote": Kind(1, "promote {0}", _model),
    "abort": Kind(1, "abort {0}", _model),
    "confirm": Kind(
        2,
        "confirm-prune with the {0} digest",
        lambda d: (d.rng.choice(("right", "right", "wrong", "last")),),
    ),
}
"""All that may happen; their weights are relative."""

_ALWAYS = ("wait", "write")


def make_settings(seed: int, rng: Random) -> Settings:
    """What does not change in the episode of a seed."""
    room = rng.random() < 0.5
    return Settings(
        seed=seed,
        ids=IDS[: rng.choice((1, 2, 3, 3, 4, 5))],
        layout=rng.choice(LAYOUTS),
        room=room,
        tidy=rng.random() < 0.5,
        settle_s=rng.choice((0.25, 0.25, 0.25, 0.1, 1.0)),
        resync_s=rng.choice((1.0, 1.0, 0.5, 3.0)),
        max_models=12 if room else rng.choice((2, 3, 5)),
        max_parallel_loads=rng.choice((1, 2, 2, 4)),
        guard_percent=rng.choice((50.0, 50.0, 50.0, 34.0, 100.0)),
    )


def make_script(seed: int) -> Script:
    """The script of a seed."""
    rng = Random(seed)
    settings = make_settings(seed, rng)
    ids = settings.ids
    keys = tuple(sorted(key for key in KEYS if rng.random() < 0.4))
    deck = Deck(rng, ids, keys)
    files = tuple(
        (FILES[IDS.index(model_id)], text_of([some_doc(rng, model_id, keys)]))
        for model_id in ids
        if rng.random() < 0.8
    )
    with_faults = rng.random() < 0.85
    share = rng.choice((0.2, 0.4, 0.7))
    drawn = [
        name
        for name, kind in KINDS.items()
        if name in _ALWAYS or (rng.random() < share and (with_faults or not kind.fault))
    ]
    acts = tuple(
        _draw(deck, drawn, paused=rng.random() < 0.7)
        for _ in range(rng.choice((6, 10, 16, 24, 36)))
    )
    return Script(settings, files, acts)


def _draw(deck: Deck, names: list[str], *, paused: bool) -> Act:
    name = deck.rng.choices(names, [KINDS[n].weight for n in names])[0]
    after_s = deck.rng.choice(PAUSES) if paused else 0.0
    if deck.rng.random() < 0.02:
        after_s = deck.rng.choice(LONG_PAUSES)
    return Act(after_s, name, KINDS[name].make(deck))
