"""What moves on the terminal of `run`: bars for loads, progress of reading, the log above them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from splitlearn_manager.cli.terminal import Screen, Waiting, moving_console
from splitlearn_manager.core.lifecycle import ModelSpec, Owner
from splitlearn_manager.logs import LogFormat, configure, log_event
from support.command_line import plain
from support.fakes import Bench, model
from support.waiting import eventually

log = logging.getLogger("splitlearn_manager.tests.terminal")


class Shown:
    """A screen on a terminal of memory."""

    def __init__(self) -> None:
        self._written = StringIO()
        console = Console(
            file=self._written,
            force_terminal=True,
            color_system="standard",
            width=100,
            soft_wrap=True,
            highlight=False,
        )
        self.screen = Screen(console)

    @property
    def raw(self) -> str:
        return self._written.getvalue()

    @property
    def text(self) -> str:
        return plain(self.raw)

    def clear(self) -> None:
        self._written.truncate(0)
        self._written.seek(0)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = Shown()
    yield shown
    shown.screen.close()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def begin(bench: Bench, model_id: str, generation: int = 1, mb: float = 91.0) -> None:
    spec = ModelSpec.of(model(model_id), weights="w0", generation=generation)
    assert bench.manager.begin_load(spec, Owner.DIRECTORY, "cpu", mb) is not None


def test_each_load_has_a_bar_with_its_size_and_no_percentage(shown: Shown) -> None:
    bench = Bench()
    shown.screen.follow(bench.manager)
    begin(bench, "bert")
    begin(bench, "minilm", mb=0.0)
    eventually(lambda: "loading minilm" in shown.text, "both loads are shown")
    assert "loading bert" in shown.text
    assert "91 MB on cpu" in shown.text
    assert "0:00:0" in shown.text
    assert "%" not in shown.text
    bench.executor.run_all()
    eventually(lambda: shown.raw.endswith("\x1b[?25h") or "\x1b[?25h" in shown.raw, "the bars go")


def test_an_update_is_called_one(shown: Shown) -> None:
    bench = Bench()
    begin(bench, "bert")
    bench.executor.run_all()
    shown.screen.follow(bench.manager)
    begin(bench, "bert", generation=2)
    eventually(lambda: "updating bert" in shown.text, "the update is shown")


def test_nothing_is_drawn_while_nothing_is_loaded(shown: Shown) -> None:
    shown.screen.follow(Bench().manager)
    assert shown.raw == ""


def test_files_that_are_read_have_a_bar_of_how_many(shown: Shown) -> None:
    shown.screen.files_read(100, 10_000)
    assert "reading" in shown.text
    assert "10,000 files" in shown.text
    shown.screen.files_read(10_000, 10_000)
    shown.clear()
    shown.screen.files_read(1, 2)
    assert "reading" in shown.text, "a later look has a bar of its own"


def test_the_log_goes_above_the_bars_in_the_colour_of_its_level(
    shown: Shown, logging_restored: None
) -> None:
    configure("INFO", LogFormat.TEXT, shown.screen.write)
    log_event(log, logging.ERROR, "LoadFailed", "no such file", model="bert")
    shown.screen.files_read(1, 2)
    log_event(log, logging.INFO, "Loaded", model="bert")
    first, *rest = shown.text.splitlines()
    assert first.endswith('level=ERROR event=LoadFailed model=bert msg="no such file"')
    assert any("event=Loaded model=bert" in line for line in rest)
    assert "\x1b[31m" in shown.raw


def test_a_long_line_of_the_log_is_one_line_when_it_is_copied(
    shown: Shown, logging_restored: None
) -> None:
    configure("INFO", LogFormat.TEXT, shown.screen.write)
    log_event(log, logging.INFO, "Loaded", "word " * 60)
    assert len(shown.text.splitlines()) == 1


def test_the_traceback_of_an_event_follows_it_in_text_and_is_a_field_beside_it_in_json(
    logging_restored: None,
) -> None:
    lines: list[str] = []
    for form in (LogFormat.TEXT, LogFormat.JSON):
        configure("INFO", form, lambda line, level: lines.append(line))
        try:
            raise ValueError("no")
        except ValueError:
            log_event(log, logging.ERROR, "LoaderRaised", "a bug", exc_info=True, model="m")
    text, told = lines[0].splitlines(), json.loads(lines[1])
    assert text[0].endswith('level=ERROR event=LoaderRaised model=m msg="a bug"')
    assert text[-1] == "ValueError: no"
    assert (told["event"], told["model"], told["msg"]) == ("LoaderRaised", "m", "a bug")
    assert told["exception"].endswith("ValueError: no")


def test_other_output_goes_between(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    shown.screen.files_read(1, 2)
    shown.clear()
    shown.screen.print_lines([Text("Serving 2 of 2 models")])
    assert capsys.readouterr().out == "Serving 2 of 2 models\n"
    assert "reading" in shown.text, "the bars come back"


def test_once_closed_nothing_is_drawn_any_more(shown: Shown) -> None:
    bench = Bench()
    shown.screen.follow(bench.manager)
    shown.screen.close()
    shown.clear()
    begin(bench, "bert")
    shown.screen.files_read(1, 2)
    assert shown.raw == ""


def test_what_is_no_terminal_has_nothing_that_moves(capsys: pytest.CaptureFixture[str]) -> None:
    assert moving_console() is None
    with Waiting() as waiting:
        waiting.say(["bert: it is Loading"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("form", LogFormat)
def test_no_message_breaks_a_line_of_the_log_or_commands_a_terminal(form: LogFormat) -> None:
    lines: list[str] = []
    configure("INFO", form, lambda line, level: lines.append(line))
    text = "a\x1bb\x7fc\x85d\x9be\u2028f\u202eg"
    log_event(log, logging.INFO, "WorkerOutput", text)
    (line,) = lines
    assert line.isprintable()
    told = line.partition("msg=")[2] if form is LogFormat.TEXT else line
    value = json.loads(told)
    assert (value if form is LogFormat.TEXT else value["msg"]) == text
