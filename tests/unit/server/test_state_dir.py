"""One node a desired directory, and where the command line finds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitlearn_manager.errors import ServerError
from splitlearn_manager.server.state_dir import Claim, socket_of, state_dir_for


def test_each_directory_has_a_state_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one, two = state_dir_for("/srv/a/desired"), state_dir_for("/srv/b/desired")
    assert one != two
    assert one.parent == two.parent == tmp_path / "splitlearn-manager"
    assert one.name.startswith("desired-")


def test_the_same_directory_written_in_another_way_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "desired").mkdir()
    monkeypatch.chdir(tmp_path)
    assert state_dir_for("desired") == state_dir_for(tmp_path / "x" / ".." / "desired" / "")


def test_without_xdg_it_is_below_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir_for("/").parent == tmp_path / ".local" / "state" / "splitlearn-manager"
    assert state_dir_for("/").name.startswith("root-")


def test_a_user_without_a_home_has_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    assert state_dir_for("/srv/desired").parent == Path("/.local/state/splitlearn-manager")


def test_the_socket_lies_in_the_state_directory_unless_its_path_is_too_long(tmp_path: Path) -> None:
    assert socket_of(Path("/s")) == Path("/s/node.sock")
    long = tmp_path / ("x" * 120)
    elsewhere = socket_of(long)
    assert elsewhere != long / "node.sock"
    assert len(os.fsencode(elsewhere)) < 104
    assert socket_of(long) == elsewhere
    assert socket_of(long / "y") != elsewhere


def test_a_second_claim_is_refused_with_the_process_id_of_the_first(tmp_path: Path) -> None:
    first = Claim(tmp_path / "state", "desired/")
    with pytest.raises(ServerError, match=rf"process {os.getpid()}\) serves desired/ already"):
        Claim(tmp_path / "state", "desired/")
    first.release()
    Claim(tmp_path / "state", "desired/").release()


def test_a_lock_file_left_by_a_crash_claims_nothing(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999999 and more than a process id\n")
    claim = Claim(tmp_path, "desired/")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    claim.release()


def test_a_state_directory_that_cannot_be_made_is_named_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "state"
    claim = Claim(place, "desired/")
    assert claim.problem == f"{place / 'lock'}: Not a directory"
    claim.release()


def test_a_state_directory_is_its_users_alone(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "state", "desired/")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    claim.release()
