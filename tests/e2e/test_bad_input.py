"""Whatever is done to the files, what served goes on serving, and the log says once what is wrong.

A client calls two models all through this module; one of them is declared by the files that the tests
break. Not one call may fail, and not one may be answered by another version.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.node import Node
from support.served import (
    Callers,
    Sentinel,
    answer_of,
    condition,
    constant,
    declare,
    history,
    loads,
    replace_file,
    write_factory,
)
from support.waiting import eventually

SETTINGS = {"max_models": 20, "settle_s": 0.1, "resync_s": 0.3, "max_workers": 20}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("bad-input") / "desired"
    directory.mkdir()
    write_factory(directory)
    declare(directory, "good", config=constant(1.0))
    declare(directory, "victim", config=constant(2.0))
    with Node(directory, SETTINGS) as node:
        node.wait_phase("good", "Ready")
        node.wait_phase("victim", "Ready")
        with Callers(node, "good") as good, Callers(node, "victim") as victim:
            yield node
        assert {float(answer[0, 0]) for answer in good.answers[0]} == {1.0}
        assert {float(answer[0, 0]) for answer in victim.answers[0]} == {2.0}
        assert loads(node, "good") == loads(node, "victim") == 1
        assert not node.find("Traceback")


@pytest.fixture(scope="module")
def sentinel(node: Node) -> Sentinel:
    return Sentinel(node)


@pytest.fixture
def file(node: Node) -> Iterator[Path]:
    """The file of the model that is broken; put right again afterwards."""
    yield node.directory / "victim.yaml"
    declare(node.directory, "victim", config=constant(2.0))
    eventually(
        lambda: condition(node.status("victim"), "Accepted")["reason"] == "SpecAccepted",
        "the victim is well again",
    )


def said_once(node: Node, sentinel: Sentinel, *parts: str) -> str:
    """The one line that tells of a problem with all these words; it is not said again later."""

    def found() -> list[str]:
        lines = node.find("event=Problem")
        return [line for line in lines if all(part in line for part in parts)]

    eventually(found, f"a problem is logged: {parts}")
    sentinel.passes()
    (line,) = found()
    return line.split("msg=", 1)[1]


def assert_resolved(node: Node, problem: str) -> None:
    eventually(
        lambda: any(problem in line for line in node.find("event=Resolved")),
        f"it is said that this is resolved: {problem}",
    )


def assert_kept(node: Node, why: str, reason: str = "KeptLastGood") -> None:
    status = node.status("victim")
    assert status["phase"] == "Ready"
    assert status["sync"] == "Unknown"
    accepted = condition(status, "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", reason)
    assert why in accepted["message"]
    assert answer_of(node, "victim") == 2.0


def test_a_value_of_the_wrong_type_keeps_the_last_good_spec_serving(
    node: Node, sentinel: Sentinel, file: Path
) -> None:
    good = file.read_text()
    replace_file(file, good + 'max_memory_mb: "4gb"\n')
    line = len(good.splitlines()) + 1
    place = f"victim.yaml:{line}:16  max_memory_mb: "
    problem = said_once(node, sentinel, place, "4gb")
    assert "expected an integer" in problem
    assert_kept(node, "victim.yaml:")
    replace_file(file, good)
    assert_resolved(node, place)


def test_an_unknown_key_names_the_known_one(node: Node, sentinel: Sentinel, file: Path) -> None:
    good = file.read_text()
    replace_file(file, "max_memroy_mb: 5\n" + good)
    said_once(node, sentinel, "victim.yaml:1:1  max_memroy_mb: ", "max_memory_mb")
    assert_kept(node, "victim.yaml:")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\x00\x9f\xff binary", "victim.yaml:1:2  expected text in UTF-8, got the byte 0x9f"),
        (b"model_id: [open\n", "victim.yaml:1:11  expected a list that ends with `]`"),
        (b"- a list\n", "victim.yaml:1:1  expected a model as `key: value` lines, got "),
        (b"", "victim.yaml:1:1  expected a model, got an empty file"),
    ],
    ids=["bytes", "syntax", "list", "empty"],
)
def test_garbage_keeps_the_last_good_spec_serving(
    node: Node, sentinel: Sentinel, file: Path, content: bytes, place: str
) -> None:
    before = len(node.find("event=Problem"))
    replace_file(file, content)
    eventually(lambda: len(node.find("event=Problem")) > before, "the garbage is noticed")
    sentinel.passes()
    new = node.find("event=Problem")[before:]
    assert len(new) == 1
    assert place in new[0]
    assert_kept(node, "victim.yaml:")
    declare(node.directory, "victim", config=constant(2.0))
    assert_resolved(node, place)


def test_a_half_written_file_is_taken_when_the_rest_is_there(
    node: Node, sentinel: Sentinel
) -> None:
    path = node.directory / "half.yaml"
    text = "model_id: half\nmodel_path: nets:constant\nconfig:\n  kwargs: {value: 5.0}\n"
    cut = text.index("5.0")
    with path.open("w") as file:
        file.write(text[:cut])
        file.flush()
        said_once(node, sentinel, "half.yaml:")
        assert node.status("half") == {}
        file.write(text[cut:])
    node.wait_phase("half", "Ready")
    assert answer_of(node, "half") == 5.0
    assert loads(node, "half") == 1
    assert_resolved(node, "half.yaml:")


def test_a_second_file_of_the_same_id_changes_nothing_and_both_are_named(
    node: Node, sentinel: Sentinel
) -> None:
    other = node.directory / "other.yaml"
    replace_file(other, (node.directory / "victim.yaml").read_text().replace("2.0", "9.0"))
    problem = said_once(node, sentinel, "other.yaml:1", "victim is declared by victim.yaml:1 too")
    said_once(node, sentinel, "victim.yaml:1", "victim is declared by other.yaml:1 too")
    assert_kept(node, "declared more than once: other.yaml:1 and victim.yaml:1", "Conflict")
    other.unlink()
    assert_resolved(node, problem)
    eventually(lambda: node.status("victim")["sync"] == "Synced", "the conflict is over")


def test_a_directory_that_vanishes_and_comes_back_unloads_nothing(
    node: Node, sentinel: Sentinel
) -> None:
    before = history(node.status("good"))
    away = node.directory.with_name("away")
    node.directory.rename(away)
    eventually(lambda: node.find("does not exist"), "the missing directory is noticed")
    eventually(lambda: node.status("good")["sync"] == "Unknown", "the status says so")
    status = node.status("good")
    assert condition(status, "Accepted")["reason"] == "SourceUnavailable"
    assert (status["phase"], answer_of(node, "good")) == ("Ready", 1.0)
    away.rename(node.directory)
    assert_resolved(node, "does not exist")
    sentinel.passes()
    assert len([line for line in node.find("event=Problem") if "does not exist" in line]) == 1
    status = node.status("good")
    assert (status["sync"], history(status)) == ("Synced", before)


def test_a_link_that_leads_nowhere_keeps_the_last_good_spec_serving(
    node: Node, sentinel: Sentinel, file: Path
) -> None:
    real = node.directory / ".victim-real"
    file.rename(real)
    file.symlink_to(".victim-real")
    sentinel.passes()
    real.unlink()
    problem = said_once(node, sentinel, "victim.yaml  cannot be read: the link leads nowhere")
    assert_kept(node, "cannot be read: the link leads nowhere")
    declare(node.directory, "victim", config=constant(2.0))
    assert_resolved(node, problem)


def test_one_bad_document_of_a_file_does_not_hold_up_the_other(
    node: Node, sentinel: Sentinel
) -> None:
    path = node.directory / "several.yaml"
    first = "model_id: first-of-two\nmodel_path: nets:constant\n"
    replace_file(path, f"{first}---\nmodel_id: second-of-two\npriority: high\n")
    node.wait_phase("first-of-two", "Ready")
    said_once(node, sentinel, "several.yaml:5:11  priority: expected an integer")
    assert node.status("second-of-two") == {}


def test_an_invalid_server_file_keeps_the_settings(node: Node, sentinel: Sentinel) -> None:
    path = node.directory / "server.yaml"
    good = path.read_text()
    replace_file(path, good.replace('"max_models": 20', '"max_models": "many"'))
    problem = said_once(node, sentinel, "server.yaml:1:", "max_models: expected an integer")
    assert not node.find("event=SettingChanged")
    replace_file(path, good)
    assert_resolved(node, problem)
