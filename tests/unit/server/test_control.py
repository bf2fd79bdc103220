"""The socket on which a running node is asked, and the asking end of it."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from splitlearn_manager.cli.asking import (
    NodeGone,
    NodeNotRunning,
    NodeSilent,
    NotAllowed,
    Refused,
    ask,
)
from splitlearn_manager.errors import ModelNotFound, ServerError
from splitlearn_manager.server import control as control_module
from splitlearn_manager.server.control import Answer, ControlSocket, Question
from support.waiting import eventually


@contextmanager
def listening(path: Path, **answers: Answer) -> Iterator[Path]:
    control = ControlSocket(path, answers)
    try:
        yield path
    finally:
        control.close()


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        yield connection


def sent(path: Path, data: bytes) -> dict[str, dict[str, str]]:
    """The answer to bytes that are no question that `ask` would send."""
    with connected(path) as connection:
        connection.sendall(data)
        with connection.makefile("rb") as answer:
            return dict(json.loads(answer.read()))


def told(question: Question) -> Mapping[str, object]:
    return {"asked": question.name, **question.arguments}


# Questions and answers.


def test_a_question_is_answered_with_its_arguments_as_often_as_it_is_asked(tmp_path: Path) -> None:
    with listening(tmp_path / "s", status=told) as path:
        for number in (1, 2):
            assert ask(path, "status", model_id="ü", n=number) == {
                "asked": "status",
                "model_id": "ü",
                "n": number,
            }


def test_a_long_answer_arrives_whole(tmp_path: Path) -> None:
    models = [{"model_id": f"m{n}", "text": "x" * 1000} for n in range(5000)]
    with listening(tmp_path / "s", status=lambda question: {"turn": 1, "models": models}) as path:
        assert ask(path, "status") == {"turn": 1, "models": models}


@pytest.mark.parametrize("answer", [{}, {"models": []}, {"a": None, "b": {"c": [1, "\n"]}}])
def test_any_answer_arrives_as_it_was_given(tmp_path: Path, answer: dict[str, object]) -> None:
    with listening(tmp_path / "s", status=lambda question: answer) as path:
        assert ask(path, "status") == answer


def test_an_answer_that_is_json_already_is_passed_on(tmp_path: Path) -> None:
    with listening(tmp_path / "s", observe=lambda question: b'{"observed": [1]}') as path:
        assert ask(path, "observe") == {"observed": [1]}


def test_a_refusal_arrives_with_its_reason_and_message(tmp_path: Path) -> None:
    def explain(question: Question) -> Mapping[str, object]:
        raise ModelNotFound(f"the node has no model {question.text('model_id')!r}")

    with listening(tmp_path / "s", explain=explain) as path:
        with pytest.raises(Refused, match="the node has no model 'bert'") as refused:
            ask(path, "explain", model_id="bert")
        assert refused.value.reason == "ModelNotFound"


# What is no question.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"status\n", "expected a line of JSON"),
        (b"\xff\xfe\n", "expected a line of JSON"),
        (b"[" * 60_000 + b"\n", "expected a line of JSON"),
        (b"[]\n", "expected an object that names the question"),
        (b'{"model_id": "bert"}\n', "expected an object that names the question"),
        (b'{"do": 7}\n', "expected an object that names the question"),
        (
            b'{"do": "unload everything"}\n',
            "unknown question 'unload everything'; this node answers",
        ),
        (b'{"do": "status", "models": "bert"}\n', "status: expected `models` as a list of texts"),
        (b'{"do": "status", "brief": 1}\n', "status: expected `brief` as true or false"),
        (b'{"do": "events", "after": -1}\n', "events: expected `after` as a number ≥ 0, got -1"),
        (b'{"do": "events", "after": NaN}\n', "events: expected `after` as a number ≥ 0"),
        (b'{"do": "explain"}\n', "explain: expected `model_id` as text, got null"),
        (b"x" * 70_000, "expected a question of at most 65,536 bytes"),
    ],
)
def test_what_is_no_question_has_an_error_for_an_answer(
    tmp_path: Path, line: bytes, said: str
) -> None:
    def status(question: Question) -> Mapping[str, object]:
        return {"models": question.texts("models"), "brief": question.flag("brief")}

    answers: dict[str, Answer] = {
        "status": status,
        "events": lambda question: {"after": question.number("after", 0)},
        "explain": lambda question: {"model_id": question.text("model_id")},
    }
    with listening(tmp_path / "s", **answers) as path:
        error = sent(path, line)["error"]
        assert error["reason"] == "BadQuestion"
        assert error["message"].startswith(said)
        assert ask(path, "status") == {"models": None, "brief": False}


def test_an_answer_that_fails_is_logged_and_the_next_one_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fails = [True]

    def observe(question: Question) -> Mapping[str, object]:
        if fails.pop():
            raise ArithmeticError("it cannot be told")
        return {"told": True}

    with listening(tmp_path / "s", observe=observe) as path:
        with pytest.raises(
            Refused, match=r"the node failed to answer \(ArithmeticError\); see its log"
        ):
            ask(path, "observe")
        fails.append(False)
        assert ask(path, "observe") == {"told": True}
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "it cannot be told" in caplog.text


# Many at a time.


def waits(until: threading.Event, ended: list[bool]) -> Answer:
    """An answer that comes when the event is set, and notes whether its asker had gone by then."""

    def answer(question: Question) -> Mapping[str, object]:
        while not until.wait(0.02):
            if not question.listens():
                ended.append(True)
                return {}
        return {"waited": True}

    return answer


def test_whoever_asks_nothing_or_waits_long_holds_up_nobody(tmp_path: Path) -> None:
    until, ended = threading.Event(), []
    path = tmp_path / "s"
    with (
        listening(path, events=waits(until, ended), status=told),
        connected(path),
        connected(path) as long,
    ):
        long.sendall(b'{"do": "events"}\n')
        assert ask(path, "status")["asked"] == "status"
        until.set()
        with long.makefile("rb") as answer:
            assert json.loads(answer.read().strip()) == {"waited": True}


def test_a_wait_outlives_the_patience_of_its_asker_while_the_node_shows_that_it_is_alive(
    tmp_path: Path,
) -> None:
    beats = []

    def events(question: Question) -> Mapping[str, object]:
        start = monotonic()
        while monotonic() - start < 0.6:
            threading.Event().wait(0.05)
            beats.append(question.listens())
        return {"events": []}

    with listening(tmp_path / "s", events=events) as path:
        assert ask(path, "events", patience_s=0.3) == {"events": []}
    assert all(beats)


def test_a_wait_ends_when_its_asker_has_gone(tmp_path: Path) -> None:
    ended: list[bool] = []
    with listening(tmp_path / "s", events=waits(threading.Event(), ended)) as path:
        with connected(path) as connection:
            connection.sendall(b'{"do": "events"}\n')
            assert connection.recv(1) == b"\n"
        eventually(lambda: ended, "the wait ends")


def test_a_wait_ends_when_the_node_stops(tmp_path: Path) -> None:
    control = ControlSocket(tmp_path / "s", {"events": waits(threading.Event(), [])})
    with connected(tmp_path / "s") as connection:
        connection.sendall(b'{"do": "events"}\n')
        assert connection.recv(1) == b"\n"
        control.close()
        with connection.makefile("rb") as answer:
            error = json.loads(answer.read().strip())["error"]
    assert error == {"reason": "NodeStopping", "message": "the node is shutting down"}


def test_more_questions_at_a_time_than_there_are_threads_for_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "MOST_QUESTIONS", 2)
    with listening(tmp_path / "s", status=told) as path:
        with connected(path), connected(path):
            with pytest.raises(Refused, match="2 questions are being answered already") as refused:
                ask(path, "status")
            assert refused.value.reason == "Busy"
        eventually(lambda: _answers(path), "those that left make room")


def _answers(path: Path) -> bool:
    try:
        return bool(ask(path, "status"))
    except Refused:
        return False


def test_questions_for_which_no_thread_can_be_started_keep_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "MOST_QUESTIONS", 2)
    with listening(tmp_path / "s", status=told) as path:
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", no_thread)
            for _ in range(3):
                with pytest.raises(NodeGone):
                    ask(path, "status")
        assert ask(path, "status") == {"asked": "status"}


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_question_that_is_not_finished_in_time_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "_QUESTION_S", 0.1)
    with listening(tmp_path / "s", status=told) as path, connected(path) as slow:
        slow.sendall(b'{"do": ')
        assert slow.recv(1) == b""


# Who may ask, and where.


def test_only_its_user_may_ask(tmp_path: Path) -> None:
    with listening(tmp_path / "s", status=told) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_users_socket_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(tmp_path / "s", status=told) as path:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        with pytest.raises(NotAllowed, match=r"s belongs to user \w+"):
            ask(path, "status")


def test_without_a_node_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(NodeNotRunning, match=f"nobody listens on {tmp_path}/s"):
        ask(tmp_path / "s", "status")
    with listening(tmp_path / "s", status=told):
        pass
    assert not (tmp_path / "s").exists()
    with pytest.raises(NodeNotRunning):
        ask(tmp_path / "s", "status")


def test_a_socket_left_by_a_crash_is_nobody_and_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(tmp_path / "s"))
    assert (tmp_path / "s").exists()
    with pytest.raises(NodeNotRunning):
        ask(tmp_path / "s", "status")
    with listening(tmp_path / "s", status=told) as path:
        assert ask(path, "status") == {"asked": "status"}


def test_a_place_where_it_cannot_listen_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=f"socket {tmp_path}/absent/s: "):
        ControlSocket(tmp_path / "absent" / "s", {})


# A node that is not well.


@contextmanager
def serving(path: Path, each: Callable[[socket.socket], None]) -> Iterator[None]:
    """Somebody who listens on the socket and does that with one connection."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)

        def accept() -> None:
            connection, _ = server.accept()
            with connection:
                each(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield
        thread.join(20)


@pytest.mark.parametrize(
    "half", [b"", b"\n\n", b'{"models": [', b'{"models": []}', b"what?\n", b"7\n"]
)
def test_a_node_that_dies_in_the_middle_has_gone(tmp_path: Path, half: bytes) -> None:
    def each(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(half)

    with (
        serving(tmp_path / "s", each),
        pytest.raises(NodeGone, match="ended before it had answered"),
    ):
        ask(tmp_path / "s", "status")


def test_a_node_that_hangs_is_silent(tmp_path: Path) -> None:
    done = threading.Event()
    with serving(tmp_path / "s", lambda connection: bool(done.wait(20))):
        with pytest.raises(NodeSilent, match=r"has said nothing for 0\.2 s"):
            ask(tmp_path / "s", "status", patience_s=0.2)
        done.set()


def test_a_node_that_takes_nobody_up_is_silent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        with connected(tmp_path / "s"), pytest.raises(NodeSilent, match=r"for 0\.2 s"):
            ask(tmp_path / "s", "status", patience_s=0.2)
