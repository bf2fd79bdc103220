"""What a shell completes, as the installed completion asks for it: the console script, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitlearn_manager.cli.completion import complete_directory, complete_id, complete_target
from support.command_line import SCRIPT
from support.fake_node import FakeNode, model


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    environment = {
        **os.environ,
        "_SPLITLEARN_MANAGER_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["splitlearn-manager", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_ids_and_directories_are_completed(here: Path) -> None:
    (here / "desired").mkdir()
    (here / "deep").mkdir()
    with FakeNode(here / "desired", model("bert"), model("bart"), model("minilm")):
        assert completed("rec") == ["reconcile"]
        assert completed("reconcile", "su") == ["suspend"]
        assert completed("reconcile", "explain", "b") == ["bert", "bart"]
        assert completed("reconcile", "explain", "bert", "de") == ["desired/", "deep/"]
        assert completed("reconcile", "wait", "--for", "") == ["ready", "synced", "gone"]


def test_what_cannot_be_asked_completes_nothing_and_says_nothing(here: Path) -> None:
    assert complete_id([], "") == []
    assert complete_target([], "") == []
    with FakeNode(here / "gone", model("bert")):
        pass
    assert completed("reconcile", "explain", "") == []


def test_directories_that_nodes_serve_come_first(here: Path) -> None:
    for name in ("a", "models", ".hidden"):
        (here / name).mkdir()
    with FakeNode(here / "models"), FakeNode(here.parent / "elsewhere"):
        elsewhere = f"{here.parent / 'elsewhere'}/"
        assert complete_directory([], "") == [elsewhere, "models/", "a/"]
        assert complete_directory([], "m") == ["models/"]
        assert complete_directory([], ".h") == [".hidden/"]
        assert complete_directory([], "absent/x") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    "command",
    [
        [str(SCRIPT)],
        [str(SCRIPT), "reconcile"],
        [sys.executable, "-m", "splitlearn_manager.reconcile"],
    ],
)
def test_each_way_to_call_it_shows_the_completion_of_the_console_script(
    command: list[str], shell: str
) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [*command, "--show-completion", shell],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "_SPLITLEARN_MANAGER_COMPLETE" in done.stdout
    assert "_RECONCILE_COMPLETE" not in done.stdout


def test_the_completion_is_installed_for_the_console_script(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        [SCRIPT, "--install-completion", "bash"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    installed = tmp_path / ".bash_completions" / "splitlearn-manager.sh"
    assert "_SPLITLEARN_MANAGER_COMPLETE" in installed.read_text()
    assert str(installed) in (tmp_path / ".bashrc").read_text()
