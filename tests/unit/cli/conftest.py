"""The command line in this process, for a user without nodes, in a directory without anything in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitlearn_manager.cli import reconcile_main
from support.command_line import Done, Run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["/usr/bin/splitlearn-manager"])
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def reconcile(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `reconcile` with these arguments, in `here`."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            reconcile_main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0, written.out, written.err)

    return run
