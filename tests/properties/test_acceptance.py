"""Acceptance against an independent model of what a directory held, look by look.

The model knows the true bytes and fingerprints at each look, and judges what acceptance said by the
rules of the specification, stated over that history rather than as acceptance computes them. Each test
was seen to fail on the bug that its docstring names.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from splitlearn_manager.config.files import DirEntry
from splitlearn_manager.config.yaml_source import parse_models
from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import DesiredModel, DesiredState
from support.desired_lab import ROOT, SETTLE_S, WEIGHTS, DesiredLab

FILES = ("a.yaml", "b.yaml", "sub/c.yaml")
IDS = ("mx", "my")
AWAY = "/away"
EPSILON_S = 1e-6

Document = tuple[str, int]
"""(model_id, priority)"""


# -- contents, in spellings that mean the same


def plain(model_id: str, priority: int) -> str:
    return f"model_id: {model_id}\nmodel_path: {WEIGHTS}\npriority: {priority}\n"


def commented(model_id: str, priority: int) -> str:
    return f"# why\n{plain(model_id, priority)}# end\n"


def reordered(model_id: str, priority: int) -> str:
    return f"priority: {priority}\n\nmodel_path: '{WEIGHTS}'\nmodel_id:   {model_id}\n"


def flow(model_id: str, priority: int) -> str:
    return f"{{model_path: {WEIGHTS}, priority: {priority}, model_id: {model_id}}}\n"


Spelling = Callable[[str, int], str]
SPELLINGS: tuple[Spelling, ...] = (plain, commented, reordered, flow)
BROKEN = (b"", b"model_id: [", b"model_id: mx\nmodel_path: 3\n", b"other: my\n", b"\xff")


def content(documents: Iterable[Document], spelling: Spelling) -> bytes:
    return "---\n".join(spelling(*document) for document in documents).encode()


document = st.tuples(st.sampled_from(IDS), st.integers(0, 2))
contents = st.builds(
    content, st.lists(document, min_size=1, max_size=2), st.sampled_from(SPELLINGS)
)
valid_contents = st.builds(
    content,
    st.lists(document, min_size=1, max_size=2, unique_by=lambda found: found[0]),
    st.sampled_from(SPELLINGS),
)
names = st.sampled_from(FILES)


@functools.lru_cache(maxsize=4096)
def meaning(data: bytes) -> tuple[tuple[Document, ...], bool]:
    """The valid documents of some bytes, and whether that is all they say."""
    parsed = parse_models(data, file="f", base_dir=Path(ROOT))
    valid = tuple((m.config.model_id, m.config.priority) for m in parsed.models)
    return valid, not parsed.problems


# -- the truth at one look


@dataclass(frozen=True)
class Seen:
    """One file; data is None where it cannot be read."""

    mark: object
    data: bytes | None

    def declares(self, model_id: str) -> list[int]:
        valid = meaning(self.data)[0] if self.data is not None else ()
        return [priority for found, priority in valid if found == model_id]

    @property
    def faulty(self) -> bool:
        return self.data is None or not meaning(self.data)[1]

    def could_declare(self, model_id: str) -> bool:
        if self.data is None or self.declares(model_id):
            return True
        return self.faulty and model_id.encode() in self.data


@dataclass(frozen=True)
class Truth:
    """The whole directory at one look; root is None where it is not there."""

    now: float
    root: object
    complete: bool
    files: dict[str, Seen]


def truth(lab: DesiredLab) -> Truth:
    fs = lab.fs
    if not fs.exists(ROOT):
        return Truth(lab.now, None, False, {})
    stat = fs.stat(ROOT)
    sub_readable = f"{ROOT}/sub" not in fs._faults
    files = {}
    for name in FILES:
        path = lab.path(name)
        if not fs.exists(path) or (name.startswith("sub/") and not sub_readable):
            continue
        readable = path not in fs._faults
        mark = fs.stat(path).fingerprint if readable else "unreadable"
        files[name] = Seen(mark, fs.content(path) if readable else None)
    return Truth(lab.now, (stat.dev, stat.inode), sub_readable, files)


def is_settled(history: list[Truth], name: str) -> bool:
    """Looks at least settle_s apart, up to the last one, saw the file with one fingerprint throughout."""
    last = history[-1]
    for then in reversed(history):
        seen = then.files.get(name)
        if seen is None and then.complete:
            return False
        if seen is not None:
            if seen.mark != last.files[name].mark:
                return False
            if last.now - then.now >= SETTLE_S - EPSILON_S:
                return True
    return False


def may_change(
    history: list[Truth], before: Mapping[str, DesiredModel], model_id: str, priority: int
) -> str | None:
    """Why an id must not have become a new spec at the last look; None when it may (I7)."""
    last = history[-1]
    settled = [name for name in last.files if is_settled(history, name)]
    declared = [(n, p) for n in settled for p in last.files[n].declares(model_id)]
    if len(declared) != 1:
        return f"declared by {declared}"
    if declared[0][1] != priority:
        return f"declared with priority {declared[0][1]}"
    old = before[model_id].source.file if model_id in before else ""
    if old in last.files and old != declared[0][0] and not gave_up(history, old, model_id):
        if old not in settled:
            return f"{old} has not settled"
        if last.files[old].faulty:
            return f"{old} is invalid or unreadable"
    return None


def gave_up(history: list[Truth], name: str, model_id: str) -> bool:
    """A file that once declared the id has, since, been gone for good or been right without it."""
    for end in range(len(history), 0, -1):
        seen = history[end - 1].files.get(name)
        if seen is None and is_gone_for_good(history[:end], name):
            return True
        if seen and not seen.faulty and is_settled(history[:end], name):
            return not seen.declares(model_id)
    return False


def is_gone_for_good(history: list[Truth], name: str) -> bool:
    last = history[-1]
    for then in reversed(history):
        if not then.complete or then.root != last.root or name in then.files:
            return False
        if last.now - then.now >= SETTLE_S - EPSILON_S:
            return True
    return False


def absence_is_proven(history: list[Truth], model_id: str) -> bool:
    """Two complete looks at one directory, settle_s apart: none of the files could declare the id (I8).

    A file whose fingerprint is the same at both looks counts with its later bytes: two writes within one
    tick of the clock are one write for whoever looks.
    """
    last = history[-1]
    if not all(is_settled(history, name) for name in last.files):
        return False
    for then in reversed(history):
        if not then.complete or then.root != last.root:
            return False
        then_seen = [
            last.files[name] if name in last.files and last.files[name].mark == seen.mark else seen
            for name, seen in then.files.items()
        ]
        nobody = not any(f.could_declare(model_id) for f in (*then_seen, *last.files.values()))
        if nobody and last.now - then.now >= SETTLE_S - EPSILON_S:
            return True
    return False


def backwards(entries: list[DirEntry]) -> list[DirEntry]:
    return sorted(entries, key=lambda entry: entry.name, reverse=True)


# -- the machines


def lab_path(name: str) -> str:
    return f"{ROOT}/{name}"


def remembered(state: DesiredState) -> dict[str, DesiredModel]:
    """All that was accepted, whether or not a look has decided about it since the last start."""
    return {**state.models, **state.undecided}


class World(RuleBasedStateMachine):
    """Three sources look at one directory: at each look, at each look with the listing reversed, seldom.

    The second one works on all files and ids at each look, whether or not they have changed. The first
    two are restarted now and then; the seldom one never is. `history` has the looks since the last start,
    for a new process has seen nothing before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lab = DesiredLab()
        self.lab.fs.mkdir(lab_path("sub"))
        self.reversed = DesiredSource(ROOT, self.lab.fs, SETTLE_S)
        self.seldom = DesiredSource(ROOT, self.lab.fs, SETTLE_S)
        self.history: list[Truth] = []
        self.state = DesiredState()

    @initialize(files=st.dictionaries(names, valid_contents, max_size=2), stats=st.booleans())
    def begin(self, files: dict[str, bytes], stats: bool = False) -> None:
        """Start where something is accepted already: there is more to lose."""
        self.lab.fs.lists_stats = stats
        for name, data in sorted(files.items()):
            self.lab.fs.write(lab_path(name), data)
        for _ in range(3):
            self.look(SETTLE_S, 0)
        self.lab.pass_time(1.0)

    @property
    def present(self) -> bool:
        return self.lab.fs.exists(ROOT)

    def has(self, name: str) -> bool:
        return self.lab.fs.exists(lab_path(name))

    @precondition(lambda self: self.present)
    @rule(name=names, data=contents, atomic=st.booleans())
    def write(self, name: str, data: bytes, atomic: bool) -> None:
        (self.lab.fs.replace if atomic else self.lab.fs.write)(lab_path(name), data)

    @precondition(lambda self: self.present)
    @rule(name=names)
    def delete(self, name: str) -> None:
        if self.has(name):
            self.lab.fs.delete(lab_path(name))

    @precondition(lambda self: self.present)
    @rule(old=names, new=names)
    def rename(self, old: str, new: str) -> None:
        if self.has(old) and old != new:
            self.lab.fs.rename(lab_path(old), lab_path(new))

    @rule(model_id=st.sampled_from(IDS))
    def suspend_or_resume(self, model_id: str) -> None:
        self.lab.suspend(*({model_id} ^ self.lab.instructions.suspended))

    @rule()
    def restart(self) -> None:
        self.lab.restart()
        self.reversed = DesiredSource(ROOT, self.lab.fs, SETTLE_S)
        self.reversed.restore(self.lab.recorded)
        self.history = []

    # looking

    @rule(after=st.sampled_from((0.0, 0.05, 0.1, 0.2, SETTLE_S, 1.0)), seldom=st.integers(0, 4))
    def look(self, after: float, seldom: int) -> None:
        self.lab.pass_time(after)
        before, self.state = self.state, self.lab.look()
        self.history.append(truth(self.lab))
        self.lab.fs.order = backwards
        self.reversed._acceptance.distrust()
        assert self.reversed.look(self.lab.now, self.lab.instructions) == self.state  # I1
        self.lab.fs.order = lambda entries: entries
        if seldom == 0:
            self.seldom.look(self.lab.now, self.lab.instructions)
        self.judge(before)

    @rule()
    def look_when_settled(self) -> None:
        self.look(SETTLE_S, 1)

    @rule()
    def come_to_rest(self) -> None:
        for _ in range(3):
            self.look(SETTLE_S, 1)
        assert self.state.next_check_s is None
        assert self.lab.look() is self.state
        end = self.history[-1]
        self.judge_end(self.state, end)
        for _ in range(3):  # I4: how often one looked before does not matter
            self.lab.pass_time(SETTLE_S)
            seldom = self.seldom.look(self.lab.now, self.lab.instructions)
        self.judge_end(seldom, end)
        fresh = DesiredSource(ROOT, self.lab.fs, SETTLE_S)
        for _ in range(2):  # I15: nor does anything that was there before
            fresh_state = fresh.look(self.lab.now)
            self.lab.pass_time(SETTLE_S)
        self.judge_end(fresh_state, end)

    # judging

    def judge(self, before: DesiredState) -> None:
        state, last = self.state, self.history[-1]
        assert state.source_available == (last.root is not None)
        assert not state.models.keys() & state.undecided.keys()
        assert state.undecided.keys() <= before.undecided.keys() or len(self.history) == 1
        old_models, new_models = remembered(before), remembered(state)
        for model_id in sorted({*old_models, *new_models}):
            old, new = old_models.get(model_id), new_models.get(model_id)
            if new is None:
                assert absence_is_proven(self.history, model_id), f"{model_id} was pruned"
                assert model_id not in self.lab.instructions.suspended
            elif old is None or old.spec_hash != new.spec_hash:
                priority = new.config.priority
                why_not = may_change(self.history, old_models, model_id, priority)
                assert why_not is None, f"{model_id} changed: {why_not}"
                assert model_id not in self.lab.instructions.suspended
                assert new.held is None
                assert old is None or new.generation == old.generation + 1
                assert new.seen_at <= new.accepted_at == last.now
            else:
                assert (new.generation, new.config) == (old.generation, old.config)  # I12
                assert (new.accepted_at, new.seen_at) == (old.accepted_at, old.seen_at)

    def judge_end(self, state: DesiredState, end: Truth) -> None:
        """At rest, where nothing is held for the sake of a fault, the files alone decide."""
        assert not state.undecided
        if not end.complete or any(seen.faulty for seen in end.files.values()):
            return
        for model_id in IDS:
            declared = [p for seen in end.files.values() for p in seen.declares(model_id)]
            if len(declared) > 1:
                assert model_id in state.conflicts
                continue
            assert model_id not in state.conflicts
            if model_id in self.lab.instructions.suspended:
                continue
            accepted = [m.config.priority for i, m in state.models.items() if i == model_id]
            assert accepted == declared
            assert all(state.models[model_id].held is None for _ in declared)
        assert not state.problems or state.conflicts


class Editing(World):
    """What writers do to files."""

    def __init__(self) -> None:
        super().__init__()
        self.rest: dict[str, bytes] = {}

    @rule(name=names, data=contents, cut=st.floats(0, 1))
    def write_a_part(self, name: str, data: bytes, cut: float) -> None:
        at = int(len(data) * cut)
        self.lab.fs.write(lab_path(name), data[:at])
        self.rest[name] = data[at:]

    @precondition(lambda self: self.rest)
    @rule(data=st.data())
    def append_the_rest(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.rest)))
        rest = self.rest.pop(name)
        if self.has(name):
            self.lab.fs.append(lab_path(name), rest)

    @rule(name=names)
    def change_one_byte(self, name: str) -> None:
        if self.has(name):
            old = self.lab.fs.content(lab_path(name))
            self.lab.fs.write(lab_path(name), old.translate(bytes.maketrans(b"012", b"120")))

    @rule(name=names, data=st.sampled_from(BROKEN))
    def make_invalid(self, name: str, data: bytes) -> None:
        self.lab.fs.write(lab_path(name), data)

    @rule(name=names, lie=st.booleans())
    def touch(self, name: str, lie: bool) -> None:
        if self.has(name):
            self.lab.fs.touch(lab_path(name), 0 if lie else None)


class Outages(World):
    """What happens to files and directories that nobody edits."""

    @rule(name=st.sampled_from((*FILES, "sub", "sub")))
    def turn_permissions(self, name: str) -> None:
        path = lab_path(name)
        if path in self.lab.fs._faults:
            self.lab.fs.heal(path)
        else:
            self.lab.fs.fail(path, errno.EACCES)

    @precondition(lambda self: self.present)
    @rule()
    def root_vanishes(self) -> None:
        self.lab.fs.rename(ROOT, AWAY)

    @precondition(lambda self: not self.present)
    @rule()
    def root_returns(self) -> None:
        self.lab.fs.rename(AWAY, ROOT)

    @rule()
    def root_is_replaced_by_an_empty_one(self) -> None:
        old = ROOT if self.present else AWAY
        self.lab.fs.rename(old, "/old")
        self.lab.fs.mkdir(ROOT)
        self.lab.fs.mkdir(lab_path("sub"))
        self.lab.fs.delete("/old")


MACHINE = settings(
    max_examples=200,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_whatever_writers_do_acceptance_agrees_with_the_model() -> None:
    """I7, I12, and I1, I4, I15 as far as they concern acceptance.

    Failed when an invalid file lost the ids that it had declared; when the claim of a file that is being
    edited was ignored; and when a settled file was never read a second time.
    """
    run_state_machine_as_test(Editing, settings=MACHINE)


def test_whatever_vanishes_or_cannot_be_read_acceptance_agrees_with_the_model() -> None:
    """I8, and I7 for what is unreadable or out of sight.

    Failed when any two looks settled a file, however close together.
    """
    run_state_machine_as_test(Outages, settings=MACHINE)


# -- smaller worlds, each for one property

SMALL = settings(max_examples=60, deadline=None)

Event = Callable[[Outages], None]


@dataclass(frozen=True)
class Put:
    """Write a file in place; None deletes it."""

    name: str
    data: bytes | None = None

    def __call__(self, world: Outages) -> None:
        if not world.present:
            return
        if self.data is None:
            world.delete(self.name)
        else:
            world.write(self.name, self.data, False)


def vanish_or_return(world: Outages) -> None:
    (world.root_vanishes if world.present else world.root_returns)()


def nothing(world: Outages) -> None:
    """Only time passes."""


def play(first: dict[str, bytes], steps: Iterable[tuple[Event, float]]) -> None:
    """Accept `first`, then let things happen, and judge each look."""
    world = Outages()
    world.begin(first)
    for event, after in steps:
        event(world)
        world.look(after, 1)
    if not world.present:
        world.root_returns()
    world.come_to_rest()


def steps_of(events: Iterable[Event], most: int) -> st.SearchStrategy[list[tuple[Event, float]]]:
    pauses = st.sampled_from((0.0, 0.1, 0.2, SETTLE_S))
    return st.lists(st.tuples(st.sampled_from(list(events)), pauses), min_size=1, max_size=most)


BOTH = content([("mx", 1), ("my", 1)], plain)
ONLY_MY = content([("my", 1)], plain)
GONE = (Put("a.yaml"), Put("a.yaml", ONLY_MY))
MEANWHILE = (
    nothing,
    vanish_or_return,
    Outages.root_is_replaced_by_an_empty_one,
    functools.partial(Outages.turn_permissions, name="sub"),
    Put("b.yaml", plain("mx", 1).encode()),
    Put("b.yaml", b"model_id: mx"),
    Put("b.yaml", b"# nothing yet"),
    Put("b.yaml"),
)


@settings(max_examples=400, deadline=None)
@given(
    steps_of(MEANWHILE, 2),
    st.sampled_from(GONE),
    st.sampled_from((0.0, 0.1)),
    steps_of(MEANWHILE, 4),
)
def test_an_id_that_left_its_file_is_pruned_only_on_proof(
    before: list[tuple[Event, float]],
    gone: Event,
    after: float,
    steps: list[tuple[Event, float]],
) -> None:
    """I8.

    Failed when one complete scan after incomplete ones was enough; when a file that is still changing did
    not block pruning; and when a file that came and went unread did not.
    """
    play({"a.yaml": BOTH}, [*before, (gone, after), *steps])


RIVALS = tuple(
    Put(name, data)
    for name in ("a.yaml", "b.yaml")
    for data in (
        *(plain("mx", priority).encode() for priority in (1, 2)),
        b"model_id: mx\nmodel_path: [",
        ONLY_MY,
    )
)


@settings(max_examples=400, deadline=None)
@given(steps_of((nothing, Put("a.yaml"), Put("b.yaml"), *RIVALS), 6))
def test_an_id_changes_only_by_the_one_settled_file_that_declares_it(
    steps: list[tuple[Event, float]],
) -> None:
    """I7.

    Failed when an invalid file lost the ids that it had declared, and when bytes that were read before the
    file had settled were taken for its content.
    """
    play({"a.yaml": plain("mx", 0).encode()}, steps)


neutral_steps = st.lists(
    st.tuples(
        st.sampled_from(("spell", "replace", "touch", "lie", "rename")),
        st.sampled_from(SPELLINGS),
        st.sampled_from((0.0, 0.1, SETTLE_S, 1.0)),
        st.integers(0, 2),
    ),
    max_size=12,
)


@SMALL
@given(neutral_steps)
def test_spelling_touching_and_renaming_never_change_a_generation(
    steps: list[tuple[str, Spelling, float, int]],
) -> None:
    """I12. Failed when a declaration in another file or line counted as a new generation."""
    lab = DesiredLab()
    lab.fs.mkdir(lab.path("sub"))
    name = "a.yaml"
    said = [("mx", 1), ("my", 2)]
    lab.fs.write(lab.path(name), content(said, plain))
    first = lab.settle()
    lab.pass_time(1.0)
    for kind, spelling, after, looks in steps:
        if kind == "spell":
            lab.fs.write(lab.path(name), content(said, spelling))
        elif kind == "replace":
            lab.fs.replace(lab.path(name), content(reversed(said), spelling))
        elif kind == "rename":
            new = FILES[(FILES.index(name) + 1) % len(FILES)]
            lab.rename(name, new)
            name = new
        else:
            lab.fs.touch(lab.path(name), 0 if kind == "lie" else None)
        for _ in range(looks):
            state = lab.look(after)
            assert {i: m.generation for i, m in state.models.items()} == {"mx": 1, "my": 1}
    last = lab.settle()
    assert {i: (m.spec_hash, m.accepted_at) for i, m in last.models.items()} == {
        i: (m.spec_hash, m.accepted_at) for i, m in first.models.items()
    }
    assert {m.source.file for m in last.models.values()} == {name}
    assert not any(m.held for m in last.models.values())


@SMALL
@given(st.dictionaries(names, contents), st.permutations(range(4)))
def test_the_order_in_which_files_are_listed_does_not_matter(
    files: dict[str, bytes], order: list[int]
) -> None:
    """I1. Failed when, of several declarations of an id, the one listed first was accepted."""
    states = []
    for shuffled in (False, True):
        lab = DesiredLab()
        lab.fs.mkdir(lab.path("sub"))
        for name, data in sorted(files.items()):
            lab.fs.write(lab.path(name), data)
        if shuffled:
            lab.fs.order = lambda entries: [entries[i] for i in order if i < len(entries)]
        states.append([lab.look(), lab.settle()])
    assert states[0] == states[1]


@SMALL
@given(
    st.lists(st.tuples(names, valid_contents, st.booleans()), min_size=1, max_size=6),
    st.lists(st.sampled_from((0.0, 0.1, SETTLE_S)), max_size=12),
)
def test_the_end_depends_on_the_last_content_only(
    writes: list[tuple[str, bytes, bool]], looks: list[float]
) -> None:
    """I4 and I15: however often one looked in between, and whatever was there before.

    Failed when a settled file was never read a second time.
    """
    lab = DesiredLab()
    lab.fs.mkdir(lab.path("sub"))
    pauses = iter(looks)
    for name, data, atomic in writes:
        (lab.fs.replace if atomic else lab.fs.write)(lab.path(name), data)
        for pause in (next(pauses, None), next(pauses, None)):
            if pause is not None:
                lab.look(pause)
    end = lab.settle()
    fresh = DesiredSource(ROOT, lab.fs, SETTLE_S)
    fresh.look(lab.now)
    expected = fresh.look(lab.now + SETTLE_S)
    assert end.conflicts == expected.conflicts
    assert end.problems == expected.problems
    for model_id in IDS:
        if model_id not in end.conflicts:
            found = [s.models[model_id].spec_hash for s in (end, expected) if model_id in s.models]
            assert len(found) in (0, 2)
            assert len(set(found)) <= 1
