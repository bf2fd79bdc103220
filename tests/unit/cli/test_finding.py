"""Which directory and which node is meant, and what is said where there is none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from splitlearn_manager.cli import finding
from splitlearn_manager.cli.asking import NodeSilent
from splitlearn_manager.cli.finding import running_nodes, split_targets
from splitlearn_manager.server.control import Answer, ControlSocket
from splitlearn_manager.server.signpost import Signpost
from splitlearn_manager.server.state_dir import socket_of, state_dir_for
from support.command_line import Run
from support.fake_node import FakeNode, model, node

START = "To start one: splitlearn-manager reconcile run"


def made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


# What is meant.


def test_the_last_word_is_the_directory_if_it_is_one(here: Path) -> None:
    made(here / "desired")
    assert split_targets([]) == ((), None)
    assert split_targets(["bert", "minilm"]) == (("bert", "minilm"), None)
    assert split_targets(["bert", "desired"]) == (("bert",), Path("desired"))
    assert split_targets(["bert", "/absent"]) == (("bert",), Path("/absent"))
    assert split_targets(["."]) == ((), Path("."))
    assert split_targets(["desired", "bert"]) == (("desired", "bert"), None)


def test_a_directory_that_is_named_is_meant(here: Path, reconcile: Run) -> None:
    with FakeNode(made(here / "a"), model("one")), FakeNode(made(here / "b"), model("two")):
        assert "one" in reconcile("status", "a").out
        assert "two" in reconcile("status", "b/").out
        assert "two" in reconcile("status", here / "b").out


def test_desired_in_the_working_directory_is_meant_if_none_is_named(
    here: Path, reconcile: Run
) -> None:
    with FakeNode(made(here / "desired"), model("one")), FakeNode(made(here / "b"), model("two")):
        assert "one" in reconcile("status").out
        assert "two" not in reconcile("status").out


def test_without_one_the_only_node_is_meant(here: Path, reconcile: Run) -> None:
    with FakeNode(made(here.parent / "elsewhere"), model("one")):
        assert "one" in reconcile("status").out


def test_of_several_nodes_one_must_be_named(here: Path, reconcile: Run) -> None:
    with FakeNode(made(here / "a")), FakeNode(made(here / "b")):
        done = reconcile("status")
    assert (done.code, done.out) == (2, "")
    running = f"(running: a (process {os.getpid()}), b (process {os.getpid()}))"
    assert done.err == f"which node? {running}. Name its directory.\n"


def test_a_node_is_found_by_another_way_to_its_directory(here: Path, reconcile: Run) -> None:
    made(here / "real")
    (here / "link").symlink_to("real")
    with FakeNode(here / "link", model("one")):
        assert "one" in reconcile("status", "./x/../link").out


def test_a_node_with_a_state_directory_of_its_own_is_found_by_its_signpost(
    here: Path, reconcile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, elsewhere = made(here / "desired"), made(here / "var") / "node.sock"
    answers: dict[str, Answer] = {
        "status": lambda question: {"node": node(directory), "models": [model("one")]}
    }
    control = ControlSocket(elsewhere, answers)
    signpost = Signpost(directory, elsewhere)
    assert "one" in reconcile("status").out
    assert [n.socket for n in running_nodes()] == [socket_of(state_dir_for(directory))]
    signpost.take_down()
    done = reconcile("status")
    assert (done.code, "no node serves desired" in done.err) == (2, True)
    # Without a signpost the setting says where, be it in the directory's file or in another one.
    (directory / "server.yaml").write_text("state_dir: ../var\n")
    assert "one" in reconcile("status").out
    monkeypatch.setenv("HOME", str(here))
    (directory / "server.yaml").write_text("state_dir: ~/var\n")
    assert "one" in reconcile("status").out
    (directory / "server.yaml").unlink()
    (here / "other.yaml").write_text("state_dir: var\n")
    assert "one" in reconcile("status", "--server-config", "other.yaml").out
    # A server file that is broken now is no reason not to find the node that runs.
    Signpost(directory, elsewhere)
    (directory / "server.yaml").write_text("state_dir: [\n")
    assert "one" in reconcile("status").out
    control.close()


def test_a_signpost_never_takes_the_place_of_a_node_that_answers(
    here: Path, reconcile: Run
) -> None:
    directory = made(here / "desired")
    with FakeNode(directory, model("one")):
        signpost = Signpost(directory, here / "another.sock")
        assert not signpost.stands
        signpost.take_down()
        assert "one" in reconcile("status").out


def test_a_path_that_is_too_long_for_a_socket_is_no_obstacle(
    here: Path, reconcile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(here / ("long" * 40)))
    with FakeNode(made(here.parent / "elsewhere"), model("one")) as fake:
        assert fake.socket.parent == here.parent
        assert "one" in reconcile("status", here.parent / "elsewhere").out
        assert "one" in reconcile("status").out


# Where there is none.


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["events"],
        ["wait"],
        ["apply"],
        ["explain", "bert"],
        ["history", "bert"],
        ["suspend", "bert"],
        ["resume", "bert"],
        ["retry", "bert"],
        ["golden", "bert"],
    ],
)
def test_without_a_node_a_command_says_so_in_a_sentence(
    here: Path, reconcile: Run, command: list[str]
) -> None:
    done = reconcile(*command)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"no node of yours is running, and there is no desired/ here. {START} DIRECTORY\n"
    )
    made(here / "models")
    done = reconcile(*command, "models/")
    assert (done.code, done.out) == (2, "")
    socket_path = socket_of(state_dir_for("models"))
    assert done.err == (f"no node serves models: nobody listens on {socket_path}. {START} models\n")
    made(here / "my models")
    assert reconcile("status", "my models").err.endswith(f". {START} 'my models'\n")


def test_a_node_that_crashed_is_said_to_have_ended(here: Path, reconcile: Run) -> None:
    made(here / "desired")
    place = socket_of(state_dir_for("desired"))
    made(place.parent)
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(place))
    done = reconcile("status")
    assert done.code == 2
    assert done.err == (
        f"no node serves desired: the one that listened on {place} ended without cleaning up. "
        f"{START} desired\n"
    )


def test_other_nodes_are_named_where_the_wrong_one_was_asked_for(
    here: Path, reconcile: Run
) -> None:
    made(here / "desired")
    with FakeNode(made(here / "models")):
        running = f"(running: models (process {os.getpid()}))"
        assert running in reconcile("status").err
        assert reconcile("status", "model/").err == (
            f"model: there is no such directory, and no node serves it {running}\n"
        )


def test_a_file_in_the_place_of_a_directory_is_named(here: Path, reconcile: Run) -> None:
    (here / "bert.yaml").touch()
    done = reconcile("status", "./bert.yaml")
    assert done.code == 2
    assert done.err == "bert.yaml: expected a directory of YAML files, got a file\n"


def test_a_node_of_another_directory_is_not_taken_for_the_one_that_is_meant(
    here: Path, reconcile: Run
) -> None:
    made(here / "desired")
    with FakeNode(here / "desired") as fake:
        fake.about = node("/srv/other")
        done = reconcile("suspend", "bert")
    assert done.code == 2
    assert done.err.endswith(" serves /srv/other, not desired\n")
    assert fake.questions("suspend") == []


def test_another_users_node_is_said_to_be_one(
    here: Path, reconcile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(here / "desired")
    with FakeNode(here / "desired"):
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        done = reconcile("status")
    assert done.code == 2
    assert done.err.startswith("the node that serves desired cannot be asked: ")
    assert done.err.endswith("Only the user who started it may.\n")


def test_a_node_that_hangs_is_named_with_what_to_do(
    here: Path, reconcile: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(here / "desired")
    with FakeNode(here / "desired") as fake:
        (fake.socket.parent / "lock").write_text("4711\n")

        def hangs(*args: object, **kwargs: object) -> dict[str, object]:
            raise NodeSilent("the node has said nothing for 10 s")

        monkeypatch.setattr(finding, "ask", hangs)
        done = reconcile("status")
    assert done.code == 2
    assert done.err == (
        "the node that serves desired (process 4711) does not answer: the node has said nothing for "
        "10 s. It is stopped, hangs or is overloaded. If it stays so, end it with `kill -9 4711` and "
        "start it again: what it had accepted is kept.\n"
    )


# Commands that need no node.


@pytest.mark.parametrize("command", ["run", "once", "plan", "validate"])
def test_without_a_directory_a_command_asks_for_one(
    here: Path, reconcile: Run, command: str
) -> None:
    done = reconcile(command)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "which directory? There is no desired/ here. Name one, as in: "
        f"splitlearn-manager reconcile {command} DIRECTORY\n"
    )
    for wrong, said in (
        ("absent", "there is no such directory"),
        ("file.yaml", "expected a directory of YAML files, got a file"),
    ):
        (here / "file.yaml").touch()
        done = reconcile(command, wrong)
        assert (done.code, done.out, done.err) == (2, "", f"{wrong}: {said}\n")
