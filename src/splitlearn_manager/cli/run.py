"""What `run` and `once` do: a node in this process, until a signal or until it has converged."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.text import Text

from splitlearn_manager.cli.finding import interpreter
from splitlearn_manager.cli.render import print_lines
from splitlearn_manager.cli.status_view import summary_lines
from splitlearn_manager.cli.terminal import Screen, moving_console, show_cursor
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.desired.state import DesiredState
from splitlearn_manager.logs import LogFormat, configure
from splitlearn_manager.reconcile.facts import Phase
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch
from splitlearn_manager.server.managed_server import ManagedServer

_LOOK_FOR_SIGNALS_S = 0.1
# Reading makes next to no garbage, and all that it makes stays.
_WHILE_READING = (200_000, 20, 20)
# Each request makes some hundred objects and no garbage that refers to itself: with Python's own thresholds
# a node under load spends a twentieth of its time on looking for such.
_WHILE_SERVING = (20_000, 20, 100)
_MOST_LISTED = 50


def serve(directory: Path, settings: ServerConfig, log_format: LogFormat, *, live: bool) -> None:
    """Serves the directory until SIGTERM or SIGINT, then drains. A second signal exits at once.

    Args:
        live: whether DIRECTORY/server.yaml is followed while the node runs.

    Raises ServerError if it cannot start.
    """
    signals = _Signals()
    keep_for_the_next_batch()
    with _on_screen(settings, log_format) as screen:
        server = ManagedServer(
            settings,
            directory=directory,
            live_settings=live,
            on_progress=files_read(screen, lambda: bool(server.model_manager.snapshot().instances)),
        )
        if screen is not None:
            screen.follow(server.model_manager)
        _serve(server, signals, screen.print_lines if screen is not None else print_lines)


def _serve(server: ManagedServer, signals: _Signals, say: Callable[[Iterable[Text]], None]) -> None:
    _exempt_from_collection()
    gc.set_threshold(*_WHILE_SERVING)
    server.start()
    announcer = threading.Thread(
        target=_announce_when_ready, args=(server, signals, say), name="announce", daemon=True
    )
    announcer.start()
    signals.wait()
    stopping = threading.Thread(target=server.stop, kwargs={"grace": server.drain_s}, name="stop")
    stopping.start()
    while stopping.is_alive():
        stopping.join(_LOOK_FOR_SIGNALS_S)


def converge(
    directory: Path, settings: ServerConfig, log_format: LogFormat
) -> tuple[DesiredState, list[Mapping[str, object]]]:
    """Loads what the directory declares, reports, and unloads it again; nothing is served.

    Raises ServerError if a node serves the directory.
    """
    with _on_screen(settings, log_format) as screen:
        on_progress = screen.files_read if screen is not None else None
        server = ManagedServer(settings, directory=directory, on_progress=on_progress)
        if screen is not None:
            screen.follow(server.model_manager)
        try:
            return server.converge()
        finally:
            server.stop()


def files_read(screen: Screen | None, has_models: Callable[[], bool]) -> Callable[[int, int], None]:
    """What is done as the directory's files are read: it is shown, garbage is collected seldom meanwhile and
    less often from then on, and at the end what was read, and PyTorch, is exempted from collection.

    A full collection goes through thousands of configs one by one, while no thread runs. With models
    there, nothing is exempted: what refers to itself in one of them would never be freed.
    """

    def told(done: int, total: int) -> None:
        if screen is not None:
            screen.files_read(done, total)
        gc.set_threshold(*(_WHILE_SERVING if done >= total else _WHILE_READING))
        if done >= total and not has_models():
            _exempt_from_collection()

    return told


def _exempt_from_collection() -> None:
    """Have collections pass over what is there by now, and what models need in any case: it stays.

    PyTorch alone is a fifth of a million objects, and each full collection that goes through them keeps all
    requests waiting for a tenth of a second.
    """
    import splitlearn_manager.core.model_loader
    import splitlearn_manager.runtime.choice
    import splitlearn_manager.runtime.verification  # noqa: F401

    gc.collect()
    gc.freeze()


@contextmanager
def _on_screen(settings: ServerConfig, log_format: LogFormat) -> Iterator[Screen | None]:
    """The screen, if standard error is a terminal; the log goes there, or to standard error as lines."""
    terminal = moving_console()
    if terminal is None:
        configure(settings.log_level, log_format)
        yield None
        return
    screen = Screen(terminal)
    configure(settings.log_level, log_format, screen.write)
    try:
        yield screen
    finally:
        screen.close()


def leave(code: int) -> NoReturn:
    """Ends the process with that exit code, whatever its threads are doing.

    A loader that is at work, or hangs, cannot be stopped. The interpreter's own way out would end its
    thread in the middle of torch, which then aborts the process.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk is no other end
            stream.flush()
    os._exit(code)


class _Signals:
    """SIGTERM and SIGINT: the first is noted, the second ends the process.

    The kernel may give a signal to any thread, and Python runs the handler once the main thread runs
    again: so the main thread waits for the byte that Python writes whichever thread it was. The handler
    takes no lock, since it may interrupt whoever holds it.
    """

    def __init__(self) -> None:
        self.received = False
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self) -> None:
        """Waits for the first signal; for the main thread."""
        while not self.received:
            self._woken.recv(1)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            show_cursor()
            os._exit(128 + number)
        self.received = True


def _announce_when_ready(
    server: ManagedServer, signals: _Signals, say: Callable[[Iterable[Text]], None]
) -> None:
    """Once converged, tells a person what is served and what to type next."""
    if not server.reconciler.wait_converged(lambda: signals.received):
        return
    status = server.reconciler.status
    phases = status.phases
    ready = sum(phase is Phase.READY for phase in phases.values())
    where = f"{server.config.host}:{server.port}"
    lines = [
        *listed(phases, status.describe),
        Text(f"Serving {ready} of {len(phases)} models on {where}."),
    ]
    if server.config.enable_monitoring:
        base = f"http://{server.config.host}:{server.metrics_port}"
        lines.append(Text(f"Status: {base}/api/v1/models   metrics: {base}/metrics"))
    if (example := _example_call(server, where)) is not None:
        lines += [Text("Ask it something, in a second terminal:"), Text(f"  {example}")]
    say(lines)
    sys.stdout.flush()


def listed(
    phases: Mapping[str, Phase], describe: Callable[[str], Mapping[str, object] | None]
) -> list[Text]:
    """A line for each model, those that serve first where they are too many for a screen or two."""
    ids = sorted(phases)
    if len(ids) > _MOST_LISTED:
        ids.sort(key=lambda model_id: phases[model_id] is not Phase.READY)
    found = (describe(model_id) for model_id in ids[:_MOST_LISTED])
    lines = summary_lines([status for status in found if status is not None])
    if len(ids) > _MOST_LISTED:
        lines.append(Text(f"  … and {len(ids) - _MOST_LISTED:,} more; `status` lists them"))
    return lines


def _example_call(server: ManagedServer, address: str) -> str | None:
    """A command that calls a model whose input shape is known."""
    for instance in server.model_manager.table.all:
        options = instance.config.config
        if options.input_shape is None:
            continue
        shape = ", ".join(str(2 if n == -1 else n) for n in options.input_shape)
        tensor = f"torch.randn({shape})"
        if (options.input_dtype or "float").startswith("int"):
            tensor = f"torch.ones({shape})"
        code = (
            "import torch; from splitlearn_comm import GRPCComputeClient as Client; "
            f"print(Client('{address}').compute({tensor}, '{instance.model_id}'))"
        )
        return f'{interpreter()} -c "{code}"'
    return None
