"""The socket on which a running node is asked what it holds."""

from __future__ import annotations

import logging
import socket
import stat
from pathlib import Path

import pytest

from splitlearn_manager.errors import ServerError
from splitlearn_manager.server.control import ControlSocket, NodeNotRunning, ask


def test_a_question_is_answered_as_often_as_it_is_asked(tmp_path: Path) -> None:
    answers = iter([b"one", b"two"])
    control = ControlSocket(tmp_path / "s", lambda: next(answers))
    assert [ask(tmp_path / "s", "observe") for _ in range(2)] == [b"one", b"two"]
    control.close()


def test_a_long_answer_arrives_whole(tmp_path: Path) -> None:
    control = ControlSocket(tmp_path / "s", lambda: b"x" * 5_000_000)
    assert ask(tmp_path / "s", "observe") == b"x" * 5_000_000
    control.close()


def test_an_unknown_question_has_an_empty_answer(tmp_path: Path) -> None:
    control = ControlSocket(tmp_path / "s", lambda: b"told")
    assert ask(tmp_path / "s", "unload everything") == b""
    control.close()


def test_whoever_asks_nothing_holds_up_nobody(tmp_path: Path) -> None:
    control = ControlSocket(tmp_path / "s", lambda: b"told")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "s"))
        assert ask(tmp_path / "s", "observe") == b"told"
    control.close()


def test_an_answer_that_fails_is_logged_and_the_next_one_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fails = [True]

    def observe() -> bytes:
        if fails.pop():
            raise ArithmeticError("it cannot be told")
        return b"told"

    control = ControlSocket(tmp_path / "s", observe)
    assert ask(tmp_path / "s", "observe") == b""
    fails.append(False)
    assert ask(tmp_path / "s", "observe") == b"told"
    control.close()
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "it cannot be told" in caplog.text


def test_only_its_user_may_ask(tmp_path: Path) -> None:
    control = ControlSocket(tmp_path / "s", lambda: b"")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    control.close()


def test_without_a_node_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(NodeNotRunning):
        ask(tmp_path / "s", "observe")
    control = ControlSocket(tmp_path / "s", lambda: b"")
    control.close()
    assert not (tmp_path / "s").exists()
    with pytest.raises(NodeNotRunning):
        ask(tmp_path / "s", "observe")


def test_a_socket_left_by_a_crash_is_nobody_and_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(tmp_path / "s"))
    assert (tmp_path / "s").exists()
    with pytest.raises(NodeNotRunning):
        ask(tmp_path / "s", "observe")
    control = ControlSocket(tmp_path / "s", lambda: b"told")
    assert ask(tmp_path / "s", "observe") == b"told"
    control.close()


def test_a_place_where_it_cannot_listen_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=f"socket {tmp_path}/absent/s: "):
        ControlSocket(tmp_path / "absent" / "s", lambda: b"")
