"""What a new process need not parse again, because an earlier one has accepted it from the same bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from splitlearn_manager.desired import reading
from splitlearn_manager.desired.reading import ModelParser
from splitlearn_manager.desired.state import DesiredModel
from splitlearn_manager.desired.tracked_file import Reading
from support.desired_lab import ROOT, DesiredLab, model
from support.loop_lab import LoopLab

TWO = b"---\n".join((model("b", priority=1), model("a", weight=0.1)))
MERGED = b"""\
model_id: m
model_path: "nets:f"
config: {kwargs: {<<: {b: 1.5, \xc3\xa4: [1, null]}, c: "\xe2\x9c\x93"}}
"""


@pytest.fixture
def lab() -> DesiredLab:
    return DesiredLab()


def accepted(read: Reading) -> list[DesiredModel]:
    return [
        DesiredModel(d.config, 1, d.spec_hash, d.load_hash, d.ref, mark=d.mark)
        for d in read.declarations
    ]


def read_again(data: bytes, then: bytes, *, root: str = ROOT) -> tuple[Reading, Reading]:
    """What bytes mean to a process that knows what another one accepted, and to one that does not."""
    parser = ModelParser(Path(root))
    parser.remember(reversed(accepted(ModelParser(Path(ROOT))("sub/f.yaml", data))))
    return parser("sub/f.yaml", then), ModelParser(Path(root))("sub/f.yaml", then)


@pytest.mark.parametrize("data", [model("a"), TWO, MERGED, b"# first\n" + model("a")])
def test_equal_bytes_mean_the_same_and_are_not_parsed(data: bytes, parsed: Counter[str]) -> None:
    known, anew = read_again(data, data)
    assert parsed["sub/f.yaml"] == 2  # by the first process, and by the one that knows nothing
    assert known == anew
    assert [d.config.base_dir for d in known.declarations] == [
        d.config.base_dir for d in anew.declarations
    ]


@pytest.mark.parametrize(
    "then",
    [
        *(model("a"), TWO + b"# more\n", TWO.replace(b"0.1", b"0.2"), b"", b"model_id: ["),
        TWO + b"---\nmodel_id: c\n",
    ],
)
def test_other_bytes_are_parsed(then: bytes, parsed: Counter[str]) -> None:
    known, anew = read_again(TWO, then)
    assert parsed["sub/f.yaml"] == 3
    assert known == anew


def test_a_file_with_problems_is_parsed_again(parsed: Counter[str]) -> None:
    data = TWO + b"---\nmodel_id: c\n"
    known, anew = read_again(data, data)
    assert (parsed["sub/f.yaml"], known) == (3, anew)
    assert known.problems


def test_a_directory_that_has_moved_is_parsed_again(parsed: Counter[str]) -> None:
    known, anew = read_again(TWO, TWO, root="/elsewhere")
    assert (parsed["sub/f.yaml"], known) == (3, anew)


def test_a_program_to_which_bytes_may_mean_something_else_parses_them_again(
    parsed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = accepted(ModelParser(Path(ROOT))("f.yaml", TWO))
    reading._grammar.cache_clear()
    monkeypatch.setattr(reading, "VERSION", "other")
    parser = ModelParser(Path(ROOT))
    parser.remember(before)
    parser("f.yaml", TWO)
    monkeypatch.undo()
    reading._grammar.cache_clear()
    assert before[0].mark
    assert parsed["f.yaml"] == 2


def test_a_restart_parses_only_what_has_changed(lab: DesiredLab, parsed: Counter[str]) -> None:
    lab.accept(one=model("one"), two=TWO, three=model("three"))
    before = lab.settle()
    parsed.clear()
    lab.restart()
    assert lab.settle() == before
    assert not parsed
    lab.restart()
    lab.write("three.yaml", model("three", priority=3))
    assert lab.settle().models["three"].generation == 2
    assert parsed.keys() == {"three.yaml"}


def test_a_file_of_which_another_one_holds_a_model_is_parsed_again(
    lab: DesiredLab, parsed: Counter[str]
) -> None:
    lab.accept(first=model("b", priority=5))
    lab.accept(two=TWO)
    before = lab.settle()
    assert list(before.conflicts) == ["b"]
    parsed.clear()
    lab.restart()
    assert lab.settle() == before
    assert "two.yaml" in parsed


def test_after_an_edit_of_comments_alone_the_next_start_parses_that_file(
    lab: DesiredLab, parsed: Counter[str]
) -> None:
    lab.accept(one=model("one"), two=model("two"))
    lab.accept(one=b"# a comment\n" + model("one"))
    parsed.clear()
    lab.restart()
    state = lab.settle()
    assert parsed.keys() <= {"one.yaml"}
    assert str(state.models["one"].source) == "one.yaml:2"


def test_what_is_written_down_is_enough_to_parse_nothing(parsed: Counter[str]) -> None:
    lab = LoopLab()
    lab.write("a", priority=3, weight=0.1, batch_size=32, max_memory_mb=1000)
    lab.write("b", config={"kwargs": {"ä": [1, None, 2.5], "✓": {"deep": "text"}}})
    lab.settle()
    before = lab.loop.status.models()
    parsed.clear()
    lab.start()
    lab.settle()
    assert not parsed
    generations = [model["generation"] for model in lab.loop.status.models()]
    assert generations == [model["generation"] for model in before] == [1, 1]
