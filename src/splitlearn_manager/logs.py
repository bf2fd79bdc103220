"""One line an event: key=value for people, or one JSON object for programs.

Logging is the only thing decided here; what is worth a line is decided where it happens.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum

_COMMANDS = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What JSON need not escape of control characters, line separators, and what turns the text around it."""


class LogFormat(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


def log_event(
    log: logging.Logger,
    level: int,
    event: str,
    message: str = "",
    *,
    exc_info: BaseException | bool | None = None,
    **fields: object,
) -> None:
    """Logs `event=NAME key=value … msg=…`, ids first, in this order.

    Args:
        exc_info: an exception, or True for the one that is being handled: its traceback follows.
    """
    everything = {"event": event, **fields, **({"msg": message} if message else {})}
    line = " ".join(f"{key}={_value(value)}" for key, value in everything.items())
    log.log(level, "%s", line, extra={"fields": everything}, exc_info=exc_info)


def configure(level: str, form: LogFormat, write: Callable[[str, int], None] | None = None) -> None:
    """Sends the project's logs to standard error; other libraries' only from WARNING up.

    Args:
        write: takes each line and its level instead, where something else is on the screen as well.
    """
    handler = logging.StreamHandler(sys.stderr) if write is None else _Through(write)
    if form is LogFormat.JSON:
        handler.setFormatter(_Json())
    else:
        handler.setFormatter(
            logging.Formatter("time=%(asctime)s level=%(levelname)s %(message)s", "%H:%M:%S")
        )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("splitlearn_manager", "splitlearn_comm"):
        logging.getLogger(name).setLevel(level)


class _Through(logging.Handler):
    """Hands each line to a function."""

    def __init__(self, write: Callable[[str, int], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record), record.levelno)
        except Exception:
            self.handleError(record)


def _value(value: object) -> str:
    """A value as it is if it is one plain word, else quoted."""
    text = str(value)
    plain = text and text.isprintable() and not any(c in ' "=' for c in text)
    return text if plain else _as_json(text)


def _as_json(value: object) -> str:
    """JSON in which whatever might break the line, or command the terminal that it is read on, is escaped."""
    return _COMMANDS.sub(
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(value, ensure_ascii=False, default=str),
    )


class _Json(logging.Formatter):
    """A record as one JSON object; an event's fields stand beside time and level."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"msg": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _as_json(line)
